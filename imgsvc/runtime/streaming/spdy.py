"""SPDY/3.1 as the kubelet speaks it, without sockets: bytes in → events out, calls → bytes out.

One Session is the server's end of one connection. There is no flow control in this dialect (peers never send
WINDOW_UPDATE), so the caller holds a fast sender back by not reading its socket. Everything a peer can make us keep is
bounded: the unfinished control frame, the header block after decompression, and the number of open streams.

A stream lives from SYN_STREAM until both sides have sent FIN, or one has sent RST_STREAM. Data is passed on as it arrives,
also from the middle of a frame, so that the size of a data frame does not matter.

Source: SPDY protocol draft 3.1; CVE-2026-35469 for what happens without the bounds.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from imgsvc.base.errors import InvalidArgument
from imgsvc.runtime.streaming.spdy_dictionary import DICTIONARY

MAX_CONTROL: Final = 64 * 1024  # [bytes] of one control frame; a real one has a few hundred
MAX_HEADERS: Final = 64 * 1024  # [bytes] of one header block after decompression
MAX_HEADER_COUNT: Final = 128
MAX_STREAMS: Final = 1024  # open at once; a port-forward uses two per connection

_HEADER: Final = struct.Struct(">IB3s")
_WORD: Final = struct.Struct(">I")
_FIN: Final = 0x01
_CONTROL: Final = 0x8003_0000  # control bit and version 3


class FrameType(IntEnum):
    """Control frame types."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Rst(IntEnum):
    """Reasons of RST_STREAM."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    CANCEL = 5
    INTERNAL_ERROR = 6
    STREAM_ALREADY_CLOSED = 9


class SpdyError(InvalidArgument):
    """The peer broke the protocol; the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream; answer with reply() or reset(). fin: it will send no data on it."""

    stream_id: int
    headers: dict[str, str]
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamData:
    """Data of a stream, fin with its last piece (which may be empty)."""

    stream_id: int
    data: bytes
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer gave a stream up, in both directions."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes the protocol itself wants sent."""

    data: bytes


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer will open no more streams."""


Event = StreamOpened | StreamData | StreamReset | Answer | GoneAway


@dataclass(slots=True)
class _Stream:
    remote_open: bool
    local_open: bool


class Session:
    """The server's end of one connection. Not thread-safe; bytes must be sent in the order they are returned."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data_stream = 0  # of the data frame being received
        self._data_fin = False
        self._data_left = 0
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes as they come from the network. Raises: SpdyError, after which nothing may be fed any more."""
        events: list[Event] = []
        self._buffer += data
        while True:
            if self._data_left:
                if not self._buffer:
                    return events
                self._take_data(events)
                continue
            if len(self._buffer) < _HEADER.size:
                return events
            first, flags, length = self._peek()
            if first >> 31:
                if length > MAX_CONTROL:
                    raise SpdyError(f"control frame of {length} bytes")
                if len(self._buffer) < _HEADER.size + length:
                    return events
                payload = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
                del self._buffer[: _HEADER.size + length]
                self._control(first, flags, payload, events)
            else:
                del self._buffer[: _HEADER.size]
                self._begin_data(first, flags, length, events)

    def reply(self, stream_id: int) -> bytes:
        """Accept a stream: a peer may drop data of a stream that was not replied to."""
        return self._frame(FrameType.SYN_REPLY, _WORD.pack(stream_id) + self._headers({}))

    def data(self, stream_id: int, data: bytes, *, fin: bool = False) -> bytes:
        """Send on a stream; empty when the stream is not open in this direction any more."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.local_open:
            return b""
        if fin:
            stream.local_open = False
            self._forget_closed(stream_id, stream)
        return _HEADER.pack(stream_id, _FIN if fin else 0, len(data).to_bytes(3, "big")) + data

    def reset(self, stream_id: int, reason: Rst) -> bytes:
        """Give a stream up in both directions; empty when it is gone already."""
        if self._streams.pop(stream_id, None) is None:
            return b""
        return self._rst(stream_id, reason)

    def go_away(self, *, protocol_error: bool = False) -> bytes:
        """Say that the connection ends."""
        return self._frame(FrameType.GOAWAY, struct.pack(">II", self._last_id, int(protocol_error)))

    def _peek(self) -> tuple[int, int, int]:
        first, flags, length = _HEADER.unpack_from(self._buffer)
        return first, flags, int.from_bytes(length, "big")

    def _begin_data(self, stream_id: int, flags: int, length: int, events: list[Event]) -> None:
        if stream_id == 0 or stream_id > self._last_id:
            raise SpdyError(f"data for stream {stream_id}, which was never opened")
        self._data_stream, self._data_fin, self._data_left = stream_id, bool(flags & _FIN), length
        if not length:
            self._deliver(b"", events)

    def _take_data(self, events: list[Event]) -> None:
        piece = bytes(self._buffer[: self._data_left])
        del self._buffer[: len(piece)]
        self._data_left -= len(piece)
        self._deliver(piece, events)

    def _deliver(self, piece: bytes, events: list[Event]) -> None:
        """Data for a stream that is closed already is dropped: it may have been on its way when we closed."""
        stream = self._streams.get(self._data_stream)
        if stream is None or not stream.remote_open:
            return
        fin = self._data_fin and not self._data_left
        if fin:
            stream.remote_open = False
            self._forget_closed(self._data_stream, stream)
        if piece or fin:
            events.append(StreamData(self._data_stream, piece, fin))

    def _forget_closed(self, stream_id: int, stream: _Stream) -> None:
        if not stream.remote_open and not stream.local_open:
            del self._streams[stream_id]

    def _control(self, first: int, flags: int, payload: bytes, events: list[Event]) -> None:
        if first >> 16 != _CONTROL >> 16:
            raise SpdyError(f"SPDY version {first >> 16 & 0x7FFF}, not 3")
        kind = first & 0xFFFF
        if kind == FrameType.SYN_STREAM:
            self._syn_stream(flags, payload, events)
        elif kind == FrameType.RST_STREAM:
            stream_id, _ = _fixed(payload, 2, "RST_STREAM")
            if self._streams.pop(stream_id, None):
                events.append(StreamReset(stream_id))
        elif kind == FrameType.PING:
            (ping,) = _fixed(payload, 1, "PING")
            if ping % 2:  # the peer's; even ones would answer ours
                events.append(Answer(self._frame(FrameType.PING, payload)))
        elif kind == FrameType.GOAWAY:
            _fixed(payload, 2, "GOAWAY")
            events.append(GoneAway())
        elif kind in (FrameType.HEADERS, FrameType.SYN_REPLY):
            # Nothing here depends on them, but the decompressor must see every block.
            self._parse_headers(payload[4:])
        elif kind == FrameType.SETTINGS:
            _check_settings(payload)
        elif kind == FrameType.WINDOW_UPDATE:
            _fixed(payload, 2, "WINDOW_UPDATE")
        else:
            raise SpdyError(f"unknown control frame {kind}")

    def _syn_stream(self, flags: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) < 10:
            raise SpdyError(f"SYN_STREAM of {len(payload)} bytes")
        stream_id = _WORD.unpack_from(payload)[0] & 0x7FFF_FFFF
        headers = self._parse_headers(payload[10:])
        if stream_id % 2 == 0 or stream_id <= self._last_id:
            raise SpdyError(f"stream {stream_id} opened after {self._last_id}; a client's are odd and grow")
        self._last_id = stream_id
        if len(self._streams) >= MAX_STREAMS:
            events.append(Answer(self._rst(stream_id, Rst.REFUSED_STREAM)))
            return
        fin = bool(flags & _FIN)
        self._streams[stream_id] = _Stream(remote_open=not fin, local_open=True)
        events.append(StreamOpened(stream_id, headers, fin))

    def _parse_headers(self, block: bytes) -> dict[str, str]:
        try:
            plain = self._inflate.decompress(block, MAX_HEADERS + 1)
        except zlib.error as error:
            raise SpdyError("header block does not decompress") from error
        if len(plain) > MAX_HEADERS or self._inflate.unconsumed_tail or self._inflate.eof:
            raise SpdyError(f"header block of more than {MAX_HEADERS} bytes")
        return _split_headers(plain)

    def _headers(self, headers: dict[str, str]) -> bytes:
        plain = _WORD.pack(len(headers))
        for name, value in headers.items():
            plain += _WORD.pack(len(name)) + name.encode() + _WORD.pack(len(value)) + value.encode()
        return self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def _rst(self, stream_id: int, reason: Rst) -> bytes:
        return self._frame(FrameType.RST_STREAM, struct.pack(">II", stream_id, reason))

    @staticmethod
    def _frame(kind: FrameType, payload: bytes) -> bytes:
        return _HEADER.pack(_CONTROL | kind, 0, len(payload).to_bytes(3, "big")) + payload


