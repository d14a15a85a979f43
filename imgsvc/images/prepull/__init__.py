"""Images to keep on the node at all times, named in files that the daemon watches.

    plan       a file → what is wanted (pure but for reading it)
    windows    when pulling is allowed (pure)
    throttle   a bandwidth limit around a registry
    service    keeps stored images in step with wanted ones; remembers across restarts

Decisions, and what they cost:

* Every round for a stored image is one request to the registry: has the tag moved? Nothing is fetched twice,
  since the pull itself takes what is stored.
* When a window closes, running pulls are cancelled; their bytes stay and the next window goes on from there.
* Another caller's pull that wants the same layer at the same time joins the throttled download. The other way
  round costs nothing: who joins a fast download is fast.
* An image that is no longer named is no longer pinned, and stays until it is removed (the kubelet does when space
  runs short). Deleting by leaving out a line has surprised people.
"""
