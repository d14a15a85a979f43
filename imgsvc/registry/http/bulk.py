"""Requests whose answers are large, made by a process of its own: the daemon's side, a Sender like transport.Transport.

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
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final

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
    Head,
    Order,
    pack_order,
    unpack_end,
    unpack_head,
)
from imgsvc.registry.http.exchange import Chunk, Headers, RequestFailed, Response, Route, Sender, Timeouts, log_exchange
from imgsvc.registry.http.netguard import Reach
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


class _BulkResponse(Response):
    def __init__(self, head: Head, order: Order, job: _Job) -> None:
        super().__init__(head.status, Headers(head.headers), order.url, order.phase)
        self._reach = head.reach
        self._stall = order.timeouts.stall
        self._job = job

    def reach(self) -> Reach:
        """See Response."""
        return self._reach

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """See Response; what is not full by then after 50 ms at the latest."""
        number = 0
        while len(message := await self._job.receive(MAX_END, self._stall)) == COUNT:
            with self._job.lot(number, int.from_bytes(message, "big")) as lot:
                yield lot
            number += 1
        unpack_end(message)

    async def close(self) -> None:
        """See Response."""
        self._job.close()


class BulkTransport:
    """A Sender over one process. Belongs to one event loop."""

    def __init__(self) -> None:
        self.timeouts = Timeouts()
        # With the daemon's environment: it may say where the system's CAs are and how names are resolved.
        self._process = Companion("imgsvc.registry.http.bulk_worker")
        self._lock = asyncio.Lock()

    async def warm(self) -> None:
        """Start the process now, so that the first blob does not wait for it. Raises: OSError."""
        async with self._lock:
            await self._process.connect()

    async def send(self, method: str, url: str, headers: Sequence[tuple[str, str]], *, route: Route, phase: str) -> Response:
        """See Sender. Raises, besides: Unavailable when there is no process to be had."""
        began = time.monotonic()
        order = Order(method, url, tuple(headers), route, phase, self.timeouts)
        job = _Job(self._process, url, phase)
        try:
            await self._hand_over(order, job)
            connect = route.connect_within(self.timeouts)
            head = unpack_head(await job.receive(MAX_MESSAGE, connect + self.timeouts.headers))
        except BaseException:
            job.close()
            raise
        response = _BulkResponse(head, order, job)
        log_exchange(method, headers, response, time.monotonic() - began)
        return response

    async def close(self) -> None:
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


def as_sender(bulk: BulkTransport) -> Sender:
    """Lets mypy prove that the contract is met."""
    return bulk


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
