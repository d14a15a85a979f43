"""Which repository has shown which bytes to this node, and whether that took credentials. Private means private.

What a repository serves without credentials is public, for every caller and under every other name. What took credentials is
private to that repository: it is used for another repository, or for a caller without credentials, only after that
repository has shown with that caller's rights that it has the bytes. Digests are no secrets, so naming one proves nothing:
documents are fetched whole, and of a layer a random sample is fetched and compared. That is remembered per repository, and
public bytes are never asked for.

The same holds for an unpacked layer. It is known by its snapshot's name, and counts as shown by a repository whose blob
was seen to unpack to it: an image config may claim any diff ID.

A record is kept as long as its blob is stored or an image consists of it. Without a record no repository grants access to the bytes, so
that every repository has to show them. What was stored before there were records counts as having taken credentials.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import PermissionDenied
from imgsvc.base.metadb.database import MetaDB, Record, WriteTxn
from imgsvc.base.oci import Descriptor, Digest
from imgsvc.content.interfaces import Provider
from imgsvc.images.records import Image
from imgsvc.registry.interfaces import BlobSink, BlobSource, Fetcher

TABLE: Final = "provenance"
_ADOPTED: Final = "adopted"  # the key that says that images of an older daemon have records
_MAX_SEEN: Final = 10_000  # blobs and snapshots of pulls under way
_SAMPLE: Final = 4096  # [bytes] of a layer that are compared


class Provenance:
    """The records, by digest of a blob or name of a snapshot."""

    def __init__(self, db: MetaDB) -> None:
        self._db = db
        self._seen: dict[str, Record] = {}  # what pulls under way were shown: true, and not recorded yet

    def may_use(self, repository: str, digest: str, *, anonymous: bool) -> bool:
        """Whether bytes that are here may be used for a pull from a repository that its caller has just resolved a name in.

        Args: anonymous: no credentials were needed for that.
        """
        names = self._names(digest)
        return any(names.values()) or (not anonymous and repository in names)

    def may_hand_on(self, repository: str, digest: str) -> bool:
        """Whether every caller may have the bytes under a repository's name."""
        names = self._names(digest)
        return names.get(repository, any(names.values()))

    def unpacks_to(self, blob: Digest, snapshot: str) -> bool:
        """Whether the blob was seen to unpack to the snapshot."""
        return blob in self._get(snapshot).get("blobs", ())

    async def record(
        self, repository: str, digests: Iterable[str], *, anonymous: bool, unpacked: Mapping[str, Digest] | None = None
    ) -> None:
        """Remember what a repository has shown; what it has shown without credentials once stays public.

        Args: unpacked: blobs that were seen to unpack to snapshots, by the snapshots' names.
        One transaction; none where nothing is new.
        """
        shown, blobs = set(digests), unpacked or {}
        if any(_changed(self._stored(key), repository, anonymous, blobs.get(key)) for key in shown):
            await self._db.awrite(lambda txn: _note(txn, repository, shown, anonymous, blobs))
        for key in shown:
            self._seen.pop(key, None)

    def saw(self, repository: str, key: str, *, anonymous: bool, blob: Digest | None = None) -> None:
        """Note what a pull was just shown, or unpacked from `blob`, until it is recorded: of many pulls at once one is shown it."""
        seen = self._seen.pop(key, {"names": {}, "blobs": []})
        seen["names"][repository] = anonymous or seen["names"].get(repository, False)
        seen["blobs"] += [blob] * (blob is not None and blob not in seen["blobs"])
        self._seen[key] = seen
        if len(self._seen) > _MAX_SEEN:
            del self._seen[next(iter(self._seen))]

    def unsee(self, key: str) -> None:
        """What was shown turned out to be something else."""
        self._seen.pop(key, None)

    async def adopt(self, images: Iterable[Image]) -> None:
        """Give images of a daemon without records some, once: as if all of them had taken credentials."""
        known = list(images)
        if not known or self._get(_ADOPTED):
            return

        def write(txn: WriteTxn) -> None:
            for image in known:
                blobs = {layer.snapshot: layer.descriptor.digest for layer in image.layers if layer.snapshot}
                for repository in image.repositories:
                    _note(txn, repository, parts(image), False, blobs)
            txn.put(TABLE, _ADOPTED, {"version": 1})

        await self._db.awrite(write)

    async def tidy(self, images: Iterable[Image], content: Provider, threads: Threads) -> None:
        """Forget what is neither stored nor part of an image."""
        needed = {_ADOPTED, *(part for image in images for part in parts(image))}

        def unneeded() -> list[str]:
            with self._db.read() as txn:
                keys = [key for key, _ in txn.items(TABLE)]
            return [key for key in keys if key not in needed and (not _is_digest(key) or content.info(Digest(key)) is None)]

        if gone := await threads.run(unneeded):
            await self._db.awrite(lambda txn: [txn.delete(TABLE, key) for key in gone])

    def _names(self, key: str) -> Mapping[str, bool]:
        names: Mapping[str, bool] = self._get(key).get("names", {})
        return names

    def _get(self, key: str) -> Record:
        stored, seen = self._stored(key), self._seen.get(key)
        if seen is None:
            return stored
        names = dict(stored.get("names", {}))
        for repository, anonymous in seen["names"].items():
            names[repository] = anonymous or names.get(repository, False)
        return {"names": names, "blobs": [*stored.get("blobs", ()), *seen["blobs"]]}

    def _stored(self, key: str) -> Record:
        with self._db.read() as txn:
            return txn.get(TABLE, key) or {}


