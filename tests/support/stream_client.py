"""A streaming client of our own: SPDY/3.1 and WebSocket as kubectl and crictl speak them, and as they never would."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import ssl
import struct
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from imgsvc.runtime.streaming.spdy_dictionary import DICTIONARY

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The server's answer to an upgrade request."""

    status: int
    headers: dict[str, str]


async def upgrade(
    url: str, headers: dict[str, str], *, method: str = "POST", tls: ssl.SSLContext | None = None
) -> tuple[Answer, asyncio.StreamReader, asyncio.StreamWriter]:
    """Send one request; the connection stays open whatever the answer is."""
    target = urlsplit(url)
    reader, writer = await asyncio.open_connection(target.hostname, target.port, ssl=tls)
    lines = [f"{method} {target.path} HTTP/1.1", f"Host: {target.netloc}", *(f"{k}: {v}" for k, v in headers.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    try:
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)).decode().split("\r\n")
    except BaseException:
        writer.transport.abort()
        raise
    fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
    return Answer(int(head[0].split()[1]), fields), reader, writer


def spdy_headers(protocols: str) -> dict[str, str]:
    """The headers of a SPDY upgrade."""
    return {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": protocols}


def websocket_headers(protocols: str) -> dict[str, str]:
    """The headers of a WebSocket upgrade."""
    key = base64.b64encode(os.urandom(16)).decode()
    fields = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key}
    return fields | ({"Sec-WebSocket-Protocol": protocols} if protocols else {})


class HeaderPacker:
    """Header blocks of one direction of one SPDY connection."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9, zdict=DICTIONARY)

    def pack(self, headers: dict[str, str]) -> bytes:
        """One block."""
        return self.pack_raw(struct.pack(">I", len(headers)) + b"".join(_text(k) + _text(v) for k, v in headers.items()))

    def pack_raw(self, plain: bytes) -> bytes:
        """One block with any content."""
        return self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


def _text(value: str) -> bytes:
    return struct.pack(">I", len(value)) + value.encode()


def control(kind: int, payload: bytes, *, flags: int = 0, version: int = 3) -> bytes:
    """A SPDY control frame."""
    return struct.pack(">HHI", 0x8000 | version, kind, flags << 24 | len(payload)) + payload


def data_frame(stream_id: int, data: bytes, *, fin: bool = False) -> bytes:
    """A SPDY data frame."""
    return struct.pack(">II", stream_id, int(fin) << 24 | len(data)) + data


def masked(opcode: int, payload: bytes, *, fin: bool = True, mask: bytes = b"\x11\x22\x33\x44") -> bytes:
    """A WebSocket frame of a client."""
    head = bytes([fin << 7 | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    elif len(payload) < 1 << 16:
        head += struct.pack(">BH", 0x80 | 126, len(payload))
    else:
        head += struct.pack(">BQ", 0x80 | 127, len(payload))
    repeated = (mask * (len(payload) // 4 + 1))[: len(payload)]
    body = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(payload), "big")
    return head + mask + body


@dataclass(slots=True)
class _Spdy:
    """What came back on a SPDY connection, by stream."""

    received: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    ended: set[int] = field(default_factory=set)
    reset: dict[int, int] = field(default_factory=dict)
    replied: set[int] = field(default_factory=set)
    pings: list[int] = field(default_factory=list)
    gone_away: int | None = None
    closed: bool = False


class SpdyClient:
    """A SPDY connection after its upgrade. send and receive are the raw bytes' way out and in."""

    def __init__(self, receive: Callable[[], Any], send: Callable[[bytes], Any]) -> None:
        self._receive = receive
        self._send = send
        self._packer = HeaderPacker()
        self._next_id = 1
        self._changed = asyncio.Condition()
        self.state = _Spdy()

    async def read_all(self) -> None:
        """Take in whatever comes until the end; run it as a task."""
        buffer = bytearray()
        with contextlib.suppress(OSError):
            while data := await self._receive():
                buffer += data
                while self._take_frame(buffer):
                    pass
                async with self._changed:
                    self._changed.notify_all()
        async with self._changed:
            self.state.closed = True
            self._changed.notify_all()

    def _take_frame(self, buffer: bytearray) -> bool:
        if len(buffer) < 8:
            return False
        first, second = struct.unpack_from(">II", buffer)
        flags, size = second >> 24, second & 0xFFFFFF
        if len(buffer) < 8 + size:
            return False
        payload = bytes(buffer[8 : 8 + size])
        del buffer[: 8 + size]
        if first >> 31:
            self._control(first & 0xFFFF, payload)
        else:
            self.state.received[first] += payload
            if flags & 1:
                self.state.ended.add(first)
        return True

    def _control(self, kind: int, payload: bytes) -> None:
        words = struct.unpack_from(f">{min(2, len(payload) // 4)}I", payload)
        if kind == 2:
            self.state.replied.add(words[0])
        elif kind == 3:
            self.state.reset[words[0]] = words[1]
        elif kind == 6:
            self.state.pings.append(words[0])
        elif kind == 7:
            self.state.gone_away = words[1]

    async def until(self, condition: Callable[[_Spdy], object]) -> None:
        """Wait for something to have come back."""
        async with self._changed, asyncio.timeout(WAIT_S):
            await self._changed.wait_for(lambda: condition(self.state) or self.state.closed)
        assert condition(self.state), self.state

    async def open(self, headers: dict[str, str], *, fin: bool = False) -> int:
        """Open a stream; does not wait for the reply."""
        stream_id, self._next_id = self._next_id, self._next_id + 2
        await self.raw(control(1, struct.pack(">IIBB", stream_id, 0, 0, 0) + self._packer.pack(headers), flags=int(fin)))
        return stream_id

    async def write(self, stream_id: int, data: bytes, *, fin: bool = False) -> None:
        """Send data in frames of 32 KiB, as Go does."""
        for at in range(0, len(data), 32768):
            await self.raw(data_frame(stream_id, data[at : at + 32768]))
        if fin:
            await self.raw(data_frame(stream_id, b"", fin=True))

    async def give_up(self, stream_id: int) -> None:
        """Reset a stream."""
        await self.raw(control(3, struct.pack(">II", stream_id, 5)))

    async def raw(self, data: bytes) -> None:
        """Send any bytes."""
        await self._send(data)


