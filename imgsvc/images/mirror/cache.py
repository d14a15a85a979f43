"""The mirror endpoint as a cache: what is not stored is fetched from the registry, and streamed on while it arrives.

A tag is always looked up at the registry, since only it knows what the tag names; when the registry is unreachable, what is stored
answers: the manifest of a tag is kept in the metadata, so that a restart changes nothing. Everything below a manifest
is fetched by digest, and only after a client asked for that manifest here, so that
sizes are known and clients cannot make this node fetch arbitrary blobs. What was asked for stays for `keep` after the last
time, under a lease; nothing is unpacked.

Blobs are sent on before their digest is known to be right, but for the last HOLD_BACK bytes: a client never gets a whole
blob that is wrong. They need not wait until our copy is on disk, which is nothing to the client. Clients check digests themselves in any case.

An image that takes this node's credentials is private (see mirror). Policies are asked about the manifest that a tag or
a digest names, every time; what it refers to is allowed with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Final

from imgsvc.base.concurrency import Shared, Threads, stop_tasks, time_limit, to_the_end
from imgsvc.base.errors import NotFound
from imgsvc.base.http1 import FileBody, StreamBody
from imgsvc.base.metadb.database import MetaDB, Record
from imgsvc.base.oci import KIB, Descriptor, Digest, Index, parse_document
from imgsvc.base.reference import Reference
from imgsvc.images.documents import Documents
from imgsvc.images.downloads import Blobs
from imgsvc.images.provenance import Provenance, Witness
from imgsvc.images.pull import Verifier
from imgsvc.images.storage import Storage
from imgsvc.registry.interfaces import PullFailed, Registry, Resolved

log = logging.getLogger(__name__)

TABLE: Final = "mirror"
STALE_AFTER_S: Final = 1.0  # with an older answer at hand, a registry that asks to wait is not waited for
MAX_KNOWN: Final = 100_000  # parts of manifests that were asked for here; some 300 bytes each
HOLD_BACK: Final = 64 * KIB  # [bytes] sent only after the whole blob is verified


@dataclass(frozen=True, slots=True)
class Known:
    """A part of something that was asked for. private: credentials were needed to find it; within: the manifest policies judge."""

    descriptor: Descriptor
    private: bool
    within: Descriptor


class _Coming:
    """A blob that streams of one repository wait for together. witness: of the first of them."""

    witness: Witness | None = None


class PullThrough:
    """Fetches on behalf of a Mirror. namespaces: registries to fetch from; keep: how long content stays after its last use."""

    def __init__(
        self,
        *,
        namespaces: Sequence[str],
        keep: timedelta,
        registry: Registry,
        blobs: Blobs,
        documents: Documents,
        provenance: Provenance,
        storage: Storage,
        verifier: Verifier,
        db: MetaDB,
    ) -> None:
        self.fetch_for(namespaces, keep)
        self._registry = registry
        self._blobs = blobs
        self._documents = documents
        self._provenance = provenance
        self._content = storage.content
        self._leases = storage.leases
        self._threads = storage.threads
        self._verifier = verifier
        self._db = db
        self._coming: Shared[_Coming] = Shared(_Coming)
        self._known: OrderedDict[tuple[str, Digest], Known] = OrderedDict()
        with db.read() as txn:
            self._kept = {name: _decode(record) for name, record in txn.items(TABLE)}  # by tag and by digest, what was served

    async def tidy(self) -> None:
        """Forget what is no longer stored."""
        stored = await self._threads.run(lambda: {n for n, known in self._kept.items() if self._content.info(known.descriptor.digest)})
        gone = [name for name in self._kept if name not in stored]
        for name in gone:
            del self._kept[name]
        if gone:
            await self._db.awrite(lambda txn: [txn.delete(TABLE, name) for name in gone])

    def fetch_for(self, namespaces: Iterable[str], keep: timedelta) -> None:
        """Change which registries are fetched from, and for how long what is fetched stays."""
        self._namespaces = frozenset(namespaces)
        self._keep = keep

    def covers(self, name: Reference) -> bool:
        """Whether a repository's registry is one of ours."""
        return name.host in self._namespaces

    async def manifest(self, reference: Reference, *, private: bool) -> tuple[Digest, bytes]:
        """A manifest or index by tag or digest, stored and kept.

        Args: private: whether the client may have what takes credentials.
        Raises: NotFound, PullFailed, PermissionDenied (policy), InvalidArgument.
        """
        known = await self._look_up(reference)
        _allow(known, reference, private=private)
        judged = reference if known.within == known.descriptor else reference.with_digest(known.within.digest)
        await self._verifier.verify(judged, known.within, None)
        known, data = await self._bring(reference, known)
        _allow(known, reference, private=private)
        await self._keep_name(str(reference), known)
        return known.descriptor.digest, data

    async def _look_up(self, reference: Reference) -> Known:
        """By digest as it is known here, by tag as the registry says, or as it said last when it does not answer."""
        if reference.digest and (known := self._known.get((reference.name, reference.digest)) or await self._still(reference)):
            return known
        kept = await self._still(reference)
        try:
            async with time_limit(STALE_AFTER_S) if kept else contextlib.nullcontext():
                resolved = await self._registry.resolve(reference, None)
        except (PullFailed, TimeoutError) as error:
            if kept is None or (isinstance(error, PullFailed) and not error.retryable):
                raise
            log.warning(
                "mirror: what was fetched earlier answers: %s",
                error if isinstance(error, PullFailed) else f"no answer within {STALE_AFTER_S} s",
            )
            return kept
        return Known(resolved.descriptor, _took_credentials(resolved), resolved.descriptor)

    async def _still(self, reference: Reference) -> Known | None:
        """What was served under this name, if it is stored."""
        known = self._kept.get(str(reference))
        if known is None or await self._threads.run(self._content.info, known.descriptor.digest) is None:
            return None
        return known

    async def _keep_name(self, name: str, known: Known) -> None:
        if self._kept.get(name) != known:
            self._kept[name] = known
            await self._db.awrite(lambda txn: txn.put(TABLE, name, _encode(known)))

    async def _bring(self, reference: Reference, known: Known) -> tuple[Known, bytes]:
        """The document itself, and whether it is private; what it refers to becomes known, and all of it is leased before anything is stored."""
        digest = known.descriptor.digest
        lease = f"mirror {digest}"
        await self._leases.hold([("content", digest)], lease_id=lease, expires_in=self._keep, purpose=f"mirror {reference.name}")
        witness = Witness(self._registry.fetcher(reference, None))
        data = await self._documents.get(reference.name, "", known.descriptor, witness, anonymous=not known.private)
        await self._documents.put(known.descriptor, data)
        known = replace(known, private=known.private or witness.took_credentials)
        await self._provenance.record(reference.name, [digest], anonymous=not known.private)
        document = parse_document(data, known.descriptor.media_type, str(reference))
        parts = document.manifests if isinstance(document, Index) else (document.config, *document.layers)
        if not isinstance(document, Index):
            await self._leases.add(lease, [("content", part.digest) for part in parts])
        await self._leases.renew(lease, self._keep)
        for part in (known.descriptor, *parts):
            self._remember(reference, Known(part, known.private, known.within))
        return known, data

    def _remember(self, reference: Reference, known: Known) -> None:
        key = (reference.name, known.descriptor.digest)
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def blob(self, name: Reference, digest: Digest, *, private: bool) -> Descriptor:
        """The descriptor of a blob, which is served if it is stored: then its repository has shown it, or it is public.

        Raises: NotFound when no manifest with it was asked for here; PullFailed, PermissionDenied when the repository has not got it.
        """
        known = self._known.get((name.name, digest))
        if known is None:
            raise NotFound(f"no manifest with {digest} was asked for here", hint="ask for the manifest first")
        _allow(known, name, private=private)
        if await self._threads.run(self._content.info, digest) is not None:
            await self._show(name, known.descriptor, Witness(self._registry.fetcher(name, None)), private=known.private, trusted=private)
        return known.descriptor

    async def _show(self, name: Reference, blob: Descriptor, witness: Witness, *, private: bool, trusted: bool) -> None:
        """Have a repository show a stored blob, unless it has or the blob is public."""
        if self._provenance.may_use(name.name, blob.digest, anonymous=not private):
            return
        await witness.prove(blob, self._content, self._threads)
        await self._provenance.record(name.name, [blob.digest], anonymous=not (private or witness.took_credentials))
        if witness.took_credentials and not trusted:
            raise NotFound(f"{name} is private")

    async def stream(self, name: Reference, blob: Descriptor, offset: int, count: int, *, private: bool) -> StreamBody:
        """Part of a blob that is not stored, while it arrives. private: whether the client may have what takes credentials.

        Raises: PullFailed when no endpoint has it; NotFound.
        """
        known = self._known[name.name, blob.digest]
        held = ExitStack()
        sharing = held.enter_context(self._coming.use(f"{name.name}\0{blob.digest}"))
        witness = sharing.witness = sharing.witness or Witness(self._registry.fetcher(name, None))

        async def show() -> None:
            await self._show(name, blob, witness, private=known.private, trusted=private)

        def is_ours() -> bool:
            return (blob.digest in witness.showing or blob.digest in witness.shown) and (private or not witness.took_credentials)

        stream = _BlobStream(self._blobs, self._threads, witness, blob, offset, count, is_ours, show, held)
        try:
            await stream.open()
        except BaseException:
            await stream.aclose()
            raise
        return StreamBody(stream, count)


