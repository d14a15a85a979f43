"""Bringing blobs in: one download per digest, however many ask, and followers that read while it grows."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

from imgsvc.base.concurrency import Shared, SingleFlight, Threads
from imgsvc.base.errors import DataLoss, Unavailable
from imgsvc.base.failpoints import afailpoint
from imgsvc.base.oci import MIB, Descriptor, Digest
from imgsvc.content.interfaces import Store, Writer
from imgsvc.content.verify import DigestMismatch, SizeMismatch
from imgsvc.registry.interfaces import BlobSource, Fetcher, PullFailed

log = logging.getLogger(__name__)


class WrongBytes(DataLoss):
    """A download gave other bytes than the digest names. elsewhere: whether another endpoint can be asked."""

    def __init__(self, cause: DataLoss, source: BlobSource, *, elsewhere: bool) -> None:
        served = ", ".join(source.by_endpoint) or "bytes kept from an earlier try"
        super().__init__(cause.what, where=served, hint="nothing of it was kept; inform the operator of that registry or mirror")
        self.source = source
        self.elsewhere = elsewhere


Progress = Callable[[int], None]  # told how many bytes, from the start and without a gap, are here


class Follower(Protocol):
    """Reads a blob while it arrives: an unpack job, or the mirror's answer to a client."""

    def advance(self, available: int) -> None:
        """That many bytes, from the start and without a gap, can be read now."""


class GrowingBlob:
    """A blob on its way in: followers learn how many bytes, from the start and without a gap, can be read.

    They are not verified before the download's end; a follower that reads them earlier must not publish anything before that.
    """

    def __init__(self) -> None:
        self.available = 0
        self.verified = False
        self.opened = asyncio.Event()
        self._fd = -1
        self._followers: list[Follower] = []

    def open(self, fd: int, available: int) -> None:
        """The file exists; its descriptor is duplicated here and lives until close().

        A later attempt opens it again: followers of the failed one have failed with it.
        """
        self.close()
        self._followers.clear()
        self.verified = False
        self._fd = os.dup(fd)
        self.available = available
        self.opened.set()

    def follow(self, follower: Follower) -> None:
        """Tell `follower` what is there now and whenever there is more."""
        self._followers.append(follower)
        follower.advance(self.available)

    def leave(self, follower: Follower) -> None:
        """Tell it nothing more; absent is a success."""
        if follower in self._followers:
            self._followers.remove(follower)

    def grew(self, available: int) -> None:
        """More bytes from the start are readable."""
        if available > self.available:
            self.available = available
            for follower in self._followers:
                follower.advance(available)

    def prove(self, size: int) -> None:
        """All bytes are here and are what the digest says; they are not on disk yet."""
        self.verified = True
        for follower in self._followers:
            follower.advance(size)

    def duplicate(self) -> int:
        """A descriptor of the file for the caller to close."""
        return os.dup(self._fd)

    def close(self) -> None:
        """No more followers will come."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Feed:
    """A follower that passes a growing blob on through a pipe: the reader sees the bytes as they come, then the end.

    A thread moves them inside the kernel; it ends with the blob, with close(), and when the reader has gone.
    """

    def __init__(self, blob: int, size: int) -> None:
        """blob: descriptor of the growing file, not kept. size: of the whole blob [bytes]."""
        self._blob = os.dup(blob)
        self._size = size
        self._available = 0
        self._closed = False
        self._changed = threading.Condition()
        self.output, self._input = os.pipe()
        with contextlib.suppress(OSError):  # unprivileged users have a budget
            fcntl.fcntl(self._input, fcntl.F_SETPIPE_SZ, MIB)
        threading.Thread(target=self._run, name="feed", daemon=True).start()

    def advance(self, available: int) -> None:
        """See Follower."""
        with self._changed:
            self._available = available
            self._changed.notify()

    def detach(self) -> None:
        """Close our end: the reader has it now. Idempotent."""
        if self.output >= 0:
            os.close(self.output)
            self.output = -1

    def close(self) -> None:
        """Pass on nothing more. Idempotent."""
        self.detach()
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        sent = 0
        try:
            while sent < self._size and (ready := self._wait(sent)):
                moved = os.splice(self._blob, self._input, ready, offset_src=sent)
                if not moved:
                    break  # truncated meanwhile: the download that writes the file reports why
                sent += moved
        except BrokenPipeError:
            pass  # the reader's verdict says why
        except OSError as error:
            log.warning("a blob could not be read while it came in: %s", error)
        finally:
            os.close(self._blob)
            os.close(self._input)

    def _wait(self, sent: int) -> int:
        """How many more bytes there are; waits for some. 0 when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._available > sent)
            return 0 if self._closed else self._available - sent


