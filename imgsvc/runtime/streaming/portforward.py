"""The port-forward protocols, without sockets: which streams belong together, and to which port.

SPDY: two streams per forwarded connection, "data" and "error", paired by the header requestid; clients before Kubernetes 1.3
send none and open the error stream directly before its data stream. WebSocket: channels 2i and 2i+1 for the i-th port.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from imgsvc.base.errors import InvalidArgument

PROTOCOL: Final = "portforward.k8s.io"
TUNNEL_PROTOCOL: Final = "SPDY/3.1+portforward.k8s.io"
WEBSOCKET_PROTOCOLS: Final = ("v4.channel.k8s.io", "v4.base64.channel.k8s.io")


class PortForwardError(InvalidArgument):
    """A stream's headers make no sense."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The two streams of one forwarded connection."""

    port: int
    data_id: int
    error_id: int


@dataclass(frozen=True, slots=True)
class _Half:
    kind: str
    stream_id: int
    port: int


class Pairing:
    """Finds the streams that belong together."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Half] = {}

    def opened(self, stream_id: int, headers: dict[str, str]) -> Pair | None:
        """A stream was opened; the pair it completes, if it does. Raises: PortForwardError."""
        half = _Half(_kind(headers), stream_id, parse_port(headers.get("port", "")))
        # An old client's data stream is the next one after its error stream, and a client counts in steps of two.
        key = headers.get("requestid") or f"#{stream_id if half.kind == 'error' else stream_id - 2}"
        other = self._waiting.pop(key, None)
        if other is None:
            self._waiting[key] = half
            return None
        if {half.kind, other.kind} != {"data", "error"} or half.port != other.port:
            raise PortForwardError("the streams of one request do not fit together")
        first, second = (half, other) if half.kind == "data" else (other, half)
        return Pair(half.port, first.stream_id, second.stream_id)

    def dropped(self, stream_id: int) -> None:
        """The stream went away, or took too long; it waits for no partner any more."""
        self._waiting = {k: half for k, half in self._waiting.items() if half.stream_id != stream_id}

    def is_waiting(self, stream_id: int) -> bool:
        """Whether the stream still has no partner."""
        return any(half.stream_id == stream_id for half in self._waiting.values())


def _kind(headers: dict[str, str]) -> str:
    kind = headers.get("streamtype", "")
    if kind not in ("data", "error"):
        raise PortForwardError('header streamtype is neither "data" nor "error"')
    return kind


def parse_port(text: str) -> int:
    """A TCP port from a header. Raises: PortForwardError."""
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 5 and 0 < int(text) < 1 << 16):
        raise PortForwardError("header port is not a port number")
    return int(text)


def port_greeting(port: int) -> bytes:
    """What starts each WebSocket channel: the port, little-endian."""
    return struct.pack("<H", port)
