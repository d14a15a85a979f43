"""ttrpc, the RPC protocol of shims and NRI plugins: unary calls over a stream, from either end.

A frame is u32 length, u32 stream, u8 type, u8 flags (big-endian), then a message.

Source: containerd/ttrpc PROTOCOL.md.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import DecodeError

from imgsvc.api import ttrpc_pb2
from imgsvc.base.concurrency import stop_tasks, time_limit
from imgsvc.base.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    ImgsvcError,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
    printable,
)

_HEADER: Final = struct.Struct(">IIBB")
MAX_FRAME: Final = 4 * 1024 * 1024
_REQUEST: Final = 1
_RESPONSE: Final = 2
_KINDS: Final[dict[int, type[ImgsvcError]]] = {
    3: InvalidArgument,
    4: DeadlineExceeded,
    5: NotFound,
    9: FailedPrecondition,
    12: Unimplemented,
    14: Unavailable,
}
_UNKNOWN: Final = 2

R = TypeVar("R")
Handler = Callable[[bytes], Awaitable[bytes]]  # of one method: from an encoded request to an encoded answer


class Reader(Protocol):
    """What frames are read from: an asyncio.StreamReader, or one connection of a multiplexed socket."""

    async def readexactly(self, n: int, /) -> bytes:
        """That many bytes. Raises: IncompleteReadError at the end."""


class Writer(Protocol):
    """What frames are written to. Frames are small and few, so nothing waits for the other end to read them."""

    def write(self, data: bytes, /) -> None:
        """Send, some time."""

    def close(self) -> None:
        """End the stream."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. payload: an encoded Request or Response."""

    stream: int
    kind: int
    payload: bytes


def encode(frame: Frame) -> bytes:
    """Bytes on the wire."""
    return _HEADER.pack(len(frame.payload), frame.stream, frame.kind, 0) + frame.payload


async def read_frame(reader: Reader) -> Frame | None:
    """The next frame, None at the end. Raises: DataLoss (too long, or cut off)."""
    try:
        length, stream, kind, _ = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        if length > MAX_FRAME:
            raise DataLoss(f"a ttrpc frame of {length} bytes; at most {MAX_FRAME} are allowed")
        return Frame(stream, kind, await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise DataLoss("the ttrpc connection broke inside a frame") from error
        return None
    except ConnectionError:
        return None


class Client:
    """A connection on which any number of calls may be under way."""

    def __init__(self, reader: Reader, writer: Writer, namespace: str, peer: str = "the shim") -> None:
        """namespace: containerd's, sent with each call; "" for none. peer: the server's name, for messages."""
        self._writer = writer
        self._namespace = namespace
        self.peer = peer
        self._next = 1
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self.closed = asyncio.Event()
        self._receiver = asyncio.create_task(self._receive(reader), name="ttrpc")

    @classmethod
    async def connect(cls, address: str, namespace: str, *, timeout_s: float = 5.0) -> Client:
        """Connect to unix:///path, /path, or an abstract name without scheme. Raises: Unavailable."""
        path = address.removeprefix("unix://")
        try:
            async with time_limit(timeout_s):
                reader, writer = await asyncio.open_unix_connection(path if path.startswith("/") else f"\0{path.lstrip('@')}")
        except OSError as error:
            raise Unavailable(f"the shim does not answer: {error}", where=address) from error
        return cls(reader, writer, namespace)

    async def call(self, service: str, method: str, message: Any, answer: Callable[[], R], *, timeout_s: float | None = 120.0) -> R:
        """One unary call. timeout_s None waits without limit. Raises: the shim's error in its category; Unavailable."""
        request = ttrpc_pb2.Request(
            service=service, method=method, payload=message.SerializeToString(), timeout_nano=int((timeout_s or 0) * 1e9)
        )
        if self._namespace:
            request.metadata.add(key="containerd-namespace-ttrpc", value=self._namespace)
        stream, self._next = self._next, self._next + 2
        if self.closed.is_set():
            raise Unavailable(f"the connection to {self.peer} is closed")
        future = self._waiting[stream] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(encode(Frame(stream, _REQUEST, request.SerializeToString())))
            async with time_limit(timeout_s):
                payload = await future
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.peer} did not answer {method} within {timeout_s:g} s") from error
        finally:
            self._waiting.pop(stream, None)
        return self._answer(payload, method, answer)

    async def _receive(self, reader: Reader) -> None:
        try:
            while (frame := await read_frame(reader)) is not None:
                future = self._waiting.get(frame.stream)
                if frame.kind == _RESPONSE and future and not future.done():
                    future.set_result(frame.payload)
        except DataLoss:
            pass
        finally:
            self.closed.set()
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Unavailable(f"{self.peer} closed the connection"))

    def _answer(self, payload: bytes, method: str, answer: Callable[[], R]) -> R:
        try:
            response = ttrpc_pb2.Response.FromString(payload)
            if response.status.code:
                kind = _KINDS.get(response.status.code, FailedPrecondition)
                raise kind(f"{self.peer} refused {method}: {printable(response.status.message)}")
            message = answer()
            message.ParseFromString(response.payload)  # type: ignore[attr-defined]
        except DecodeError as error:
            raise DataLoss(f"what {self.peer} answered to {method} cannot be read") from error
        return message

    async def close(self) -> None:
        """End the connection."""
        await stop_tasks(self._receiver)


class Server:
    """The other end: answers the calls that come on a connection, one after another."""

    def __init__(self, reader: Reader, writer: Writer, methods: Mapping[tuple[str, str], Handler]) -> None:
        """methods: by service and name."""
        self._reader = reader
        self._writer = writer
        self._methods = methods

    async def serve(self) -> None:
        """Until the connection ends. Raises: DataLoss."""
        while (frame := await read_frame(self._reader)) is not None:
            if frame.kind == _REQUEST:
                response = await self._respond(frame.payload)
                self._writer.write(encode(Frame(frame.stream, _RESPONSE, response.SerializeToString())))

    async def _respond(self, payload: bytes) -> ttrpc_pb2.Response:
        try:
            request = ttrpc_pb2.Request.FromString(payload)
            method = self._methods.get((request.service, request.method))
            if method is None:
                raise Unimplemented(f"no method {printable(request.service, 80)}/{printable(request.method, 80)}")
            return ttrpc_pb2.Response(payload=await method(request.payload))
        except DecodeError:
            return _failed(InvalidArgument("the request cannot be read"))
        except ImgsvcError as error:
            return _failed(error)


def _failed(error: ImgsvcError) -> ttrpc_pb2.Response:
    code = next((number for number, kind in _KINDS.items() if isinstance(error, kind)), _UNKNOWN)
    return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=str(error)))
