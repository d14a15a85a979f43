"""The remotecommand protocols v1 to v5, without sockets: which stream is which, the final status, terminal sizes.

    version   over          adds
    v1        SPDY, WS      error stream is text, sent on failure only
    v2        SPDY          half-close that works
    v3        SPDY          resize stream
    v4        SPDY, WS      error stream is a metav1.Status in JSON, always sent
    v5        WS            the message [255, channel] closes a channel

Source: KEP-4006; k8s.io/apimachinery pkg/util/remotecommand for the names.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from imgsvc.base.errors import InvalidArgument
from imgsvc.runtime.streaming.interfaces import StreamWants, TerminalSize
from imgsvc.runtime.streaming.websocket import MessagePart, Opcode, frame

_CLOSE_CHANNEL: Final = 255
_MAX_BASE64_MESSAGE: Final = 1024 * 1024  # [bytes]; such a message is kept until it is whole
_MAX_SIZE_TEXT: Final = 1024  # [characters] of one JSON terminal size


class Role(StrEnum):
    """What a stream carries, as in the header "streamtype"."""

    STDIN = "stdin"
    STDOUT = "stdout"
    STDERR = "stderr"
    ERROR = "error"
    RESIZE = "resize"


CHANNELS: Final = {Role.STDIN: 0, Role.STDOUT: 1, Role.STDERR: 2, Role.ERROR: 3, Role.RESIZE: 4}
_ROLES: Final = {channel: role for role, channel in CHANNELS.items()}


class RemoteCommandError(InvalidArgument):
    """The peer broke the protocol above the framing."""


@dataclass(frozen=True, slots=True)
class Version:
    """A negotiated protocol. base64: WebSocket messages are text."""

    name: str
    number: int
    base64: bool = False


SPDY_VERSIONS: Final = {f"v{n}.channel.k8s.io": Version(f"v{n}.channel.k8s.io", n) for n in (2, 3, 4)} | {
    "channel.k8s.io": Version("channel.k8s.io", 1)
}
WEBSOCKET_VERSIONS: Final = {
    "v5.channel.k8s.io": Version("v5.channel.k8s.io", 5),
    "v4.channel.k8s.io": Version("v4.channel.k8s.io", 4),
    "v4.base64.channel.k8s.io": Version("v4.base64.channel.k8s.io", 4, base64=True),
    "channel.k8s.io": Version("channel.k8s.io", 1),
    "base64.channel.k8s.io": Version("base64.channel.k8s.io", 1, base64=True),
    "": Version("", 1),
}


def expected_roles(wants: StreamWants, version: Version) -> frozenset[Role]:
    """The streams a SPDY client has to open before the command starts."""
    asked = {Role.STDIN: wants.stdin, Role.STDOUT: wants.stdout, Role.STDERR: wants.stderr}
    asked[Role.RESIZE] = wants.tty and version.number >= 3
    return frozenset({Role.ERROR} | {role for role, asked_for in asked.items() if asked_for})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a session ended: an exit code, or an error that kept it from running."""

    exit_code: int = 0
    error: str = ""


def encode_status(outcome: Outcome, version: Version) -> bytes:
    """What goes on the error stream at the end; empty for "nothing"."""
    if version.number < 4:
        return _plain_text(outcome).encode()
    return json.dumps(_status(outcome)).encode()


def _plain_text(outcome: Outcome) -> str:
    if outcome.error:
        return outcome.error
    return f"command terminated with exit code {outcome.exit_code}" if outcome.exit_code else ""


def _status(outcome: Outcome) -> dict[str, Any]:
    if outcome.error:
        message = f"Internal error occurred: {outcome.error}"
        return {"metadata": {}, "status": "Failure", "reason": "InternalError", "message": message, "code": 500}
    if outcome.exit_code:
        return {
            "metadata": {},
            "status": "Failure",
            "reason": "NonZeroExitCode",
            "message": f"command terminated with non-zero exit code: exit status {outcome.exit_code}",
            "details": {"causes": [{"reason": "ExitCode", "message": str(outcome.exit_code)}]},
        }
    return {"metadata": {}, "status": "Success"}