class Witness:
    """A Fetcher that notes what its repository has shown, by digest.

    shown: what came whole. showing: what is coming whole; a download that goes on from bytes that were here shows nothing.
    """

    def __init__(
        self, fetcher: Fetcher, saw: Callable[[Digest], None] = lambda digest: None, unsee: Callable[[Digest], None] = lambda digest: None
    ) -> None:
        """saw: called with a blob that came whole. unsee: with one that turned out to be something else."""
        self._fetcher = fetcher
        self._saw = saw
        self._unsee = unsee
        self.shown: set[str] = set()
        self.showing: set[str] = set()
        self._others_took_credentials = False

    @property
    def took_credentials(self) -> bool:
        """See Fetcher."""
        return self._fetcher.took_credentials or self._others_took_credentials

    def joined(self, digest: str, *, took_credentials: bool) -> None:
        """Another caller with the same rights was shown a document."""
        self.shown.add(digest)
        self._others_took_credentials = self._others_took_credentials or took_credentials

    async def document(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """See Fetcher."""
        data = await self._fetcher.document(descriptor, limit=limit)
        self.shown.add(descriptor.digest)
        return data

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        """See Fetcher."""
        if sum(length for _, length in sink.missing()) != descriptor.size:
            return await self._fetcher.download(descriptor, sink)
        self.showing.add(descriptor.digest)
        try:
            source = await self._fetcher.download(descriptor, sink)
            self.shown.add(descriptor.digest)
            self._saw(descriptor.digest)
            return source
        finally:
            self.showing.discard(descriptor.digest)

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        """See Fetcher."""
        self.shown.discard(descriptor.digest)
        self._unsee(descriptor.digest)
        return await self._fetcher.rejected(descriptor, source)

    async def prove(self, blob: Descriptor, content: Provider, threads: Threads) -> None:
        """Have the repository show a blob that is stored here.

        Raises: PullFailed when it has none; PermissionDenied when it sends other bytes.
        """
        if blob.digest in self.shown:
            return
        offset = secrets.randbelow(max(1, blob.size - _SAMPLE + 1))
        sample = _Sample(offset, min(_SAMPLE, blob.size - offset))
        await self._fetcher.download(blob, sample)
        if bytes(sample.data) != await threads.run(_read, content, blob.digest, offset, len(sample.data)):
            raise PermissionDenied(f"the repository sends other bytes for {blob.digest}", hint="its image cannot be used here")
        self.shown.add(blob.digest)


class _Sample:
    """A BlobSink that misses one piece."""

    def __init__(self, offset: int, count: int) -> None:
        self._offset = offset
        self.data = bytearray(count)

    def missing(self) -> list[tuple[int, int]]:
        return [(self._offset, len(self.data))] if self.data else []

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        at = offset - self._offset
        self.data[at : at + len(data)] = data


def parts(image: Image) -> set[str]:
    """Digests of an image's blobs and names of its snapshots."""
    layers = [(layer.descriptor.digest, layer.snapshot) for layer in image.layers]
    return {*image.documents, *(part for layer in layers for part in layer if part)}


def _is_digest(key: str) -> bool:
    return not key.startswith("sealed-")


def _read(content: Provider, digest: Digest, offset: int, count: int) -> bytes:
    with content.reader(digest) as reader:
        return reader.read_at(offset, count)


def _changed(record: Record, repository: str, anonymous: bool, blob: Digest | None) -> bool:
    known = record.get("names", {}).get(repository)
    return known is None or (anonymous and not known) or (blob is not None and blob not in record.get("blobs", ()))


def _note(txn: WriteTxn, repository: str, shown: Iterable[str], anonymous: bool, blobs: Mapping[str, Digest]) -> None:
    for key in shown:
        record = txn.get(TABLE, key) or {}
        blob = blobs.get(key)
        if not _changed(record, repository, anonymous, blob):
            continue
        names = dict(record.get("names", {}))
        names[repository] = anonymous or names.get(repository, False)
        known = list(record.get("blobs", ()))
        txn.put(TABLE, key, {"names": names, "blobs": known + [blob] * (blob is not None and blob not in known)})
