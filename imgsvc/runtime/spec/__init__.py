"""From a CRI request and an image to an OCI runtime specification.

planner                          looks everything up on the node
build                            the specification itself; pure
users  volumes  copyup  devices  cdi  sysctls
security  seccomp  apparmor  selinux
validate                         what the kubelet sent, checked first
"""
