"""An archive's images as a Registry: what it contains is in the content store already, so nothing is ever downloaded.

Blobs that are stored but not in the archive are not the archive's to give.
"""

from __future__ import annotations

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import FailedPrecondition, NotFound
from imgsvc.base.oci import Descriptor, Digest
from imgsvc.base.reference import Reference
from imgsvc.content.interfaces import Provider
from imgsvc.content.verify import read_verified
from imgsvc.registry.interfaces import BlobSink, BlobSource, Credential, Fetcher, Registry, Repository, Resolved


class ArchiveSource:
    """One image whose blobs were stored by an ArchiveReader. name: what the archive is called; included: what it contains."""

    def __init__(self, target: Descriptor, name: str, included: frozenset[Digest], content: Provider, threads: Threads) -> None:
        self._target = target
        self._name = name
        self._included = included
        self._content = content
        self._threads = threads

    async def resolve(self, reference: Reference, credential: Credential | None = None) -> Resolved:
        """See Registry: whatever is asked for is the image."""
        return Resolved(self._target, self._name)

    def fetcher(self, reference: Reference, credential: Credential | None = None) -> Fetcher:
        """See Registry."""
        return self

    @property
    def took_credentials(self) -> bool:
        """See Fetcher."""
        return False

    async def document(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """See Fetcher."""
        if descriptor.digest not in self._included:
            raise self._missing(descriptor)
        return await self._threads.run(read_verified, self._content, descriptor.digest, limit)

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        """See Fetcher; asked for samples only."""
        if descriptor.digest not in self._included:
            raise self._missing(descriptor)
        for offset, count in sink.missing():
            await sink.write_at(offset, await self._threads.run(_read, self._content, descriptor.digest, offset, count))
        return BlobSource()

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        """See Fetcher: there is no other source."""
        return False

    def repository(self, reference: Reference, credential: Credential | None = None) -> Repository:
        """See Registry."""
        raise FailedPrecondition("nothing can be pushed to an archive", where=self._name)

    async def close(self) -> None:
        """See Registry."""

    def _missing(self, descriptor: Descriptor) -> NotFound:
        hint = "write it again for this node's platform, with all layers"
        return NotFound(f"the archive does not contain {descriptor.digest} ({descriptor.media_type})", where=self._name, hint=hint)


def _read(content: Provider, digest: Digest, offset: int, count: int) -> bytes:
    with content.reader(digest) as reader:
        return reader.read_at(offset, count)


def as_registry(source: ArchiveSource) -> Registry:
    """Lets mypy prove that the contract is met."""
    return source
