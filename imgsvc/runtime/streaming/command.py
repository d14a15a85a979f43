"""Exec and attach sessions: a target on one side, a SPDY or WebSocket client on the other."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import DeadlineExceeded, ImgsvcError
from imgsvc.runtime.streaming import remotecommand, spdy, websocket
from imgsvc.runtime.streaming.flow import Inbox, SizeBox, until_first
from imgsvc.runtime.streaming.interfaces import CommandTarget, Streams, StreamWants
from imgsvc.runtime.streaming.peer import Peer, PeerGone
from imgsvc.runtime.streaming.remotecommand import CHANNELS, Outcome, Role, Version, encode_status

_log = logging.getLogger(__name__)


class CommandWire(Protocol):
    """One protocol's half of a session."""

    stdin: Inbox
    sizes: SizeBox
    ready: asyncio.Event

    async def feed(self, data: bytes) -> bool:
        """Take bytes from the client. Waits while stdin is full. Returns False when nothing more will follow."""

    async def write(self, role: Role, data: bytes) -> None:
        """Send output. Raises: PeerGone."""

    def greeting(self) -> bytes:
        """What to send before anything else."""

    def farewell(self, status: bytes) -> bytes:
        """The status and the end of all streams."""

    def broken(self) -> bytes:
        """What to send after a protocol error."""


@dataclass(frozen=True, slots=True)
class _RoleSink:
    wire: CommandWire
    role: Role

    async def write(self, data: bytes) -> None:
        await self.wire.write(self.role, data)


class SpdyCommand:
    """remotecommand v1 to v4 over SPDY."""

    def __init__(self, peer: Peer, version: Version, wants: StreamWants) -> None:
        self.stdin = Inbox()
        self.sizes = SizeBox()
        self.ready = asyncio.Event()
        self._peer = peer
        self._session = spdy.Session()
        self._missing = set(remotecommand.expected_roles(wants, version))
        self._ids: dict[Role, int] = {}
        self._roles: dict[int, Role] = {}
        self._size_parser = remotecommand.SizeParser()

    async def feed(self, data: bytes) -> bool:
        """As CommandWire.feed."""
        for event in self._session.receive(data):
            match event:
                case spdy.StreamOpened():
                    await self._opened(event)
                case spdy.StreamData():
                    await self._data(event)
                case spdy.StreamReset():
                    self._ended(event.stream_id)
                case spdy.Answer():
                    await self._peer.send(event.data)
                case spdy.GoneAway():
                    pass  # the client opens no more streams; those that are open go on
        return True

    async def write(self, role: Role, data: bytes) -> None:
        """As CommandWire.write."""
        await self._peer.send(self._session.data(self._ids[role], data))

    def greeting(self) -> bytes:
        """As CommandWire.greeting."""
        return b""

    def farewell(self, status: bytes) -> bytes:
        """As CommandWire.farewell."""
        ends = [self._session.data(self._ids[Role.ERROR], status, fin=True)]
        ends += [self._session.data(stream_id, b"", fin=True) for stream_id in self._roles]
        return b"".join([*ends, self._session.go_away()])

    def broken(self) -> bytes:
        """As CommandWire.broken."""
        return self._session.go_away(protocol_error=True)

    async def _opened(self, event: spdy.StreamOpened) -> None:
        name = event.headers.get("streamtype", "")
        if name not in list(Role) or name in self._ids:
            await self._peer.send(self._session.reset(event.stream_id, spdy.Rst.PROTOCOL_ERROR))
            return
        role = Role(name)
        self._ids[role], self._roles[event.stream_id] = event.stream_id, role
        await self._peer.send(self._session.reply(event.stream_id))
        if event.fin:
            self._ended(event.stream_id)
        self._missing.discard(role)
        if not self._missing:
            self.ready.set()

    async def _data(self, event: spdy.StreamData) -> None:
        role = self._roles.get(event.stream_id)
        if role is Role.STDIN:
            await self.stdin.put(event.data)
        elif role is Role.RESIZE:
            for size in self._size_parser.feed(event.data):
                self.sizes.put(size)
        if event.fin:
            self._ended(event.stream_id)

    def _ended(self, stream_id: int) -> None:
        role = self._roles.get(stream_id)
        if role is Role.STDIN:
            self.stdin.eof()
        elif role is Role.RESIZE:
            self.sizes.eof()


