"""The mirror endpoint as a cache: what is not here is fetched from the registry, and streamed on while it is stored.

A tag is always asked of the registry, since only it knows where the tag stands; when it cannot be asked, what is here
answers. Everything below a manifest is fetched by digest and only after somebody asked for that manifest here, so that
sizes are known and nobody can make this node fetch arbitrary blobs. What was asked for stays for `keep` after the last
time, under a lease; nothing is unpacked.

Blobs are sent on before their digest is known to be right, but for the last HOLD_BACK bytes: a client never gets a whole
blob that is wrong. They need not wait until our copy is on disk, which is nothing to the client. Clients check digests themselves in any case.

An image that takes this node's credentials is private (see mirror). Policies are asked about the manifest that a tag or
a digest stands for, and what it refers to is allowed with it.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final

from imgsvc.blobs import Blobs
from imgsvc.concurrency import Threads
from imgsvc.content.interfaces import Store
from imgsvc.content.verify import read_verified
from imgsvc.errors import NotFound
from imgsvc.http1 import FileBody, StreamBody
from imgsvc.leases import LeaseManager
from imgsvc.oci import KIB, MAX_DOCUMENT, Descriptor, Digest, Index, parse_document
from imgsvc.pull import Verifier
from imgsvc.reference import Reference
from imgsvc.registry.interfaces import Registry, Resolved

MAX_KNOWN: Final = 100_000  # parts of manifests that were asked for here; some 300 bytes each
HOLD_BACK: Final = 64 * KIB  # [bytes] sent only after the whole blob is verified


@dataclass(frozen=True, slots=True)
class Known:
    """A part of something that was asked for: by whose credentials it was found."""

    descriptor: Descriptor
    private: bool


class PullThrough:
    """Fetches on behalf of a Mirror. namespaces: registries this is done for; keep: how long things stay after use."""

    def __init__(
        self,
        *,
        namespaces: Sequence[str],
        keep: timedelta,
        registry: Registry,
        blobs: Blobs,
        content: Store,
        leases: LeaseManager,
        threads: Threads,
        verifier: Verifier,
    ) -> None:
        self._namespaces = frozenset(namespaces)
        self._keep = keep
        self._registry = registry
        self._blobs = blobs
        self._content = content
        self._leases = leases
        self._threads = threads
        self._verifier = verifier
        self._known: OrderedDict[tuple[str, Digest], Known] = OrderedDict()

    def covers(self, name: Reference) -> bool:
        """Whether a repository's registry is one of ours."""
        return name.host in self._namespaces

    async def manifest(self, reference: Reference, *, private: bool) -> tuple[Digest, bytes]:
        """A manifest or index by tag or digest, stored and kept.

        Args: private: whether the client may have what takes credentials.
        Raises: NotFound, PullFailed, PermissionDenied (policy), InvalidArgument.
        """
        known = self._known.get((reference.name, reference.digest)) if reference.digest else None
        if known is None:
            resolved = await self._registry.resolve(reference, None)
            known = Known(resolved.descriptor, _took_credentials(resolved))
            _allow(known, reference, private=private)
            await self._verifier.verify(reference, resolved.descriptor, None)
        _allow(known, reference, private=private)
        return known.descriptor.digest, await self._bring(reference, known)

    async def _bring(self, reference: Reference, known: Known) -> bytes:
        """The document itself; what it refers to becomes known, and all of it is leased before anything is stored."""
        digest = known.descriptor.digest
        lease = f"mirror {digest}"
        await self._leases.hold([("content", digest)], lease_id=lease, expires_in=self._keep, purpose=f"mirror {reference.name}")
        if await self._threads.run(self._content.info, digest) is not None:
            data = await self._threads.run(read_verified, self._content, digest, MAX_DOCUMENT)
        else:
            data = await self._registry.fetcher(reference, None).document(known.descriptor, limit=MAX_DOCUMENT)
            await self._threads.run(_store, self._content, digest, data)
        document = parse_document(data, known.descriptor.media_type, str(reference))
        parts = document.manifests if isinstance(document, Index) else (document.config, *document.layers)
        if not isinstance(document, Index):
            await self._leases.add(lease, [("content", part.digest) for part in parts])
        await self._leases.renew(lease, self._keep)
        for part in (known.descriptor, *parts):
            self._remember(reference, Known(part, known.private))
        return data

    def _remember(self, reference: Reference, known: Known) -> None:
        key = (reference.name, known.descriptor.digest)
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def blob(self, name: Reference, digest: Digest, *, private: bool) -> Descriptor:
        """The blob's descriptor. Raises: NotFound when no manifest with it was asked for here."""
        known = self._known.get((name.name, digest))
        if known is None:
            raise NotFound(f"no manifest with {digest} was asked for here", hint="ask for the manifest first")
        _allow(known, name, private=private)
        return known.descriptor

    async def stream(self, name: Reference, blob: Descriptor, offset: int, count: int) -> StreamBody:
        """Part of a blob that is not here, while it comes in. Raises: PullFailed when nobody has it."""
        stream = _BlobStream(self._blobs, self._registry, self._threads, name, blob, offset, count)
        try:
            await stream.open()
        except BaseException:
            await stream.aclose()
            raise
        return StreamBody(stream, count)


class _BlobStream:
    """The bytes of a growing blob, as an asynchronous iterator that gives its share of the download back when closed."""

    def __init__(
        self, blobs: Blobs, registry: Registry, threads: Threads, name: Reference, blob: Descriptor, offset: int, count: int
    ) -> None:
        self._blobs = blobs
        self._threads = threads
        self._blob = blob
        self._at, self._end = offset, offset + count
        self._available = 0
        self._news = asyncio.Event()
        self._fd = -1
        self._held = ExitStack()
        self._growing = self._held.enter_context(blobs.growing.use(blob.digest))
        self._fetch = asyncio.ensure_future(blobs.fetch(registry.fetcher(name, None), blob, lambda available: None))
        self._fetch.add_done_callback(lambda _: self._news.set())

    async def open(self) -> None:
        """Wait until there is something to read from. Raises: as Blobs.fetch."""
        opened = asyncio.ensure_future(self._growing.opened.wait())
        await asyncio.wait([opened, self._fetch], return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
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
        if self._growing.verified:
            return self._blob.size
        if self._fetch.done() and not self._fetch.cancelled() and self._fetch.exception() is None:
            return self._blob.size
        return min(self._available, self._blob.size - HOLD_BACK)

    async def aclose(self) -> None:
        """Leave the download; the last to leave stops it, and its bytes stay for the next one."""
        self._fetch.cancel()
        await asyncio.wait([self._fetch])
        self._held.close()


def _allow(known: Known, reference: Reference, *, private: bool) -> None:
    if known.private and not private:
        raise NotFound(f"{reference} is not for everybody")


def _took_credentials(resolved: Resolved) -> bool:
    return any(a.credential not in ("", "none") and not a.credential.startswith("withheld") for a in resolved.attempts)


def _store(content: Store, digest: Digest, data: bytes) -> None:
    writer = content.writer(f"mirror-{digest}", total=len(data), expected=digest)
    try:
        writer.write(data)
        writer.commit(len(data), digest)
    finally:
        writer.close()
