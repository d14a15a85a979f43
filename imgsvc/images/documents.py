"""Small documents (indexes, manifests, configs): from the store where that is allowed, else by one request for all callers that ask for the same."""

from __future__ import annotations

import uuid

from imgsvc.base.concurrency import SingleFlight, Threads
from imgsvc.base.errors import DataLoss, NotFound
from imgsvc.base.oci import MAX_DOCUMENT, Descriptor
from imgsvc.content.interfaces import Store
from imgsvc.content.verify import read_verified
from imgsvc.images.provenance import Provenance, Witness


class Documents:
    """Gets and stores documents. One per daemon."""

    def __init__(self, content: Store, threads: Threads, provenance: Provenance) -> None:
        self._content = content
        self._threads = threads
        self._provenance = provenance
        self._fetches: SingleFlight[tuple[bytes, bool]] = SingleFlight()
        self._writes: SingleFlight[None] = SingleFlight()

    async def get(self, repository: str, who: str, descriptor: Descriptor, witness: Witness, *, anonymous: bool) -> bytes:
        """Verified bytes, as `repository` may have them; not stored yet when they had to be fetched.

        Args: who: identity of the caller, for sharing a request; anonymous: as Provenance.may_use.
        Raises: PullFailed, DataLoss, ResourceExhausted.
        """
        if descriptor.data is not None:
            return descriptor.data
        if self._provenance.may_use(repository, descriptor.digest, anonymous=anonymous):
            stored = await self._threads.run(_read, self._content, descriptor)
            if stored is not None:
                return stored

        async def fetch() -> tuple[bytes, bool]:
            return await witness.document(descriptor, limit=MAX_DOCUMENT), witness.took_credentials

        data, took_credentials = await self._fetches.run(f"{repository}\0{who}\0{descriptor.digest}", fetch)
        witness.joined(descriptor.digest, took_credentials=took_credentials)
        return data

    async def put(self, descriptor: Descriptor, data: bytes) -> None:
        """Store a document. Durable on return, as the store is. Raises: ResourceExhausted, DataLoss."""
        await self._writes.run(descriptor.digest, lambda: self._threads.run(_store, self._content, descriptor, data))


def _read(content: Store, descriptor: Descriptor) -> bytes | None:
    """A document that is here already, verified again because it decides everything else; None when it is not."""
    if content.info(descriptor.digest) is None:
        return None
    try:
        return read_verified(content, descriptor.digest, MAX_DOCUMENT)
    except (DataLoss, NotFound):
        return None


def _store(content: Store, descriptor: Descriptor, data: bytes) -> None:
    if content.info(descriptor.digest) is not None:
        return
    writer = content.writer(f"document-{descriptor.digest}-{uuid.uuid4().hex}", total=len(data), expected=descriptor.digest)
    try:
        writer.write(data)
        writer.commit(len(data), descriptor.digest)
    finally:
        writer.close()
