"""Targets that live in the test: no processes, no containers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from imgsvc.base.errors import Unavailable
from imgsvc.runtime.streaming.fdio import SocketConnection
from imgsvc.runtime.streaming.interfaces import Connection, Streams, StreamWants

ALL = StreamWants(stdin=True, stdout=True, stderr=True, tty=False)
OUTPUT = StreamWants(stdin=False, stdout=True, stderr=True, tty=False)
TERMINAL = StreamWants(stdin=True, stdout=True, stderr=False, tty=True)


@dataclass
class ScriptedTarget:
    """Runs a coroutine function; remembers how that ended."""

    script: Callable[[Streams], Coroutine[Any, Any, int]]
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False

    async def run(self, streams: Streams) -> int:
        self.started.set()
        try:
            return await self.script(streams)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()


async def echo(streams: Streams) -> int:
    """stdin to stdout until its end, then the count to stderr."""
    assert streams.stdin
    assert streams.stdout
    assert streams.stderr
    count = 0
    while data := await streams.stdin.read():
        count += len(data)
        await streams.stdout.write(data)
    await streams.stderr.write(str(count).encode())
    return 0


async def forever(streams: Streams) -> int:
    """Never ends by itself."""
    await asyncio.Event().wait()
    return 0


@dataclass(frozen=True)
class LoopbackPorts:
    """Connects to the test's own loopback servers."""

    async def connect(self, port: int) -> Connection:
        sock = socket.socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except OSError as error:
            sock.close()
            raise Unavailable(f"cannot connect to port {port}") from error
        return SocketConnection(sock)