class _Sink:
    """A download's way into the content store: one hop to a thread per write, then the followers are told."""

    def __init__(self, writer: Writer, blob: GrowingBlob, threads: Threads, progress: Progress) -> None:
        self._writer, self._blob, self._threads, self._progress = writer, blob, threads, progress

    def missing(self) -> list[tuple[int, int]]:
        return self._writer.missing()

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        available = await self._threads.run(self._write, offset, data)
        self._blob.grew(available)
        self._progress(available)

    def _write(self, offset: int, data: bytes | memoryview) -> int:
        self._writer.write_at(offset, data)
        return self._writer.status().offset


class Blobs:
    """Downloads into one content store. `growing` has, by digest, what is on its way in."""

    def __init__(self, content: Store, threads: Threads) -> None:
        self._content = content
        self._threads = threads
        self._flights: SingleFlight[BlobSource | None] = SingleFlight()
        self.growing: Shared[GrowingBlob] = Shared(GrowingBlob, GrowingBlob.close)

    async def fetch(self, fetcher: Fetcher, blob: Descriptor, progress: Progress) -> BlobSource | None:
        """Bring one blob into the content store, joining a running download of it.

        Returns:  who served it; None when it was here.
        Raises:   WrongBytes, PullFailed, ResourceExhausted.
        """
        return await self._flights.run(blob.digest, lambda: self._fetch(fetcher, blob, progress))

    async def bring(self, fetcher: Fetcher, blob: Descriptor, progress: Progress) -> BlobSource | None:
        """As fetch, with a second try at other endpoints when the first gave wrong bytes."""
        try:
            return await self.fetch(fetcher, blob, progress)
        except WrongBytes as error:
            if not error.elsewhere:
                raise
            log.warning("%s; asking elsewhere", error)
            try:
                return await self.fetch(fetcher, blob, progress)
            except PullFailed as second:
                raise DataLoss(f"{error.what}, and no other endpoint has it: {second.what}", where=error.where, hint=error.hint) from second

    async def _fetch(self, fetcher: Fetcher, blob: Descriptor, progress: Progress) -> BlobSource | None:
        # Checked inside the flight: another flight may end between a check outside and the start of this one.
        if await self._threads.run(self.has, blob.digest):
            return None
        return await self._download(fetcher, blob, progress)

    async def _download(self, fetcher: Fetcher, blob: Descriptor, progress: Progress) -> BlobSource:
        def open_ingest() -> Writer:
            return self._content.writer(_ingest_ref(blob.digest), total=blob.size, expected=blob.digest)

        with self.growing.use(blob.digest) as growing:
            async with self._threads.holding(open_ingest, lambda writer: writer.close()) as writer:
                growing.open(writer.fileno(), writer.status().offset)
                source = await fetcher.download(blob, _Sink(writer, growing, self._threads, progress))
                await afailpoint("layer.downloaded")
                loop = asyncio.get_running_loop()

                # Called on a thread once the digest is right and before the fsync, so that followers need not wait for the disk.
                def verified() -> None:
                    loop.call_soon_threadsafe(growing.prove, blob.size)

                try:
                    await self._threads.run(writer.commit, blob.size, blob.digest, verified=verified)
                except (DigestMismatch, SizeMismatch) as error:  # but not a failed disk, which no other endpoint can help
                    raise WrongBytes(error, source, elsewhere=await fetcher.rejected(blob, source)) from error
                growing.grew(blob.size)
                return source

    def drop_partial(self, digest: Digest) -> None:
        """Give back the bytes of a download that will not be resumed, unless a writer is using them. Blocking."""
        with contextlib.suppress(Unavailable):
            self._content.abort(_ingest_ref(digest))

    def has(self, digest: Digest) -> bool:
        """Whether a blob is stored. Blocking."""
        return self._content.info(digest) is not None

    def stored_fd(self, digest: Digest) -> int:
        """A descriptor of a stored blob for the caller to close. Blocking."""
        with self._content.reader(digest) as reader:
            return os.dup(reader.fileno())


def _ingest_ref(digest: Digest) -> str:
    return f"layer-{digest}"
