"""Handler kind 2: containerd shims (`io.containerd.NAME.vN`), so that kata, gVisor, Firecracker and wasm work unchanged.

::

    handler      ShimRuntime, an OCIRuntime
    bootstrap    finding, starting and clearing up after the shim program, in all its generations
    pods         pods that the shim makes itself, by the sandbox API
    connections  calls to shims by their endpoint
    figures      what a shim says has been used
    stuck        the end of a shim that does not answer
    ttrpc        the RPC protocol: frames, a client, the server for events
    sessions     exec and attach
    logcopy      FIFO -> CRI log; a shim writes no log itself

A shim holds both ends of the stdio FIFOs: while the daemon is away a container blocks after 64 KiB of output, and no line
is lost. One shim serves a whole pod (it groups by the sandbox annotation in config.json).

Source: containerd runtime/v2 README (shim authoring), api/runtime/task, ttrpc PROTOCOL.md.
"""
