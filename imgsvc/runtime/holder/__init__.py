"""What holds a pod while none of its containers runs.

holders       starts, watches and ends them
namespaces    pinned by bind mounts, held by no process
pause         the process of a shared PID namespace
shim_pod      pods that a shim makes itself, a virtual machine each, say
"""
