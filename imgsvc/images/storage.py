"""What the use cases work on: the blobs, image records, leases and unpacked layers of one node, as one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imgsvc.base.concurrency import Threads
from imgsvc.content.interfaces import ScrubbableStore
from imgsvc.images.leases import LeaseManager
from imgsvc.images.records import ImageStore
from imgsvc.snapshot.interfaces import ScrubbableSnapshotter


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage of one node.

    content: blobs. images: records by name. leases: what the collector must keep. threads: where blocking calls run.
    snapshotters: by name, the default one first.
    """

    content: ScrubbableStore
    images: ImageStore
    leases: LeaseManager
    threads: Threads
    snapshotters: Mapping[str, ScrubbableSnapshotter]
