"""Layers that are one file: the tar stream as it is, and an EROFS image of metadata that makes files of it.

    index     what a tar stream says, one record per entry
    merge     layers replayed over one another into a tree of files, in memory
    image     a tree as an EROFS image over its layers' tar streams
    build     all of that, for a worker
    mounting  an image over its files, with or without loop devices
    pack      a directory as a tar stream, for what is committed after it was mounted
    driver    the snapshotter

Nothing of a layer is ever created on the node's file system but its tar stream, one index and one image.
"""
