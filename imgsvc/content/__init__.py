"""Blobs by digest: verified before they are visible, durable before they are acknowledged.

interfaces   the contracts: Provider, Ingester, IngestManager, Manager, together Store; Scrubbable for fsck
ranges       pure: which bytes of an ingest are there
verify       digest and size checks, hashing as bytes arrive
ingest       unfinished writes on disk, the writer
local        LocalStore: the layout on disk, records in the metadata database
check        fsck and recovery, over the interfaces
"""
