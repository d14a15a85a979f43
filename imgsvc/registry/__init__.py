"""The registry client: every mirror, every credential, and an answer to "why". Start with client.py.

    hosts/     endpoints: hosts.toml, and what `hosts explain` prints of it
    auth/      credentials, challenges, tokens
    http/      one request: sockets, TLS, pools; the process that downloads blobs
    rules      what a request to a host is and carries (pure)      retry, ranges, slots, redirects: what next, which bytes, whose turn
    endpoint   one host: credential, challenge, redirects          failover: host after host
    resolver, documents, download, push                            the verbs

A request passes client → failover → endpoint → auth/ and http/. Policy is decided in pure code and carried out above.
Requests and answers are httpx's, sent by one client over transports of ours (http/sender.py, docs/decisions/httpx.md).
Decisions: HTTP/2 only where a server has nothing else (http/transport.py); "same site" for token services means the same
name or a listed one (hosts/hosts.py); a host configured by `http://` outside loopback gets no credential unless
`insecure_credentials = true`.
"""
