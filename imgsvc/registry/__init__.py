"""The registry client: every mirror, every credential, and an answer to "why". Start with client.py.

    pure    hosts (hosts.toml → endpoints), challenge (WWW-Authenticate, realms, tokens), retry (what next, endpoint
            health), ranges (which connection fetches what), netguard (where a server may send us), proxies, redact
    I/O     hostdirs (finding files), credentials (files, helpers, plugins), exchange (what a request and its answer are),
            netstream + transport (sockets, TLS, pools), bulk + bulk_worker (the same in a process of its own, for blobs),
            auth (answering challenges), endpoint (one host: credential, redirects), failover (host after host)
    verbs   resolver, documents, download, push

A request passes client → failover → endpoint → auth/transport/bulk. Policy is decided in pure code and carried out above.
Decisions: httpcore instead of httpx, and HTTP/2 only where a server has nothing else (transport.py); "same site" for token
services means the same name or a listed one (hosts.trusted_token_hosts); a host configured by `http://` outside loopback
gets no credential unless `insecure_credentials = true`.
"""
