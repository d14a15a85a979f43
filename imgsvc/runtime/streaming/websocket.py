"""WebSocket framing for a server, without sockets: bytes in → events out, calls → bytes out.

A message is passed on in pieces as it arrives, also from the middle of a frame, so that its length does not matter and
nothing but an unfinished frame header or control frame (≤ 139 bytes) is ever kept.

Source: RFC 6455, sections 4.2 (handshake), 5.2 (frames), 5.4 (fragments), 5.5 (control frames), 7.4.1 (close codes).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from imgsvc.base.errors import InvalidArgument

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_MAX_CONTROL: Final = 125  # [bytes]


class Opcode(IntEnum):
    """Frame types."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(IntEnum):
    """Why a connection ends."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    INTERNAL_ERROR = 1011


class WebSocketError(InvalidArgument):
    """The peer broke the protocol; the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class MessagePart:
    """A piece of a message. first and last mark where the message begins and ends; a piece may be empty."""

    data: bytes
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes the protocol itself wants sent."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer sent its close frame; nothing follows. answer: the close frame to send, unless ours went out before."""

    answer: bytes


Event = MessagePart | Answer | Closed


def accept_key(key: str) -> str:
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key. Raises: WebSocketError when the key is not 16 bytes in base64."""
    try:
        raw = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WebSocketError("Sec-WebSocket-Key is not base64") from error
    if len(raw) != 16:
        raise WebSocketError("Sec-WebSocket-Key is not 16 bytes long")
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()


def frame(opcode: Opcode, payload: bytes) -> bytes:
    """One unmasked frame with a whole message."""
    head = 0x80 | opcode
    if len(payload) < 126:
        return struct.pack(">BB", head, len(payload)) + payload
    if len(payload) < 1 << 16:
        return struct.pack(">BBH", head, 126, len(payload)) + payload
    return struct.pack(">BBQ", head, 127, len(payload)) + payload


def close_frame(code: CloseCode) -> bytes:
    """The close frame for a code."""
    return frame(Opcode.CLOSE, struct.pack(">H", code))


@dataclass(slots=True)
class _Frame:
    opcode: int
    fin: bool
    mask: bytes
    left: int  # [bytes] of payload not yet received
    fresh: bool = True  # nothing of it was delivered yet


class Receiver:
    """The receiving half of a server's connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._frame: _Frame | None = None
        self._in_message = False
        self._closed = False

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes as they come from the network. Raises: WebSocketError, after which nothing may be fed any more."""
        events: list[Event] = []
        self._buffer += data
        while not self._closed:
            if self._frame is None:
                self._frame = self._take_header()
            if self._frame is None or not self._take_payload(self._frame, events):
                return events
        return events

    def _take_header(self) -> _Frame | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        opcode, fin, length = buffer[0] & 0x0F, bool(buffer[0] & 0x80), buffer[1] & 0x7F
        self._check_header(opcode, fin, length)
        extra = {126: 2, 127: 8}.get(length, 0)
        size = 2 + extra + 4
        if len(buffer) < size:
            return None
        if extra:
            length = int.from_bytes(buffer[2 : 2 + extra], "big")
        if length >> 63:
            raise WebSocketError("frame length with the top bit set")
        mask = bytes(buffer[size - 4 : size])
        del buffer[:size]
        return _Frame(opcode, fin, mask, length)

    def _check_header(self, opcode: int, fin: bool, length: int) -> None:
        if self._buffer[0] & 0x70:
            raise WebSocketError("reserved bits set without an extension")
        if not self._buffer[1] & 0x80:
            raise WebSocketError("a client's frame is not masked")
        if opcode in (Opcode.CLOSE, Opcode.PING, Opcode.PONG):
            if not fin or length > _MAX_CONTROL:
                raise WebSocketError("a control frame is fragmented or too long")
        elif opcode in (Opcode.TEXT, Opcode.BINARY):
            if self._in_message:
                raise WebSocketError("a message begins inside another")
        elif opcode == Opcode.CONTINUATION:
            if not self._in_message:
                raise WebSocketError("a continuation without a message")
        else:
            raise WebSocketError(f"unknown opcode {opcode}")

    def _take_payload(self, current: _Frame, events: list[Event]) -> bool:
        """Deliver what is there of the frame. Returns whether the frame is complete."""
        if current.opcode >= Opcode.CLOSE:
            if len(self._buffer) < current.left:
                return False
            self._control(current.opcode, self._unmask(current), events)
        else:
            if current.left and not self._buffer:
                return False
            first = current.fresh and current.opcode != Opcode.CONTINUATION
            piece = self._unmask(current)
            current.fresh = False
            last = current.fin and not current.left
            self._in_message = not last
            if piece or first or last:
                events.append(MessagePart(piece, first, last))
            if current.left:
                return False
        self._frame = None
        return True

    def _unmask(self, current: _Frame) -> bytes:
        size = min(current.left, len(self._buffer))
        piece = self._buffer[:size]
        del self._buffer[:size]
        current.left -= size
        plain = xor(piece, current.mask)
        turn = size % 4
        current.mask = current.mask[turn:] + current.mask[:turn]
        return plain

    def _control(self, opcode: int, payload: bytes, events: list[Event]) -> None:
        if opcode == Opcode.PING:
            events.append(Answer(frame(Opcode.PONG, payload)))
        elif opcode == Opcode.CLOSE:
            if len(payload) == 1:
                raise WebSocketError("a close code of one byte")
            self._closed = True
            events.append(Closed(frame(Opcode.CLOSE, payload[:2])))


def xor(data: bytes | bytearray, mask: bytes) -> bytes:
    """Apply a mask of 4 bytes. One big integer is far faster than a loop over bytes."""
    size = len(data)
    if not size:
        return b""
    pad = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")