class _BlobStream:
    """The bytes of a growing blob, as an asynchronous iterator that gives its share of the download back when closed."""

    def __init__(
        self,
        blobs: Blobs,
        threads: Threads,
        witness: Witness,
        blob: Descriptor,
        offset: int,
        count: int,
        is_ours: Callable[[], bool],
        show: Callable[[], Coroutine[Any, Any, None]],
        held: ExitStack,
    ) -> None:
        """is_ours: whether the bytes that grow come whole from the repository; show: have it show them once they are stored.

        held: closed with the stream.
        """
        self._is_ours = is_ours
        self._show = show
        self._shown = False
        self._blobs = blobs
        self._threads = threads
        self._blob = blob
        self._at, self._end = offset, offset + count
        self._available = 0
        self._news = asyncio.Event()
        self._fd = -1
        self._held = held
        self._growing = self._held.enter_context(blobs.growing.use(blob.digest))
        self._fetch = asyncio.ensure_future(self._bring(witness))
        self._fetch.add_done_callback(lambda _: self._news.set())

    async def _bring(self, witness: Witness) -> None:
        try:
            await self._blobs.fetch(witness, self._blob, lambda available: None)
        finally:
            # A client that has its last byte leaves while our copy is being put on disk.
            if self._blob.digest in witness.shown and await to_the_end(self._threads.run(self._blobs.has, self._blob.digest)):
                await to_the_end(self._show())
        await self._show()
        self._shown = True

    async def open(self) -> None:
        """Wait until there is something to read from. Raises: as Blobs.fetch."""
        opened = asyncio.ensure_future(self._growing.opened.wait())
        await asyncio.wait([opened, self._fetch], return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
        if not self._is_ours():
            await asyncio.wait([self._fetch])  # another client's fetch is not for this client before its digest is proven
        if self._fetch.done():
            await self._fetch
            reopening = self._threads.holding(partial(self._blobs.stored_fd, self._blob.digest), os.close)
            async with reopening as stored:
                self._fd = os.dup(stored)
        else:
            self._fd = self._growing.duplicate()
            self._growing.follow(self)
            self._held.callback(self._growing.leave, self)
        self._held.callback(os.close, self._fd)

    def advance(self, available: int) -> None:
        """Told by the growing blob."""
        self._available = available
        self._news.set()

    def __aiter__(self) -> _BlobStream:
        return self

    async def __anext__(self) -> FileBody:
        if self._at >= self._end:
            raise StopAsyncIteration
        while (limit := min(self._end, self._readable())) <= self._at:
            self._news.clear()
            if self._fetch.done():
                await self._fetch
                continue
            await self._news.wait()
        part = FileBody(self._fd, self._at, limit - self._at)
        self._at = limit
        return part

    def _readable(self) -> int:
        """How much may be sent on by now."""
        if self._shown:
            return self._blob.size
        if not self._is_ours():
            return 0
        if self._growing.verified:
            return self._blob.size
        return min(self._available, self._blob.size - HOLD_BACK)

    async def aclose(self) -> None:
        """Leave the download; the last to leave stops it, and its bytes stay for the next one."""
        await stop_tasks(self._fetch)
        self._held.close()


def _allow(known: Known, reference: Reference, *, private: bool) -> None:
    if known.private and not private:
        raise NotFound(f"{reference} is private")


def _took_credentials(resolved: Resolved) -> bool:
    return any(a.credential.taken for a in resolved.attempts)


def _encode(known: Known) -> Record:
    return {"target": known.descriptor.to_json(), "private": known.private, "within": known.within.to_json()}


def _decode(record: Record) -> Known:
    return Known(Descriptor.from_json(record["target"]), record["private"], Descriptor.from_json(record["within"]))
