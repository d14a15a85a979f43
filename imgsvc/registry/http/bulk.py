"""Requests whose answers are large, made by a process of its own: the daemon's side, an httpx transport like transport.Transport.

The process is started on first use, or by warm(), and again if it should die. It has its own connections; what is asked of
which host, with which credential, is decided here. A lot of a body is stored from the memory it came into, without a copy.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import mmap
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Final, Self

import httpx

from imgsvc.base import kernel
from imgsvc.base.children import Companion
from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import Unavailable
from imgsvc.registry.http.bulk_messages import (
    COUNT,
    LOT,
    MAX_END,
    MAX_MESSAGE,
    MEMORY,
    SLOTS,
    Order,
    pack_order,
    unpack_end,
    unpack_head,
)
from imgsvc.registry.http.exchange import RequestFailed, answer_to
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.http.tls import opened_files
from imgsvc.registry.retry import Failure

_GRACE_S: Final = 15.0  # that a process may be late: it keeps the deadlines itself, as long as it runs at all


class _Job:
    """The daemon's ends of what one request has: its socket and its memory."""

    def __init__(self, process: Companion, url: str, phase: str) -> None:
        self._process = process
        self._url = url
        self._phase = phase
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._memory_fd = kernel.fixed_memory("imgsvc-body", MEMORY)
        self._memory = mmap.mmap(self._memory_fd, MEMORY, prot=mmap.PROT_READ)

    def theirs(self) -> list[int]:
        """What the process gets."""
        return [self._theirs.fileno(), self._memory_fd]

    def handed_over(self) -> None:
        """The process has it. Idempotent."""
        self._theirs.close()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)
            self._memory_fd = -1

    async def receive(self, limit: int, seconds: float) -> bytes:
        """The next message, of `limit` bytes at most. Raises: RequestFailed when the process dies, or says nothing for longer than it may."""
        try:
            async with time_limit(seconds + _GRACE_S):
                with contextlib.suppress(ConnectionError):
                    if message := await asyncio.get_running_loop().sock_recv(self._socket, limit):
                        return message
        except TimeoutError as error:
            self._process.kill()
            raise self._failed("the download process does not answer", "DEADLINE_EXCEEDED", "it was killed") from error
        hint = "if the log has no trace of it, look for the out-of-memory killer in the kernel's"
        raise self._failed("the download process ended", "UNAVAILABLE", hint)

    def _failed(self, what: str, code: str, hint: str) -> RequestFailed:
        return RequestFailed(what, code=code, failure=Failure.BROKEN, phase=self._phase, where=shown_url(self._url), hint=hint)

    @contextlib.contextmanager
    def lot(self, number: int, size: int) -> Iterator[memoryview]:
        """The body's n-th lot, which has `size` bytes, for a `with` block. Its slot may be filled again after it."""
        start = number % SLOTS * LOT
        with memoryview(self._memory) as memory, memory[start : start + size] as lot:
            yield lot
        with contextlib.suppress(OSError):  # the process has died; the next message says so
            self._socket.send(b"\0")

    def close(self) -> None:
        """No more of this. Idempotent."""
        self.handed_over()
        self._socket.close()
        with contextlib.suppress(BufferError):  # a reader still holds part of a segment: it is unmapped after that
            self._memory.close()


class _Lots(httpx.AsyncByteStream):
    """A body, lot by lot, each good until the next one is asked for; what is not full by then after 50 ms at the latest."""

    def __init__(self, job: _Job, stall: float) -> None:
        self._job = job
        self._stall = stall
        self._number = 0
        self._lent = contextlib.ExitStack()  # the lot that is looked at

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        self._lent.close()
        message = await self._job.receive(MAX_END, self._stall)
        if len(message) != COUNT:
            unpack_end(message)
            raise StopAsyncIteration
        lot = self._lent.enter_context(self._job.lot(self._number, int.from_bytes(message, "big")))
        self._number += 1
        return lot  # type: ignore[return-value]  # httpx says bytes; it only takes its length before it hands it on

    async def aclose(self) -> None:
        """Idempotent. Before the end, the process closes its connection."""
        self._lent.close()
        self._job.close()


class BulkTransport(httpx.AsyncBaseTransport):
    """Hands requests to one process. Belongs to one event loop."""

    def __init__(self) -> None:
        # With the daemon's environment: it may say where the system's CAs are and how names are resolved.
        self._process = Companion("imgsvc.registry.http.bulk_worker")
        self._lock = asyncio.Lock()

    async def warm(self) -> None:
        """Start the process now, so that the first blob does not wait for it. Raises: OSError."""
        async with self._lock:
            await self._process.connect()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """As Transport's, for a request without a body. Raises, besides: Unavailable when there is no process to be had."""
        order = Order.of(request)
        job = _Job(self._process, order.url, order.phase)
        try:
            await self._hand_over(order, job)
            connect = order.route.connect_within(order.timeouts)
            head = unpack_head(await job.receive(MAX_MESSAGE, connect + order.timeouts.headers))
        except BaseException:
            job.close()
            raise
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
        return answer_to(request, head.status, headers, _Lots(job, order.timeouts.stall), reach=head.reach)

    async def aclose(self) -> None:
        """Stop the process; what it is fetching fails."""
        async with self._lock:
            self._process.stop()

    async def _hand_over(self, order: Order, job: _Job) -> None:
        files = opened_files(order.route.tls)
        try:
            await self._send_order(order, [*job.theirs(), *files])
        finally:
            for fd in files:
                os.close(fd)
        job.handed_over()

    async def _send_order(self, order: Order, fds: Sequence[int]) -> None:
        message = pack_order(order)
        if len(message) > MAX_MESSAGE:
            what = f"the request has {len(message)} bytes, more than {MAX_MESSAGE}"
            raise RequestFailed(what, code="INVALID_ARGUMENT", failure=Failure.DEFINITE, phase=order.phase, where=shown_url(order.url))
        async with self._lock:
            for last in (False, True):
                try:
                    control = await self._process.connect()
                    await _send(control, message, fds)
                    break
                except OSError as error:
                    self._process.stop()
                    if last:
                        raise Unavailable(f"no download process: {error.strerror or error}", where=sys.executable) from error


async def _send(control: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """Waits while the process has more than it took yet. Raises: OSError."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            control.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(control, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(control)
        else:
            return