class WebSocketClient:
    """A WebSocket connection after its upgrade."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._messages: asyncio.Queue[bytes] = asyncio.Queue()
        self._changed = asyncio.Condition()
        self.channels: dict[int, bytearray] = defaultdict(bytearray)
        self.opcodes: list[int] = []
        self.close_code: int | None = None
        self.closed = False

    async def read_message(self) -> tuple[int, bytes] | None:
        """The next frame, or None at the end."""
        try:
            first, length = await self._reader.readexactly(2)
            if length > 125:
                length = int.from_bytes(await self._reader.readexactly(2 if length == 126 else 8), "big")
            return first & 0x0F, await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def receive_bytes(self) -> bytes:
        """The next binary message of a tunnel; b"" at the end."""
        while frame := await self.read_message():
            if frame[0] == 2:
                return frame[1]
        return b""

    async def read_all(self, *, as_base64: bool = False) -> None:
        """Sort messages into channels until the end; run it as a task."""
        while frame := await self.read_message():
            opcode, payload = frame
            async with self._changed:
                self.opcodes.append(opcode)
                if opcode in (1, 2):
                    channel = payload[0] - ord("0") if as_base64 else payload[0]
                    self.channels[channel] += base64.b64decode(payload[1:]) if as_base64 else payload[1:]
                elif opcode == 8:
                    self.close_code = int.from_bytes(payload[:2], "big")
                self._changed.notify_all()
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something to have come back."""
        async with self._changed, asyncio.timeout(WAIT_S):
            await self._changed.wait_for(lambda: condition() or self.closed)
        assert condition(), (dict(self.channels), self.close_code)

    async def write(self, channel: int, data: bytes) -> None:
        """Send data on a channel in messages of 32 KiB."""
        for at in range(0, len(data), 32768):
            await self.raw(masked(2, bytes([channel]) + data[at : at + 32768]))

    async def raw(self, data: bytes) -> None:
        """Send any bytes."""
        self._writer.write(data)
        await self._writer.drain()


