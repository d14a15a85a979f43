"""Two ttrpc connections on one socket. Each frame has a header: u32 connection, u32 length (big-endian)."""

from __future__ import annotations

import asyncio
import struct
from typing import Final

from imgsvc.runtime.ttrpc import MAX_FRAME

PLUGIN_SERVICE: Final = 1  # what the plugin serves
RUNTIME_SERVICE: Final = 2  # what the runtime serves
_HEADER: Final = struct.Struct(">II")
_MAX_PAYLOAD: Final = MAX_FRAME + 10  # a whole ttrpc frame
_GO_BUFFER: Final = 4096  # of bufio.Reader, into which containerd/nri's multiplexer must be able to put a frame whole
_MAX_UNREAD: Final = 2 * _MAX_PAYLOAD  # [bytes] that a connection may hold


class Connection:
    """One of the connections: a ttrpc Reader and Writer."""

    def __init__(self, number: int, trunk: asyncio.StreamWriter) -> None:
        self._number = number
        self._trunk = trunk
        self._stream = asyncio.StreamReader()
        self._unread = 0
        self._room = asyncio.Event()

    async def readexactly(self, n: int, /) -> bytes:
        """See ttrpc.Reader."""
        data = await self._stream.readexactly(n)
        self._unread -= n
        self._room.set()
        return data

    async def feed(self, data: bytes) -> None:
        """Take what has arrived; returns when there is room for more."""
        self._stream.feed_data(data)
        self._unread += len(data)
        while self._unread > _MAX_UNREAD:
            self._room.clear()
            await self._room.wait()

    def feed_eof(self) -> None:
        """Nothing more will arrive."""
        self._stream.feed_eof()

    def write(self, data: bytes, /) -> None:
        """See ttrpc.Writer. data: one whole ttrpc frame, which is sent as plugins in Go read it: their buffer's worth, then the rest."""
        for part in (data[:_GO_BUFFER], data[_GO_BUFFER:]):
            if part:
                self._trunk.write(_HEADER.pack(self._number, len(part)) + part)

    def close(self) -> None:
        """Both connections end with the socket."""
        self._trunk.close()


class Multiplexer:
    """Belongs to the event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.connections = {number: Connection(number, writer) for number in (PLUGIN_SERVICE, RUNTIME_SERVICE)}

    async def run(self) -> None:
        """Hand out what arrives, until the socket ends or what arrives is no frame. What is for no connection is dropped."""
        try:
            while True:
                number, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
                if length > _MAX_PAYLOAD:
                    return
                data = await self._reader.readexactly(length)
                if number in self.connections:
                    await self.connections[number].feed(data)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for connection in self.connections.values():
                connection.feed_eof()
                connection.close()
