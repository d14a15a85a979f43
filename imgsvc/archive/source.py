"""An archive's images as a Registry: everything is in the content store already, so nothing is ever downloaded."""

from __future__ import annotations

from imgsvc.errors import FailedPrecondition, NotFound
from imgsvc.oci import Descriptor
from imgsvc.reference import Reference
from imgsvc.registry.interfaces import BlobSink, BlobSource, Credential, Fetcher, Registry, Repository, Resolved


class ArchiveSource:
    """One image whose blobs were stored by an ArchiveReader. name: what the archive is called."""

    def __init__(self, target: Descriptor, name: str) -> None:
        self._target = target
        self._name = name

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
        """See Fetcher; asked only for what is not stored."""
        raise self._missing(descriptor)

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        """See Fetcher; asked only for what is not stored."""
        raise self._missing(descriptor)

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        """See Fetcher: there is nobody else."""
        return False

    def repository(self, reference: Reference, credential: Credential | None = None) -> Repository:
        """See Registry."""
        raise FailedPrecondition("nothing can be pushed to an archive", where=self._name)

    async def close(self) -> None:
        """See Registry."""

    def _missing(self, descriptor: Descriptor) -> NotFound:
        hint = "write it again for this node's platform, with all layers"
        return NotFound(f"the archive does not contain {descriptor.digest} ({descriptor.media_type})", where=self._name, hint=hint)


def as_registry(source: ArchiveSource) -> Registry:
    """Lets mypy prove that the contract is met."""
    return source
