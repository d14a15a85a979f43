"""What holds a pod while none of its containers runs.

interfaces       PodHolder, the contract of the drivers
choice           which driver holds a pod; made once, and kept in the pod's record
holders          starts, watches and ends them
namespaces       driver: pinned by bind mounts, held by no process
pause            driver: a process, for a shared PID namespace (pause_program: its executable)
shim_pod         driver: pods that a shim makes itself, a virtual machine each, say
"""
