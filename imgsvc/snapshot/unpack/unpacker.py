"""The daemon's side of unpacking: starts the worker server, hands out jobs, waits for verdicts. All on the event loop.

A job's slot is held from start() to the end of finish() or abort(), so that max_concurrent_unpacks bounds processes.
What a layer leaves to settle() is in a memfd that only workers write and read.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from imgsvc.base import errors, failpoints, kernel
from imgsvc.base.children import Companion
from imgsvc.base.concurrency import Slots
from imgsvc.base.errors import Cancelled, DataLoss, Internal, Unavailable
from imgsvc.base.oci import MIB, Digest
from imgsvc.snapshot.interfaces import COUNT, STREAM, Applied, LayerInput, Limits, Mount, Unpacker, Usage
from imgsvc.snapshot.unpack.messages import (
    Failed,
    LayerBytes,
    Merge,
    Merged,
    Record,
    Request,
    Settle,
    Settled,
    Unpack,
    Unpacked,
    Verdict,
    pack_request,
    unpack_verdict,
)

log = logging.getLogger(__name__)

V = TypeVar("V", Unpacked, Settled, Merged)

_PROCESSORS: Final = len(os.sched_getaffinity(0))
_MAX_FDS: Final = 200  # with one message; the kernel takes 253
_VERDICT_LIMIT: Final = 64 * 1024  # [bytes]
_SPEED: Final = 40 * MIB  # [bytes/s], about, of a stored layer. What takes long begins first, unless others wait for longer than that


class DiffIDMismatch(DataLoss):
    """The layer is not the one its image's configuration names."""

    def __init__(self, layer: Digest, expected: Digest, found: Digest) -> None:
        super().__init__(f"the layer unpacks to {found}, its image says {expected}", where=str(layer))
        self.expected = expected
        self.found = found


class WorkerKilled(Unavailable):
    """A worker ended without a verdict: it was killed from outside."""

    def __init__(self, subject: str) -> None:
        super().__init__(
            "the unpack worker was killed",
            where=subject,
            hint="look for the out-of-memory killer in the kernel log, then pull again",
        )


class _Worker:
    """One child of the worker server: its job socket and its process."""

    def __init__(self, subject: str, job: socket.socket, pidfd: int) -> None:
        self._subject = subject
        self._job = job
        self._pidfd = pidfd
        self._unsent: int | None = None

    def give(self, subject: str, request: Request, fds: Sequence[int]) -> None:
        """Send an order and its descriptors. Raises: WorkerKilled when the worker is gone."""
        self._subject = subject
        self._send(pack_request(request), fds)

    async def give_more(self, fds: Sequence[int]) -> None:
        """Further descriptors for a request, in as many messages as they take. Raises: WorkerKilled."""
        for start in range(0, len(fds), _MAX_FDS):
            self._send(bytes(COUNT), fds[start : start + _MAX_FDS])
            await asyncio.sleep(0)

    def _send(self, message: bytes, fds: Sequence[int]) -> None:
        try:
            self._job.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        except OSError as error:
            raise WorkerKilled(self._subject) from error

    def advance(self, available: int) -> None:
        """Send a count; when the socket is full, only the newest one is sent later."""
        if self._unsent is not None:
            self._unsent = available
            return
        try:
            self._job.send(available.to_bytes(COUNT, "big"))
        except BlockingIOError:
            self._unsent = available
            asyncio.get_running_loop().add_writer(self._job, self._send_later)
        except OSError:
            pass  # the worker has died; finish() reports it

    def _send_later(self) -> None:
        asyncio.get_running_loop().remove_writer(self._job)
        available, self._unsent = self._unsent, None
        if available is not None:
            self.advance(available)

    async def verdict(self, progress: Callable[[int], None] = lambda count: None) -> Verdict:
        """Wait for the worker's answer, and tell how far it is until then. Raises: WorkerKilled when it died without one."""
        while len(data := await self._receive()) == COUNT:
            progress(int.from_bytes(data, "big"))
        if not data:
            raise WorkerKilled(self._subject)
        return unpack_verdict(data)

    async def _receive(self) -> bytes:
        """The worker's next message, b"" when there will be none."""
        loop = asyncio.get_running_loop()
        data = b""
        for _ in range(2):
            # A worker that ends with counts unread, as one on a pipe does, resets the connection: Linux reports that
            # first, and hands out the verdict that is queued when asked again.
            with contextlib.suppress(ConnectionError):
                data = await loop.sock_recv(self._job, _VERDICT_LIMIT)
                break
        return data

    def dismiss(self) -> None:
        """Let a process that has nothing to do end by itself."""
        os.close(self._pidfd)
        self._job.close()

    async def end(self) -> None:
        """Kill the process if it still runs, and wait until it is gone: nothing writes to the snapshot afterwards."""
        if self._pidfd < 0:
            return
        pidfd, self._pidfd = self._pidfd, -1
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        loop.add_reader(pidfd, _resolve, gone)
        try:
            await asyncio.shield(gone)
        finally:
            loop.remove_reader(pidfd)
            loop.remove_writer(self._job)
            os.close(pidfd)
            self._job.close()


