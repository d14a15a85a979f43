"""Import and export as the edge calls them: leases, threads, and the pull path around reading and writing."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from imgsvc.base.concurrency import ended
from imgsvc.base.errors import Cancelled, FailedPrecondition, NotFound, printable
from imgsvc.base.oci import Digest, Platform
from imgsvc.base.reference import Reference
from imgsvc.images.archive.reading import ArchiveReader, Named, OpenTar
from imgsvc.images.archive.source import ArchiveSource
from imgsvc.images.archive.writing import Exported, blobs_of, write_archive
from imgsvc.images.pull import Puller, PullRequest
from imgsvc.images.records import Image
from imgsvc.images.storage import Storage


@dataclass(frozen=True, slots=True)
class Target:
    """Where an import goes. base: repository for images without a name; "" when there is none."""

    base: str
    platform: Platform
    snapshotter: str


class Archives:
    """Images to and from files."""

    def __init__(self, *, storage: Storage, puller: Puller, open_tar: OpenTar) -> None:
        self._content = storage.content
        self._images = storage.images
        self._puller = puller
        self._leases = storage.leases
        self._threads = storage.threads
        self._open_tar = open_tar

    async def load(self, chunks: AsyncIterator[bytes], name: str, target: Target) -> list[tuple[Reference, Image]]:
        """Import a tar stream; every image of it is unpacked, verified by policy and published as a pull would.

        Args: name: what the archive is called in errors and in the record of where bytes came from.
        Raises: InvalidArgument, DataLoss, ResourceExhausted, PermissionDenied (policy), NotFound (no such platform).
        """
        async with self._leases.held([], purpose=f"import {name}") as lease:
            named, included = await self._read(chunks, name, lease)
            references = [(entry.reference(target.base), entry) for entry in named]
            return [(reference, await self._publish(reference, entry, name, included, target)) for reference, entry in references]

    async def _read(self, chunks: AsyncIterator[bytes], name: str, lease: str) -> tuple[list[Named], frozenset[Digest]]:
        """The images of an archive, and everything it contains."""
        loop = asyncio.get_running_loop()
        feed = _Feed(loop, chunks)

        included: set[Digest] = set()

        def on_blob(digest: Digest) -> None:
            included.add(digest)
            asyncio.run_coroutine_threadsafe(self._leases.add(lease, [("content", digest)]), loop).result()

        reader = ArchiveReader(self._content, self._open_tar, on_blob)
        work = asyncio.ensure_future(self._threads.run(reader.read, feed.next, name))
        try:
            return await asyncio.shield(work), frozenset(included)
        except asyncio.CancelledError:
            feed.cancel()
            await ended(work)
            raise

    async def _publish(self, reference: Reference, entry: Named, name: str, included: frozenset[Digest], target: Target) -> Image:
        source = ArchiveSource(entry.target, f"archive {name}", included, self._content, self._threads)
        request = PullRequest(reference, None, target.platform, target.snapshotter, source=source)
        return (await self._puller.pull(request)).image

    async def save(self, names: Iterable[str]) -> AsyncIterator[bytes]:
        """Export images as one archive, in chunks.

        Layers whose blobs are no longer stored are fetched again, from where the image came.
        Raises, before the first chunk: NotFound (no such image), PullFailed, FailedPrecondition (a document is gone).
        """
        exported = self._select(names)
        blobs = {digest for entry in exported for digest in blobs_of(entry.image)}
        async with self._leases.held([("content", digest) for digest in blobs], purpose="export"):
            for entry in exported:
                await self._bring_back(entry)
            archive = write_archive(exported, self._content)
            while (chunk := await self._threads.run(next, archive, None)) is not None:
                yield chunk

    def _select(self, names: Iterable[str]) -> list[Exported]:
        """One entry per image, with the names that were asked for; asked for by ID or digest, all its tags."""
        chosen: dict[str, Exported] = {}
        for name in names:
            image = self._images.find(name)
            if image is None:
                raise NotFound(f'no image "{printable(name, 200)}" on this node', hint="see `imgsvc images`, or pull it")
            tags = image.repo_tags
            if name not in image.image_id and (tagged := Reference.parse(name).tagged) in tags:
                tags = (tagged,)
            before = chosen.get(image.image_id)
            chosen[image.image_id] = Exported(image, tuple(dict.fromkeys((*(before.names if before else ()), *tags))))
        return list(chosen.values())

    async def _bring_back(self, entry: Exported) -> None:
        image = entry.image
        missing = await self._threads.run(lambda: [digest for digest in blobs_of(image) if self._content.info(digest) is None])
        if not {image.manifest.digest, image.image_id}.isdisjoint(missing):
            label = (entry.names or (image.image_id,))[0]
            raise FailedPrecondition(f"manifest or config of {label} cannot be read", hint="pull it again")
        if missing:
            await self._puller.bring_back(image, missing)


class _Feed:
    """An asynchronous stream for a reader on another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, chunks: AsyncIterator[bytes]) -> None:
        self._loop = loop
        self._chunks = chunks
        self._waiting: concurrent.futures.Future[bytes] | None = None
        self._cancelled = False

    def next(self) -> bytes:
        """The next chunk, b"" at the end. On the reader's thread. Raises: Cancelled."""
        self._waiting = asyncio.run_coroutine_threadsafe(self._take(), self._loop)
        if self._cancelled:
            self._waiting.cancel()
        try:
            return self._waiting.result()
        except concurrent.futures.CancelledError as error:
            raise Cancelled("the import was cancelled") from error

    def cancel(self) -> None:
        """Let the reader end."""
        self._cancelled = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def _take(self) -> bytes:
        async for chunk in self._chunks:
            if chunk:
                return chunk
        return b""