class SizeParser:
    """Terminal sizes from a byte stream of concatenated JSON objects {"Width": 80, "Height": 24}."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, data: bytes) -> list[TerminalSize]:
        """The sizes that are complete now. Raises: RemoteCommandError."""
        self._text += data.decode("latin-1")  # JSON of numbers is ASCII; anything else fails below
        sizes = []
        while self._text:
            text = self._text.lstrip()
            end = text.find("}")
            if (end if end >= 0 else len(text)) > _MAX_SIZE_TEXT:
                raise RemoteCommandError("terminal size is not a short JSON object")
            if end < 0:
                self._text = text
                break
            sizes.append(_parse_size(text[: end + 1]))
            self._text = text[end + 1 :]
        return sizes


def _parse_size(text: str) -> TerminalSize:
    try:
        # Go matches field names without regard to case, and clients rely on it.
        fields = {str(k).lower(): v for k, v in json.loads(text).items()}
        width, height = fields["width"], fields["height"]
    except (ValueError, KeyError, AttributeError) as error:
        raise RemoteCommandError("terminal size is not a JSON object with Width and Height") from error
    if not all(type(n) is int and 0 <= n < 1 << 16 for n in (width, height)):
        raise RemoteCommandError("terminal size is out of range")
    return TerminalSize(width, height)


@dataclass(frozen=True, slots=True)
class ChannelData:
    """Data for a channel; eof: it was the last."""

    channel: int
    data: bytes
    eof: bool = False


class ChannelDecoder:
    """WebSocket messages → channel data. A binary message is passed on piece by piece; a base64 one is kept until whole."""

    def __init__(self, version: Version) -> None:
        self._version = version
        self._channel: int | None = None
        self._closing = bytearray()
        self._text = bytearray()

    def feed(self, part: MessagePart) -> list[ChannelData]:
        """Raises: RemoteCommandError."""
        if self._version.base64:
            return self._feed_base64(part)
        data = part.data
        if part.first:
            self._channel = None
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        if self._channel == _CLOSE_CHANNEL and self._version.number >= 5:
            return self._feed_close(data, last=part.last)
        return [ChannelData(self._channel, data)] if data and self._channel is not None else []

    def _feed_close(self, data: bytes, *, last: bool) -> list[ChannelData]:
        self._closing += data
        if len(self._closing) > 1:
            raise RemoteCommandError("close message names more than one channel")
        if not last or not self._closing:
            return []
        return [ChannelData(self._closing.pop(), b"", eof=True)]

    def _feed_base64(self, part: MessagePart) -> list[ChannelData]:
        self._text += part.data
        if len(self._text) > _MAX_BASE64_MESSAGE:
            raise RemoteCommandError(f"base64 message of more than {_MAX_BASE64_MESSAGE} bytes")
        if not part.last:
            return []
        text, self._text = bytes(self._text), bytearray()
        if not text:
            return []
        try:
            data = base64.b64decode(text[1:], validate=True)
        except binascii.Error as error:
            raise RemoteCommandError("message is not base64") from error
        return [ChannelData(text[0] - ord("0"), data)] if data else []


def role_of(channel: int) -> Role:
    """What a channel carries. Raises: RemoteCommandError."""
    if channel not in _ROLES:
        raise RemoteCommandError(f"there is no channel {channel}")
    return _ROLES[channel]


def channel_message(channel: int, data: bytes, *, as_base64: bool) -> bytes:
    """One frame that carries data on a channel."""
    if as_base64:
        return frame(Opcode.TEXT, bytes([ord("0") + channel]) + base64.b64encode(data))
    return frame(Opcode.BINARY, bytes([channel]) + data)