@contextlib.asynccontextmanager
async def spdy_session(url: str, protocols: str = "v4.channel.k8s.io", *, tls: ssl.SSLContext | None = None) -> AsyncIterator[SpdyClient]:
    """An upgraded SPDY connection whose input is read in the background."""
    answer, reader, writer = await upgrade(url, spdy_headers(protocols), tls=tls)
    assert answer.status == 101, answer

    async def send(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    client = SpdyClient(lambda: reader.read(65536), send)
    async with _reading(client.read_all(), writer):
        yield client


@contextlib.asynccontextmanager
async def tunnel_session(url: str) -> AsyncIterator[SpdyClient]:
    """SPDY inside a WebSocket."""
    answer, reader, writer = await upgrade(url, websocket_headers("SPDY/3.1+portforward.k8s.io"), method="GET")
    assert answer.status == 101, answer
    inner = WebSocketClient(reader, writer)

    async def send(data: bytes) -> None:
        await inner.raw(masked(2, data))

    client = SpdyClient(inner.receive_bytes, send)
    async with _reading(client.read_all(), writer):
        yield client


@contextlib.asynccontextmanager
async def websocket_session(url: str, protocols: str = "v5.channel.k8s.io") -> AsyncIterator[WebSocketClient]:
    """An upgraded WebSocket whose input is sorted into channels in the background."""
    answer, reader, writer = await upgrade(url, websocket_headers(protocols), method="GET")
    assert answer.status == 101, answer
    assert answer.headers.get("sec-websocket-protocol", "") in protocols.split(",")
    client = WebSocketClient(reader, writer)
    async with _reading(client.read_all(as_base64="base64" in protocols), writer):
        yield client


@contextlib.asynccontextmanager
async def _reading(work: Any, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        writer.transport.abort()


@dataclass(frozen=True, slots=True)
class Ended:
    """What a command session left: its output and its status."""

    stdout: bytes
    stderr: bytes
    status: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 for success; the code of a NonZeroExitCode."""
        if self.status["status"] == "Success":
            return 0
        return int(self.status["details"]["causes"][0]["message"])


async def run_spdy(url: str, roles: Sequence[str], stdin: bytes = b"") -> Ended:
    """A whole command session over SPDY; roles besides error, in the order client-go opens them."""
    async with spdy_session(url) as client:
        ids = {role: await client.open({"streamtype": role}) for role in ("error", *roles)}
        await client.until(lambda s: s.replied >= set(ids.values()))
        if "stdin" in ids:
            with contextlib.suppress(OSError):  # a command may end before it has read everything
                await client.write(ids["stdin"], stdin, fin=True)
        await client.until(lambda s: s.ended >= set(ids.values()) and s.gone_away is not None)
        got = client.state.received
        return Ended(bytes(got[ids.get("stdout", 0)]), bytes(got[ids.get("stderr", 0)]), json.loads(got[ids["error"]]))


async def run_websocket(url: str, roles: Sequence[str], stdin: bytes = b"") -> Ended:
    """A whole command session over WebSocket v5."""
    async with websocket_session(url) as client:
        if "stdin" in roles:
            with contextlib.suppress(OSError):
                await client.write(0, stdin)
                await client.raw(masked(2, b"\xff\x00"))
        await client.until(lambda: client.close_code is not None)
        assert client.close_code == 1000
        return Ended(bytes(client.channels[1]), bytes(client.channels[2]), json.loads(client.channels[3]))
