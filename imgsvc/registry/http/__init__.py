"""One request to one server, in this process or in the download process.

sender                              the httpx client, its hooks
exchange                            what requests and answers carry beside their bytes, failure, route
transport  netstream  netguard      connection pools, sockets, which addresses may be reached
tls  proxies  redact                certificates, proxies, URLs without secrets
bulk  bulk_messages  bulk_worker    the same in a process of its own, for bodies of blobs
"""