class WorkerJob:
    """An UnpackJob. journal: memfd with what is left to settle."""

    def __init__(self, owner: WorkerUnpacker, layer: LayerInput, mounts: Sequence[Mount], request: Unpack | Record, source: int) -> None:
        self.layer = layer
        self.mounts = mounts
        self.request = request
        self.source = source
        self.journal = os.memfd_create("imgsvc-journal", os.MFD_CLOEXEC)
        self.usage: Usage | None = None
        self._owner = owner
        owner.opened()
        self._taken = contextlib.ExitStack()  # what is given back with the worker
        self._worker: _Worker | None = None
        self._available = 0

    async def begin(self) -> None:
        """Take a slot and a worker."""
        began = time.monotonic()
        slots = self._owner.slots
        with contextlib.ExitStack() as taken:
            taken.enter_context(self._owner.one_more())
            await slots.acquire(began - self.layer.size / _SPEED)
            taken.callback(slots.release)
            self._owner.queued(time.monotonic() - began)
            with contextlib.ExitStack() as opened:
                self._worker = await self._owner.spawn(_subject(self.layer), self.request, self._descriptors(opened))
            self._taken = taken.pop_all()
        self._worker.advance(self._available)

    def _descriptors(self, opened: contextlib.ExitStack) -> list[int]:
        """What the worker gets with its request; files of a stream are created here, so that it needs no directory."""
        spare_cpu = self._owner.spare_cpu.fileno()
        if isinstance(self.request, Unpack):
            return [self.journal, self.source, spare_cpu]
        (stream,) = self.mounts
        return [_create(stream.value("index"), opened), self.source, spare_cpu, _create(stream.source, opened)]

    def advance(self, available: int) -> None:
        """Bytes [0, available) can be read now."""
        self._available = available
        if self._worker is not None:
            self._worker.advance(available)

    async def finish(self, progress: Callable[[int], None] = lambda count: None) -> Applied:
        """Wait for the verdict on the layer."""
        if self._worker is None:
            raise Cancelled("unpacking was stopped", where=str(self.layer.digest))
        try:
            verdict = _expected(Unpacked, await self._worker.verdict(progress), self.where)
        finally:
            await self._release()
        found = Digest(verdict.diff_id)
        if found != self.layer.diff_id:
            raise DiffIDMismatch(self.layer.digest, self.layer.diff_id, found)
        if verdict.warnings:
            log.warning("layer %s: left out: %s", self.layer.digest, verdict.warnings)
        self.usage = Usage(verdict.size, verdict.inodes) if self.is_rebased else None
        return Applied(
            diff_id=found,
            unpacked=verdict.unpacked,
            entries=verdict.entries,
            usage=self.usage,
            timings=verdict.timings,
            warnings=verdict.warnings,
            peak_memory=verdict.peak_memory,
        )

    async def settle(self, mounts: Sequence[Mount]) -> Usage | None:
        """See UnpackJob."""
        return await self._owner.settle(mounts, self)

    @property
    def is_rebased(self) -> bool:
        """Whether the layer was unpacked without its parents."""
        return isinstance(self.request, Unpack) and self.request.rebase

    @property
    def where(self) -> str:
        """For errors: the layer, and where its files are written."""
        return f"{_subject(self.layer)} in {_directory(self.mounts)}"

    async def abort(self) -> None:
        """Kill the worker and give everything back."""
        await self._release()
        self.close()

    def close(self) -> None:
        """Give descriptors back. Idempotent."""
        if self.journal >= 0:
            os.close(self.journal)
            os.close(self.source)
            self._owner.closed()
        self.journal = self.source = -1

    async def _release(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with self._taken:
                await worker.end()


class WorkerUnpacker:
    """An Unpacker over one worker server, which is started on first use and again if it should die."""

    def __init__(
        self, *, max_concurrent: int, limits: Limits, transform: str = "", queued: Callable[[float], None] = lambda seconds: None
    ) -> None:
        """transform: "module:function" giving a decrypting StreamTransform for LayerInput.secret, "" for none.

        queued: called with the time each layer waited for its slot [s].
        """
        self.queued = queued
        self._max_concurrent = 0
        self._working = 0  # jobs that have a worker or wait for one
        # What workers see of that; they may write it, and mislead one another. An object, whose closed descriptor is never another file's.
        self.spare_cpu = os.fdopen(kernel.fixed_memory("imgsvc-spare-cpu", 1), "r+b", buffering=0)
        self.configure(max_concurrent, limits)
        environment = {name: value for name, value in os.environ.items() if name == failpoints.ENV}  # and nothing of the daemon's own
        self._server = Companion("imgsvc.snapshot.unpack.worker", transform, environment=environment)
        self._lock = asyncio.Lock()
        self._open = 0  # jobs
        self._settlers: list[_Worker] = []  # that wait for the next layer to settle; while there are jobs

    def configure(self, max_concurrent: int, limits: Limits) -> None:
        """Go by these from the next layer on; those that are being unpacked keep the slot they have."""
        if max_concurrent != self._max_concurrent:
            self.slots = Slots(max_concurrent)
            self._settling = asyncio.Semaphore(max_concurrent)  # short and last: not queued behind layers waiting for bytes
        self._max_concurrent = max_concurrent
        self._tell_spare_cpu()
        self._limits = limits

    async def warm(self) -> None:
        """Start the worker server now, so that the first layer does not wait for it. Raises: OSError."""
        async with self._lock:
            await self._server.connect()

    def is_wanted(self) -> bool:
        """See Unpacker."""
        return self.slots.is_wanted

    async def start(self, layer: LayerInput, mounts: Sequence[Mount], *, rebase: bool) -> WorkerJob:
        """See Unpacker."""
        of = LayerBytes(layer.media_type, layer.diff_id, layer.size, layer.secret, self._limits)
        request = Record(of) if mounts[0].type == STREAM else Unpack(of, tuple(mounts), rebase)
        job = WorkerJob(self, layer, mounts, request, os.dup(layer.source))
        try:
            await job.begin()
        except BaseException:
            job.close()
            raise
        return job

    async def settle(self, mounts: Sequence[Mount], job: WorkerJob) -> Usage | None:
        """As WorkerJob.settle, for that."""
        try:
            if not job.is_rebased or not os.fstat(job.journal).st_size:
                return job.usage  # nothing was left to do
            async with self._settling:
                verdict = await self._settled(_subject(job.layer), Settle(tuple(mounts)), job.journal)
            if isinstance(verdict, Failed) and verdict.needs_parents and stat.S_ISREG(os.fstat(job.source).st_mode):
                return await self._again(mounts, job)
            added = _expected(Settled, verdict, job.where)
            assert job.usage is not None
            return Usage(job.usage.size + added.size, job.usage.inodes + added.inodes)
        finally:
            job.close()

    async def _settled(self, subject: str, request: Settle, journal: int) -> Verdict:
        """The verdict of a process that settles; one that has done it may do it again."""
        worker = await self._settler(subject, request, journal)
        goes_on = False
        try:
            verdict = await worker.verdict()
            goes_on = isinstance(verdict, Settled)
        finally:
            if goes_on:
                self._settlers.append(worker)
            else:
                await worker.end()
        return verdict

    async def _settler(self, subject: str, request: Settle, journal: int) -> _Worker:
        """A process that has taken the request: one that waits for such, else a new one."""
        while self._settlers:
            worker = self._settlers.pop()
            try:
                worker.give(subject, request, [journal])
            except WorkerKilled:
                await worker.end()
            else:
                return worker
        return await self.spawn(subject, request, [journal])

    def opened(self) -> None:
        """A job has begun its life."""
        self._open += 1

    def closed(self) -> None:
        """A job has ended; after the last one there is nothing left to settle."""
        self._open -= 1
        while not self._open and self._settlers:
            self._settlers.pop().dismiss()

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Count a job, for as long as it waits for a worker or has one."""
        self._working += 1
        self._tell_spare_cpu()
        try:
            yield
        finally:
            self._working -= 1
            self._tell_spare_cpu()

    def _tell_spare_cpu(self) -> None:
        if not self.spare_cpu.closed:
            os.pwrite(self.spare_cpu.fileno(), b"\1" if min(self._working, self._max_concurrent) < _PROCESSORS else b"\0", 0)

    async def _again(self, mounts: Sequence[Mount], job: WorkerJob) -> Usage | None:
        """Unpack the layer once more, in place on its mounted parents."""
        request = Unpack(job.request.layer, tuple(mounts), rebase=False, wipe=True)
        again = WorkerJob(self, job.layer, mounts, request, os.dup(job.source))
        try:
            await again.begin()
            again.advance(job.layer.size)
            return (await again.finish()).usage
        finally:
            await again.abort()

    async def close(self) -> None:
        """Stop the server; its children die with it."""
        while self._settlers:
            self._settlers.pop().dismiss()
        async with self._lock:
            self._server.stop()
        self.spare_cpu.close()

    async def merge(self, layers: Sequence[tuple[int, int]], output: int) -> None:
        """Write the EROFS image of layers, base first, given as descriptors of tar stream and index, to `output`, and sync it.

        Raises: BadLayer, DataLoss, ResourceExhausted; Unavailable (the worker was killed).
        """
        subject = "the image of its layers"
        async with self._settling:
            worker = await self.spawn(subject, Merge(len(layers)), [output])
            try:
                await worker.give_more([fd for layer in layers for fd in layer])
                verdict = _expected(Merged, await worker.verdict(), subject)
            finally:
                await worker.end()
        if verdict.warnings:
            log.warning("an image of %d layers: left out: %s", len(layers), verdict.warnings)

    async def spawn(self, subject: str, request: Request, fds: Sequence[int]) -> _Worker:
        """A new worker process with a request. Raises: Unavailable when none can be started, or when it died at once."""
        ours, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with child_end:
                ours.setblocking(False)
                pidfd = await self._fork(child_end.fileno())
        except BaseException:
            ours.close()
            raise
        worker = _Worker(subject, ours, pidfd)
        try:
            worker.give(subject, request, fds)
        except BaseException:
            await worker.end()
            raise
        return worker

    async def _fork(self, job: int) -> int:
        # Shielded: an answer that is not read here would be taken for that of the next request.
        exchange = asyncio.ensure_future(self._exchange(os.dup(job)))
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            exchange.add_done_callback(lambda done: None if done.exception() else os.close(done.result()))
            raise

    async def _exchange(self, job: int) -> int:
        """Ask the server for a child with a job socket; its pidfd. Closes `job`."""
        try:
            async with self._lock:
                for last in (False, True):
                    try:
                        control = await self._server.connect()
                        control.sendmsg([b"job"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [job]))])
                        return await _receive_fd(control)
                    except OSError as error:
                        self._server.stop()
                        if last:
                            raise Unavailable("the unpack worker server does not answer", where=sys.executable) from error
            raise AssertionError
        finally:
            os.close(job)


def unpacker(max_concurrent: int, limits: Limits, transform: str = "") -> Unpacker:
    """A WorkerUnpacker as the use cases see it."""
    return WorkerUnpacker(max_concurrent=max_concurrent, limits=limits, transform=transform)


async def _receive_fd(control: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(control, _resolve, readable)
    try:
        await readable
    finally:
        loop.remove_reader(control)
    _, fds, _, _ = socket.recv_fds(control, 16, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise ConnectionResetError("the worker server has ended")
    return fds[0]


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _directory(mounts: Sequence[Mount]) -> str:
    """Where files are written, for errors: a full disk is a place, not a digest."""
    upper = [upper for mount in mounts if (upper := mount.value("upperdir"))]
    return upper[0] if upper else mounts[-1].source if mounts else "its snapshot"


def _expected(kind: type[V], verdict: Verdict, where: str) -> V:
    """The verdict, or the error in it. where: for errors, in place of the worker's own."""
    if isinstance(verdict, Failed):
        raise type(verdict.error)(verdict.error.what, where=where, hint=verdict.error.hint)
    if not isinstance(verdict, kind):
        raise Internal(f"the worker answered with {type(verdict).__name__}", where=where)
    return verdict


def _subject(layer: LayerInput) -> str:
    return f"layer {layer.digest}"


def _create(path: str, opened: contextlib.ExitStack) -> int:
    """A new file for a worker to write. Raises: by cause, as from_os_error."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, "creating a file of a layer", where=path) from error
    opened.callback(os.close, fd)
    return fd