class WebSocketCommand:
    """remotecommand v1, v4 and v5 over WebSocket."""

    def __init__(self, peer: Peer, version: Version, wants: StreamWants) -> None:
        self.stdin = Inbox()
        self.sizes = SizeBox()
        self.ready = asyncio.Event()
        self.ready.set()
        self._peer = peer
        self._version = version
        self._first_output = Role.STDOUT if wants.stdout else Role.STDERR if wants.stderr else Role.ERROR
        self._receiver = websocket.Receiver()
        self._decoder = remotecommand.ChannelDecoder(version)
        self._size_parser = remotecommand.SizeParser()
        self._close_sent = False

    async def feed(self, data: bytes) -> bool:
        """As CommandWire.feed."""
        for event in self._receiver.receive(data):
            match event:
                case websocket.MessagePart():
                    for item in self._decoder.feed(event):
                        await self._channel_data(item)
                case websocket.Answer():
                    await self._peer.send(event.data)
                case websocket.Closed():
                    if not self._close_sent:
                        await self._peer.send(event.answer)
                    return False
        return True

    async def write(self, role: Role, data: bytes) -> None:
        """As CommandWire.write."""
        await self._peer.send(self._message(role, data))

    def greeting(self) -> bytes:
        """An empty message: it tells clients, and the proxies between, that the session stands."""
        return self._message(self._first_output, b"")

    def farewell(self, status: bytes) -> bytes:
        """As CommandWire.farewell."""
        self._close_sent = True
        message = self._message(Role.ERROR, status) if status else b""
        return message + websocket.close_frame(websocket.CloseCode.NORMAL)

    def broken(self) -> bytes:
        """As CommandWire.broken."""
        self._close_sent = True
        return websocket.close_frame(websocket.CloseCode.PROTOCOL_ERROR)

    def _message(self, role: Role, data: bytes) -> bytes:
        return remotecommand.channel_message(CHANNELS[role], data, as_base64=self._version.base64)

    async def _channel_data(self, item: remotecommand.ChannelData) -> None:
        role = remotecommand.role_of(item.channel)
        if role is Role.STDIN:
            await self.stdin.put(item.data)
            if item.eof:
                self.stdin.eof()
        elif role is Role.RESIZE:
            for size in self._size_parser.feed(item.data):
                self.sizes.put(size)


@dataclass(frozen=True, slots=True)
class CommandSession:
    """One client's use of a target."""

    wire: CommandWire
    version: Version
    wants: StreamWants
    target: CommandTarget

    async def serve(self, peer: Peer, creation_timeout_s: float) -> None:
        """Until the target has ended and its status is sent. The target is cancelled when the client leaves.

        Raises: ImgsvcError, saying why the session ended before its target did.
        """
        if not self.wants.stdin:
            self.wire.stdin.discard()
        await until_first(self._pump(peer), self._run(peer, creation_timeout_s), peer.watch())

    async def _pump(self, peer: Peer) -> None:
        try:
            while (data := await peer.receive()) and await self.wire.feed(data):
                pass
        except (spdy.SpdyError, websocket.WebSocketError, remotecommand.RemoteCommandError):
            await peer.send(self.wire.broken())
            await peer.flush()
            raise

    async def _run(self, peer: Peer, creation_timeout_s: float) -> None:
        await peer.send(self.wire.greeting())
        try:
            async with time_limit(creation_timeout_s):
                await self.wire.ready.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(f"the client did not open its streams within {creation_timeout_s:g} s") from error
        outcome = await self._outcome()
        self.wire.stdin.discard()
        await peer.send(self.wire.farewell(encode_status(outcome, self.version)))
        await peer.flush()

    async def _outcome(self) -> Outcome:
        try:
            return Outcome(exit_code=await self.target.run(self._streams()))
        except PeerGone:
            raise
        except ImgsvcError as error:
            return Outcome(error=str(error))
        except Exception:  # noqa: BLE001 - the edge of a session: the client gets an answer, the log the traceback
            _log.exception("streaming target failed")
            return Outcome(error="internal error; see the daemon's log")

    def _streams(self) -> Streams:
        return Streams(
            stdin=self.wire.stdin if self.wants.stdin else None,
            stdout=_RoleSink(self.wire, Role.STDOUT) if self.wants.stdout else None,
            stderr=_RoleSink(self.wire, Role.STDERR) if self.wants.stderr else None,
            sizes=self.wire.sizes if self.wants.tty else None,
        )
