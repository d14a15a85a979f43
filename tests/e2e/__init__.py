"""The real daemon, registry, OCI runtime, monitor and CNI plugins, driven through the socket."""
