"""Handler kind 2: containerd shims (`io.containerd.NAME.vN`), so that kata, gVisor, Firecracker and wasm work unchanged.

::

    handler      ShimRuntime, an OCIRuntime
    bootstrap    finding, starting and clearing up after the shim program, in all its generations
    pods         pods that the shim makes itself, by the sandbox API
    connections  calls to shims by their endpoint
    figures      what a shim says has been used
    stuck        the end of a shim that does not answer
    events       what shims tell: the daemon's side
    eventprocess ... and a process beside the daemon, so that they can always tell it
    sessions     exec and attach
    logs         a container's log, which a shim does not write itself
    logprocess   FIFO -> CRI log: a process for each container, beside the daemon

A FIFO forgets what is in it when its last reader leaves, and a shim leaves when its container ends: so the reader is a process
that outlives the daemon. (Of the shims, that of runc alone could start one itself, by `binary://`, and only for containers
without standard input.) One shim serves a whole pod (it groups by the sandbox annotation in config.json).

Source: containerd runtime/v2 README (shim authoring), api/runtime/task, ttrpc PROTOCOL.md.
"""
