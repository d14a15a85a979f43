"""The client's connection after the upgrade: bytes both ways, idle time, and whether the client is still there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import Cancelled, DeadlineExceeded
from imgsvc.runtime.streaming.interfaces import CHUNK

_WRITE_HIGH: Final = 256 * 1024  # [bytes] unsent before a sender waits
_CHECK_S: Final = 2.0
_LINGER_S: Final = 5.0
_TCP_CLOSE: Final = 7
_TCP_ENDED: Final = (_TCP_CLOSE, 8, 9)  # also CLOSE_WAIT, LAST_ACK. Source: tcp_info.tcpi_state, linux/tcp_states.h


class PeerGone(Cancelled):
    """The client closed its connection, or does not answer."""


class Peer:
    """One upgraded connection. send() may be called from several tasks; receive() from one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle_timeout_s: float) -> None:
        self._reader = reader
        self._writer = writer
        self._idle_timeout_s = idle_timeout_s
        self._active_at = asyncio.get_running_loop().time()
        writer.transport.set_write_buffer_limits(high=_WRITE_HIGH)
        _enable_keepalive(writer)

    async def receive(self) -> bytes:
        """The next bytes; b"" when the client closed, or is gone."""
        try:
            data = await self._reader.read(CHUNK)
        except OSError:  # reset, timed out, TLS cut short
            return b""
        self._touch()
        return data

    async def send(self, data: bytes) -> None:
        """Queue bytes in call order, then wait while too much is unsent. Raises: PeerGone."""
        if not data:
            return
        if self._writer.is_closing():
            raise PeerGone("the client is gone")
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError as error:
            raise PeerGone("the client is gone") from error
        self._touch()

    async def watch(self) -> None:
        """Runs until the connection is of no more use. Raises: DeadlineExceeded (idle), PeerGone.

        While a slow target makes us stop reading we would not see the client leave, so the state of the TCP connection is
        looked at from time to time.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_CHECK_S, self._idle_timeout_s / 4))
            if loop.time() - self._active_at >= self._idle_timeout_s:
                raise DeadlineExceeded(f"no data for {self._idle_timeout_s:g} s")
            if _tcp_state(self._writer) in _TCP_ENDED:
                raise PeerGone("the client is gone")

    async def flush(self) -> None:
        """Wait until all is handed to the kernel, then close our direction. Raises: PeerGone."""
        self._writer.transport.set_write_buffer_limits(high=0)
        await self.send(b"")
        try:
            await self._writer.drain()
            if self._writer.can_write_eof():
                self._writer.write_eof()
        except OSError as error:
            raise PeerGone("the client is gone") from error

    async def linger(self) -> None:
        """Read and drop until the client closes: closing over unread input would reset the connection, and what we sent
        last, the exit status, could be lost on the way.
        """
        with contextlib.suppress(TimeoutError):
            async with time_limit(_LINGER_S):
                while await self.receive():
                    pass

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()

    def _touch(self) -> None:
        self._active_at = asyncio.get_running_loop().time()


def _enable_keepalive(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        sock.setsockopt(level, option, value)


def _tcp_state(writer: asyncio.StreamWriter) -> int:
    sock: socket.socket = writer.get_extra_info("socket")
    if sock.fileno() < 0:
        return _TCP_CLOSE
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
