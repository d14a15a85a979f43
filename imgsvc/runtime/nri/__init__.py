"""NRI, the Node Resource Interface: plugins that watch and change the pods and containers of this node.

::

    service      Nri, what sandboxes and containers call; what plugins ask of the runtime
    plugins      the socket, plugins as child processes, their order and their turns
    plugin       one plugin: registration, requests, time-outs
    mux          two ttrpc connections on one socket
    messages     records and specifications -> NRI's messages. Pure.
    merge        what several plugins want, put together; who set what. Pure.
    adjust       an adjustment applied to an OCI specification. Pure.

One request is under way at a time: plugins are asked one after another, in the order of their indices, and each sees what those
before it have changed. A plugin that joins receives all pods and containers in such a turn, too; so whatever is made meanwhile
is either in that list or asked about afterwards, and never both.

A plugin that does not answer in time, or breaks the connection, is dropped, and the request goes on without it. What a plugin
refuses fails the call, which is undone; ends of pods and containers cannot be refused.

Source: containerd/nri README.md, docs/validation-plugins.md.
"""
