"""Snapshots of layered file systems, and unpacking layers into them.

Read in this order: interfaces.py (the contracts), then

    overlay, native      the drivers over directories; driver.py is what they share
    erofs/               layers that are one file each, and an image of them that the kernel mounts
    records              what exists, in the metadata database
    directories          what is on disk, and its removal in the background
    mount, detect        mounting what a driver describes; which driver this machine can use
    copying, compare     whole trees; what differs between two
    xattrs               which extended attributes an image may set
    unpack/              the worker processes, and what they do with a layer

Decisions and their price:
* Layers of one image are unpacked at the same time, each into its own upper directory, and completed bottom to top by
  settle(), which costs a millisecond or two per layer. The one thing that cannot be completed later (a path through a symbolic
  link of a lower layer) is unpacked twice; no builder we know writes such layers.
* Workers are forked from a small single-threaded server that is started by exec on first use: a fresh process per layer
  in a few milliseconds instead of a start of Python and all imports, for 25 MB (31 MB with decryption) while it idles.
  What settles goes on from layer to layer until nothing is unpacked any more.
* trusted.* and security.* attributes other than capabilities and IMA signatures do not come from images. An upper
  directory that could mark itself opaque, redirected or metacopy would reach other layers' files.
* Snapshots that containers write to are not synced; layers are, once per image, before they become visible.
"""
