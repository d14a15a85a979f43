"""What the collector collects, and what needs it: adapters from stores and records to gc.Keeper, Collectable and Cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from imgsvc.base.errors import NotFound
from imgsvc.base.oci import Digest
from imgsvc.content.interfaces import IngestManager, Manager, Provider
from imgsvc.images.leases import Node
from imgsvc.images.records import Image, ImageStore
from imgsvc.images.rootfs import is_unpacked
from imgsvc.images.upkeep.collector import Cache, Cached, Collectable, Keeper, Root
from imgsvc.snapshot.interfaces import Kind, Snapshotter

CONTENT: Final = "content"
SNAPSHOT: Final = "snapshot"
INGEST: Final = "ingest"
KINDS: Final = (CONTENT, INGEST, SNAPSHOT)
IMAGE: Final = "image"
INGEST_AGE: Final = timedelta(hours=24)  # an unfinished write untouched for that long will not be resumed


def content_node(digest: str) -> Node:
    """A blob."""
    return Node(CONTENT, digest)


def snapshot_node(snapshotter: str, key_or_name: str) -> Node:
    """A snapshot; the ID names the snapshotter, since the same layer may be in several."""
    return Node(SNAPSHOT, f"{snapshotter}/{key_or_name}")


class Images:
    """gc.Keeper: an image needs its documents, its layers' blobs and their snapshots.

    gc.Cache: the blobs of layers that are unpacked, which a pull can bring back.
    """

    def __init__(self, images: ImageStore, content: Manager, snapshotters: Mapping[str, Snapshotter], wanted: Collection[str]) -> None:
        """wanted: snapshotters that images are pulled for now; what others have of an image goes once it is whole in the first of these."""
        self._images = images
        self._content = content
        self._snapshotters = snapshotters
        self._wanted = tuple(wanted)

    def roots(self) -> Iterable[Root]:
        """See gc.Keeper."""
        return map(self._root, self._images.all())

    def cached(self) -> Iterable[Cached]:
        """See gc.Cache."""
        return _unpacked_blobs(self._images.all(), self._content)

    def needs(self, image: Image) -> list[Node]:
        """Everything one image needs, whether it is there or not."""
        nodes = [content_node(digest) for digest in image.documents]
        moved = is_unpacked(image, self._snapshotters[self._wanted[0]])
        drivers = self._wanted if moved else tuple(self._snapshotters)
        for layer in image.layers:
            nodes.append(content_node(layer.descriptor.digest))
            if layer.snapshot:
                nodes += [snapshot_node(name, layer.snapshot) for name in drivers]
        return nodes

    def _root(self, image: Image) -> Root:
        return Root(Node(IMAGE, image.image_id), f"image {next(iter(image.names), image.image_id)}", self.needs(image))


def _unpacked_blobs(images: Sequence[Image], content: Manager) -> Iterator[Cached]:
    whole: set[Digest] = set()  # blobs that are wanted as they are: documents, and the layers of what never gets unpacked
    layers: set[Digest] = set()
    for image in images:
        whole.update(image.documents)
        (whole if image.artifact else layers).update(layer.descriptor.digest for layer in image.layers)
    for info in content.walk():
        if info.digest in layers and info.digest not in whole:
            yield Cached(content_node(info.digest), info.size, info.updated_at.timestamp())


class Blobs:
    """gc.Collectable: every stored blob."""

    kind = CONTENT

    def __init__(self, content: Manager) -> None:
        self._content = content

    def walk(self) -> Iterable[tuple[Node, Sequence[Node]]]:
        """Blobs name nothing: what an image needs is in its record."""
        return ((content_node(info.digest), ()) for info in self._content.walk())

    def remove(self, *nodes: Node) -> None:
        """See gc.Collectable."""
        self._content.delete(*(Digest(node.id) for node in nodes))


class Writes(Provider, IngestManager, Protocol):
    """What judging unfinished writes takes of a content store."""


class Ingests:
    """gc.Collectable: writes that will not be finished.

    They were untouched for INGEST_AGE, or belong to an earlier daemon and their blob has been stored since.
    """

    kind = INGEST

    def __init__(self, ingests: Writes, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._ingests = ingests
        self._clock = clock
        self._started = clock()

    def walk(self) -> Iterable[tuple[Node, Sequence[Node]]]:
        """Those that may still be finished are not judged at all."""
        oldest = self._clock() - INGEST_AGE
        for status in self._ingests.list_statuses():
            if status.updated_at < oldest or (status.updated_at < self._started and self._is_stored(status.expected)):
                yield Node(INGEST, status.ingest_ref), ()

    def remove(self, *nodes: Node) -> None:
        """See gc.Collectable. Raises: Unavailable when a writer took one up again."""
        for node in nodes:
            self._ingests.abort(node.id)

    def _is_stored(self, digest: Digest | None) -> bool:
        return digest is not None and self._ingests.info(digest) is not None


class Snapshots:
    """gc.Collectable and gc.Keeper: the snapshots of all snapshotters, each needing its parent.

    Active snapshots and views made by this daemon belong to a running pull or container, and are needed.
    Those of an earlier daemon need a root like everything else: a container's record or its lease.
    """

    kind = SNAPSHOT

    def __init__(self, snapshotters: Sequence[Snapshotter], clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._snapshotters = {snapshotter.name: snapshotter for snapshotter in snapshotters}
        self._started = clock()

    def roots(self) -> Iterable[Root]:
        """See gc.Keeper."""
        for name, snapshotter in self._snapshotters.items():
            for info in snapshotter.walk():
                if info.kind is not Kind.COMMITTED and info.created_at >= self._started:
                    yield Root(snapshot_node(name, info.id), f"{info.kind} snapshot {info.id} in use")

    def walk(self) -> Iterable[tuple[Node, Sequence[Node]]]:
        """See gc.Collectable."""
        for name, snapshotter in self._snapshotters.items():
            for info in snapshotter.walk():
                yield snapshot_node(name, info.id), () if info.parent is None else (snapshot_node(name, info.parent),)

    def remove(self, *nodes: Node) -> None:
        """See gc.Collectable. Raises: FailedPrecondition when something was put on top of one meanwhile."""
        keys: dict[str, list[str]] = {}
        for node in nodes:
            name, _, key_or_name = node.id.partition("/")
            keys.setdefault(name, []).append(key_or_name)
        for name, some in keys.items():
            self._snapshotters[name].remove(*some)


def stored_sizes(content: Manager, ingests: IngestManager, snapshotters: Iterable[Snapshotter]) -> dict[Node, int]:
    """Size on disk of everything [bytes], by node, for `imgsvc df`. Blocking; measures active snapshots."""
    sizes = {content_node(info.digest): info.size for info in content.walk()}
    sizes |= {Node(INGEST, status.ingest_ref): status.offset for status in ingests.list_statuses()}
    for snapshotter in snapshotters:
        for snapshot in snapshotter.walk():
            with contextlib.suppress(NotFound):  # removed meanwhile
                sizes[snapshot_node(snapshotter.name, snapshot.id)] = snapshotter.usage(snapshot.id).size
    return sizes


def as_protocols(images: Images, blobs: Blobs, ingests: Ingests, snapshots: Snapshots) -> tuple[list[Keeper], list[Collectable], Cache]:
    """What a Collector is built from, typed as its contracts."""
    return [images, snapshots], [blobs, ingests, snapshots], images
