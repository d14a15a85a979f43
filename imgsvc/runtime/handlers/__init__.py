"""Runtime handlers: what runs containers.

known      builds the configured ones
oci/       an OCI runtime's command (runc, crun, youki) with one conmon per container
shim/      containerd shims, so that kata, gVisor and others work unchanged
"""
