"""Pushing: what is stored goes to a registry as it is, encrypted layers encrypted.

A push sends the manifest of a name. Of an image that came by an index usually one platform is here, and a
registry takes no index whose manifests it lacks: then a tag gets the manifest, and the answer says how much was left out.
Layers the cache gave up are fetched again from the image's own repository, unless the registry has them. Nothing stands
under its name there before everything below it does.

Source: distribution-spec 1.1 "Push".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from imgsvc.base.concurrency import Threads, all_of
from imgsvc.base.errors import DataLoss, FailedPrecondition, ImgsvcError, NotFound
from imgsvc.base.oci import MAX_DOCUMENT, Descriptor, Digest, Index, Manifest, parse_document
from imgsvc.base.reference import Reference
from imgsvc.content.interfaces import ContentReader, Store
from imgsvc.content.verify import read_verified
from imgsvc.images.layers import NullReporter, PullReporter
from imgsvc.images.records import Image
from imgsvc.images.storage import Storage
from imgsvc.registry.interfaces import Credential, Registry, Repository

UPLOADS: Final = 3  # blobs of one push at a time; more make registries answer 429 and one link no faster

BringBack = Callable[[Image, Sequence[Digest]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class PushRequest:
    """What to push, with which credentials. reporter: receives layers with their states "waiting", "pushing", "exists", "done"."""

    reference: Reference
    credential: Credential | None
    reporter: PullReporter = field(default_factory=NullReporter)


@dataclass(frozen=True, slots=True)
class Pushed:
    """The outcome. target: the manifest that the name now has in the registry. sent [bytes] of blobs.

    left_out: manifests of the image's index that are not on this node and were not pushed.
    """

    target: Descriptor
    sent: int
    left_out: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """What one push sends. documents: manifests and indexes, children before parents; the last gets the name."""

    blobs: tuple[Descriptor, ...]
    documents: tuple[tuple[Descriptor, bytes], ...]
    left_out: int


class Pusher:
    """Pushes images of this node. bring_back: has blobs of layers of an image in the store again, as Puller.bring_back."""

    def __init__(self, *, registry: Registry, storage: Storage, bring_back: BringBack) -> None:
        self._registry = registry
        self._content = storage.content
        self._images = storage.images
        self._leases = storage.leases
        self._threads = storage.threads
        self._bring_back = bring_back

    async def push(self, request: PushRequest) -> Pushed:
        """Upload an image under one of its names on this node.

        Raises: NotFound (no such image); FailedPrecondition (a part is neither stored nor available); PullFailed.
        """
        name = request.reference
        image = self._images.find(str(name))
        if image is None:
            raise NotFound(f"{name} is not on this node", hint=f"give an image that name first: imgsvc tag SRC {name}")
        wanted = [*image.documents, *(layer.descriptor.digest for layer in image.layers)]
        async with self._leases.held([("content", digest) for digest in wanted], purpose=f"push {name}"):
            parts = await self._threads.run(self._parts, image, name)
            repository = self._registry.repository(name, request.credential)
            run = _Run(request, image, repository, self._content, self._threads, self._bring_back)
            slots = asyncio.Semaphore(UPLOADS)
            sent = sum(await all_of(*(run.blob(blob, slots) for blob in parts.blobs)))
            for descriptor, data in parts.documents[:-1]:
                await repository.push_manifest(data, descriptor.media_type, descriptor.digest)
            target, data = parts.documents[-1]
            await repository.push_manifest(data, target.media_type, str(name.target))
            return Pushed(target, sent, parts.left_out)

    def _parts(self, image: Image, name: Reference) -> _Parts:
        """Choose what to send. Blocking. Raises: FailedPrecondition, NotFound."""
        manifest = self._manifest(image, name)
        chosen: list[tuple[Descriptor, bytes]] = [manifest]
        left_out = 0
        for digest in reversed(image.documents[: image.documents.index(manifest[0].digest)]):
            data = self._read(digest, name)
            index = parse_document(data, "", str(name))
            if not isinstance(index, Index):
                break
            left_out = sum(entry.digest not in image.documents for entry in index.manifests)
            if left_out:
                break
            chosen.append((Descriptor(index.media_type, digest, len(data)), data))
        if name.digest:
            position = next((n for n, (descriptor, _) in enumerate(chosen) if descriptor.digest == name.digest), None)
            if position is None:
                raise FailedPrecondition(
                    f"{name.digest} cannot be pushed: only one of its manifests is on this node",
                    where=name.name,
                    hint="push a tag, which then names the manifest of this platform",
                )
            del chosen[position + 1 :]
            left_out = 0
        return _Parts(_blobs(manifest[1], name), tuple(chosen), left_out)

    def _manifest(self, image: Image, name: Reference) -> tuple[Descriptor, bytes]:
        data = self._read(image.manifest.digest, name)
        return Descriptor(image.manifest.media_type, image.manifest.digest, len(data)), data

    def _read(self, digest: Digest, name: Reference) -> bytes:
        try:
            return read_verified(self._content, digest, MAX_DOCUMENT)
        except (NotFound, DataLoss) as error:
            raise FailedPrecondition(f"{digest} is no longer stored", where=str(name), hint="pull the image again") from error


class _Run:
    """The blobs of one push."""

    def __init__(
        self, request: PushRequest, image: Image, repository: Repository, content: Store, threads: Threads, bring_back: BringBack
    ) -> None:
        self._request = request
        self._image = image
        self._repository = repository
        self._content = content
        self._threads = threads
        self._bring_back = bring_back
        self._mount_from = _beside(image, request.reference)

    async def blob(self, blob: Descriptor, slots: asyncio.Semaphore) -> int:
        """Have one blob in the registry. Returns the bytes sent."""
        self._report(blob, 0, "waiting")
        async with slots:
            if await self._threads.run(self._content.info, blob.digest) is None:
                if await self._repository.has_blob(blob.digest):
                    self._report(blob, blob.size, "exists")
                    return 0
                await self._fetch(blob)
            async with self._threads.holding(partial(self._content.reader, blob.digest), lambda reader: reader.close()) as stored:
                reader = _Reader(stored, self._threads, lambda count: self._report(blob, count, "pushing"))
                was_sent = await self._repository.push_blob(blob, reader, mount_from=self._mount_from)
        self._report(blob, blob.size, "done" if was_sent else "exists")
        return blob.size if was_sent else 0

    async def _fetch(self, blob: Descriptor) -> None:
        try:
            await self._bring_back(self._image, [blob.digest])
        except ImgsvcError as error:
            raise FailedPrecondition(
                f"layer {blob.digest} is no longer stored and cannot be fetched again: {error}",
                where=str(self._request.reference),
                hint="[gc] blob_cache and images.discard_unpacked_layers say what is kept",
            ) from error

    def _report(self, blob: Descriptor, count: int, state: str) -> None:
        self._request.reporter.layer(blob.digest, blob.size, count, state)


class _Reader:
    """A BlobReader of a stored blob that tells how far it was read."""

    def __init__(self, stored: ContentReader, threads: Threads, progress: Callable[[int], None]) -> None:
        self._stored = stored
        self._threads = threads
        self._progress = progress

    async def read_at(self, offset: int, count: int) -> bytes:
        """See BlobReader."""
        data = await self._threads.run(self._stored.read_at, offset, count)
        self._progress(offset + len(data))
        return data


def _blobs(manifest: bytes, name: Reference) -> tuple[Descriptor, ...]:
    """Config and layers, each once. Layers that may not be distributed stay where their URLs point, as the image-spec has it."""
    document = parse_document(manifest, "", str(name))
    if not isinstance(document, Manifest):
        raise FailedPrecondition("the stored manifest is an index", where=str(name), hint="run `imgsvc fsck`")
    kept_back = {layer.digest for layer in document.layers if layer.urls and _is_nondistributable(layer.media_type)}
    blobs = {blob.digest: blob for blob in (document.config, *document.layers) if blob.digest not in kept_back}
    return tuple(blobs.values())


def _is_nondistributable(media_type: str) -> bool:
    return ".nondistributable." in media_type or ".foreign." in media_type


def _beside(image: Image, name: Reference) -> str:
    """Another repository of the same registry that should have the blobs, "" when none is known."""
    others = (Reference.parse(other) for other in image.names)
    return next((other.repository for other in others if other.host == name.host and other.repository != name.repository), "")
