"""Unpacking layers: hostile input, in processes of their own.

unpacker                        the daemon's side: workers, orders, verdicts
worker                          the process
inflate  tarstream  tarheader   from a blob to entries
extract  laying  tree           from entries to files, below held descriptors
settle                          what needs the layers below
"""
