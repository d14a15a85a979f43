"""Exec, attach and port-forward: what the kubelet reaches by URL instead of gRPC.

::

    server        the only listener: tokens, HTTP upgrade, one task per session
    command, forward, forward_websocket
                  sessions: a client protocol on one side, a target on the other
    flow, peer    bounded hand-over; the client's connection
    exec_target, attach_target, port_target
                  what is streamed to: a runtime's exec, conmon's attach socket, a port inside a network namespace
    fdio, child   unbuffered asynchronous descriptors; processes awaited by pidfd
    tls           the certificate, replaced without a restart
    --------------------------------------------------------------------------------------------------------------
    http, spdy, websocket, remotecommand, portforward, tokens
                  protocol logic without sockets or clocks: bytes in → events and bytes out
    interfaces    the seams: CommandTarget, PortTarget, Source, Sink

Back-pressure runs through: a target that does not read stops the reading of the client's socket, a client that does not
read stops the reading of the target's output. SPDY here has no flow control, so within one session a blocked stream holds
up the others; every implementation of this protocol shares that.
"""
