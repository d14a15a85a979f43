"""Unbuffered asynchronous reads and writes on pipes, terminals and sockets.

asyncio's own pipe transports read ahead and turn a terminal's EIO into an error; here nothing is read before it is wanted,
so a slow receiver holds the sender back through the kernel's buffer alone.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import termios
from typing import Final

from imgsvc.runtime.streaming.interfaces import CHUNK

_GONE: Final = (errno.EIO, errno.ECONNRESET)  # EIO: the last process left the terminal


class FdReader:
    """The reading side of a descriptor, which it owns."""

    def __init__(self, fd: int, *, size: int = CHUNK) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._size = size
        self._deadline: float | None = None
        self._rest: int | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """The next chunk; b"" at the end. Raises: OSError."""
        await asyncio.sleep(0)  # a fast writer must not keep the loop for itself
        while True:
            if self._past_deadline():
                return self._read_rest()
            try:
                return os.read(self._fd, self._size)
            except BlockingIOError:
                await self._wait()
            except OSError as error:
                if error.errno in _GONE:
                    return b""
                raise

    def end_within(self, seconds: float) -> None:
        """The writer we care about is gone: wait that long for others that share its end, then take what is there and stop."""
        self._deadline = asyncio.get_running_loop().time() + seconds
        if self._waiter:
            _resolve(self._waiter)

    def close(self) -> None:
        """Close the descriptor. Idempotent; no read may be in progress."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _past_deadline(self) -> bool:
        return self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline

    def _read_rest(self) -> bytes:
        """What the kernel held when the deadline passed; later bytes are another process's and would never end."""
        if self._rest is None:
            self._rest = _available(self._fd)
        try:
            data = os.read(self._fd, min(self._size, self._rest)) if self._rest else b""
        except OSError as error:
            if error.errno not in (*_GONE, errno.EAGAIN):
                raise
            data = b""
        self._rest = self._rest - len(data) if data else 0
        return data

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        loop.add_reader(self._fd, _resolve, waiter)
        timer = loop.call_at(self._deadline, _resolve, waiter) if self._deadline is not None else None
        try:
            await waiter
        finally:
            self._waiter = None
            loop.remove_reader(self._fd)
            if timer:
                timer.cancel()


class FdWriter:
    """The writing side of a descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    async def write(self, data: bytes) -> None:
        """Write all of it. Raises: OSError (BrokenPipeError when the reader has gone, also after close)."""
        await asyncio.sleep(0)
        view = memoryview(data)
        while view:
            if self._fd < 0:
                raise BrokenPipeError(errno.EPIPE, "closed")
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await _writable(self._fd)

    def close(self) -> None:
        """Close the descriptor. Idempotent; no write may be in progress."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SocketConnection:
    """A connected stream or packet socket, which it owns. packet: most bytes per write, for a packet socket."""

    def __init__(self, sock: socket.socket, *, packet: int = 0) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FdReader(os.dup(sock.fileno()))
        self._packet = packet

    async def read(self) -> bytes:
        """The next chunk, or packet; b"" at the end. Raises: OSError."""
        return await self._reader.read()

    async def write(self, data: bytes) -> None:
        """Write all of it. Raises: OSError."""
        await asyncio.sleep(0)
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view[: self._packet] if self._packet else view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await _writable(self._sock.fileno())

    def write_eof(self) -> None:
        """Half-close. Idempotent."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise

    def close(self) -> None:
        """Close it. Idempotent; no read or write may be in progress."""
        self._reader.close()
        self._sock.close()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _available(fd: int) -> int:
    answer = fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4)
    return int(struct.unpack("i", answer)[0])
