"""Attach sessions: the streams of a container's first process, through the socket of its conmon.

To conmon go raw bytes of standard input; the end of our direction is the end of that input, unless the container keeps it
open. From conmon come packets: byte 0 says which stream (2 stdout, 3 stderr), the rest is data. Output starts at the
time of the connection. The socket closes when the container ends.

Source: conmon, conn_sock.c and ctrl.c (facts only).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.concurrency import stop_tasks
from imgsvc.base.errors import FailedPrecondition, from_os_error
from imgsvc.runtime.streaming.fdio import SocketConnection
from imgsvc.runtime.streaming.interfaces import ContainerProcess, Sizes, Source, Streams

_STDOUT, _STDERR = 2, 3
_PACKET: Final = 8192  # [bytes] of input per packet; conmon cuts packets of more than 32 KiB
_CONNECT_PAUSE_S: Final = 0.01
_CONNECT_TRIES: Final = 1000
_MAX_SIZE: Final = 1000  # newer conmon refuses larger terminals


@dataclass(frozen=True, slots=True)
class AttachTarget:
    """The first process of a running container."""

    container: ContainerProcess

    async def run(self, streams: Streams) -> int:
        """As CommandTarget.run. Raises: FailedPrecondition (the container is not running)."""
        connection = await _connect(self.container.attach_socket)
        side = []
        if streams.stdin:
            side.append(asyncio.create_task(_feed(streams.stdin, connection)))
        if streams.sizes:
            side.append(asyncio.create_task(_resize(streams.sizes, self.container.ctl_fifo)))
        try:
            await _deliver(connection, streams)
            return 0
        finally:
            await stop_tasks(*side)
            connection.close()


async def _connect(path: Path) -> SocketConnection:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        await _connect_patiently(sock, str(path))
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise FailedPrecondition("the container is not running") from error
        raise from_os_error(error, "attaching to the container", where=str(path)) from error
    except BaseException:
        sock.close()
        raise
    return SocketConnection(sock, packet=_PACKET)


async def _connect_patiently(sock: socket.socket, path: str) -> None:
    """Connect, queueing while the short backlog of conmon is full. Raises: OSError."""
    for _ in range(_CONNECT_TRIES):
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_CONNECT_PAUSE_S)
        else:
            return
    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


async def _deliver(connection: SocketConnection, streams: Streams) -> None:
    while packet := await connection.read():
        sink = {_STDOUT: streams.stdout, _STDERR: streams.stderr}.get(packet[0])
        if sink and len(packet) > 1:
            await sink.write(packet[1:])


async def _feed(source: Source, connection: SocketConnection) -> None:
    try:
        while data := await source.read():
            await connection.write(data)
    except OSError:  # the container ended, or closed its input
        while await source.read():
            pass
    else:
        connection.write_eof()


async def _resize(sizes: Sizes, ctl_fifo: Path) -> None:
    while size := await sizes.next():
        line = f"1 {min(size.height, _MAX_SIZE)} {min(size.width, _MAX_SIZE)}\n"
        # Without a reader the container is gone; its end comes over the socket.
        with contextlib.suppress(OSError):
            fd = os.open(ctl_fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)