def _fixed(payload: bytes, words: int, name: str) -> tuple[int, ...]:
    if len(payload) != 4 * words:
        raise SpdyError(f"{name} of {len(payload)} bytes")
    return struct.unpack(f">{words}I", payload)


def _check_settings(payload: bytes) -> None:
    if len(payload) < 4 or len(payload) != 4 + 8 * _WORD.unpack_from(payload)[0]:
        raise SpdyError(f"SETTINGS of {len(payload)} bytes do not hold the entries they announce")


def _split_headers(plain: bytes) -> dict[str, str]:
    """Names are lower-cased, as a careless peer may not have done it. Raises: SpdyError."""
    count, at = _word_at(plain, 0)
    if count > MAX_HEADER_COUNT:
        raise SpdyError(f"{count} headers in one block")
    headers: dict[str, str] = {}
    for _ in range(count):
        name, at = _text_at(plain, at)
        value, at = _text_at(plain, at)
        headers[name.lower()] = value
    if at != len(plain):
        raise SpdyError("bytes after the last header")
    return headers


def _word_at(plain: bytes, at: int) -> tuple[int, int]:
    if len(plain) < at + 4:
        raise SpdyError("header block ends early")
    return _WORD.unpack_from(plain, at)[0], at + 4


def _text_at(plain: bytes, at: int) -> tuple[str, int]:
    length, at = _word_at(plain, at)
    if len(plain) < at + length:
        raise SpdyError("header block ends early")
    return plain[at : at + length].decode("latin-1"), at + length
