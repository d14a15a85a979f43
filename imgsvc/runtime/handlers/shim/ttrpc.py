"""ttrpc: unary calls to a shim over a Unix socket. A frame is u32 length, u32 stream, u8 type, u8 flags (big-endian), then a message.

Source: containerd/ttrpc PROTOCOL.md.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from imgsvc.api import ttrpc_pb2
from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import DataLoss, DeadlineExceeded, FailedPrecondition, ImgsvcError, NotFound, Unavailable, Unimplemented, printable

_HEADER: Final = struct.Struct(">IIBB")
MAX_FRAME: Final = 4 * 1024 * 1024
_REQUEST: Final = 1
_RESPONSE: Final = 2
_KINDS: Final[dict[int, type[ImgsvcError]]] = {5: NotFound, 9: FailedPrecondition, 12: Unimplemented, 14: Unavailable}

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. payload: an encoded Request or Response."""

    stream: int
    kind: int
    payload: bytes


def encode(frame: Frame) -> bytes:
    """Bytes on the wire."""
    return _HEADER.pack(len(frame.payload), frame.stream, frame.kind, 0) + frame.payload


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
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

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, namespace: str) -> None:
        self._writer = writer
        self._namespace = namespace
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
        """One unary call. timeout_s None waits for ever. Raises: what the shim answered as its category; Unavailable."""
        request = ttrpc_pb2.Request(
            service=service, method=method, payload=message.SerializeToString(), timeout_nano=int((timeout_s or 0) * 1e9)
        )
        request.metadata.add(key="containerd-namespace-ttrpc", value=self._namespace)
        stream, self._next = self._next, self._next + 2
        if self.closed.is_set():
            raise Unavailable("the connection to the shim is closed")
        future = self._waiting[stream] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(encode(Frame(stream, _REQUEST, request.SerializeToString())))
            async with time_limit(timeout_s):
                payload = await future
        except TimeoutError as error:
            raise DeadlineExceeded(f"the shim did not answer {method} within {timeout_s:g} s") from error
        finally:
            self._waiting.pop(stream, None)
        return _answer(payload, method, answer)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
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
                    future.set_exception(Unavailable("the shim closed the connection"))

    async def close(self) -> None:
        """End the connection."""
        self._receiver.cancel()
        await asyncio.wait([self._receiver])


def _answer(payload: bytes, method: str, answer: Callable[[], R]) -> R:
    response = ttrpc_pb2.Response.FromString(payload)
    if response.status.code:
        raise _error(response.status.code, f"{method}: {printable(response.status.message)}")
    message = answer()
    message.ParseFromString(response.payload)  # type: ignore[attr-defined]
    return message


def _error(code: int, text: str) -> ImgsvcError:
    return _KINDS.get(code, FailedPrecondition)(f"the shim refused {text}")
