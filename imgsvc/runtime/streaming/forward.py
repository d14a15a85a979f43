"""Port-forward sessions over SPDY: many connections to one sandbox over one client connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from imgsvc.base.concurrency import stop_tasks
from imgsvc.base.errors import ImgsvcError
from imgsvc.runtime.streaming import spdy
from imgsvc.runtime.streaming.flow import Inbox
from imgsvc.runtime.streaming.interfaces import Connection, PortTarget
from imgsvc.runtime.streaming.portforward import Pair, Pairing, PortForwardError

_log = logging.getLogger(__name__)

Send = Callable[[bytes], Awaitable[None]]
Finish = Callable[[str], Awaitable[None]]


class ByteChannel(Protocol):
    """Where SPDY bytes come from and go to: the connection itself, or a tunnel inside a WebSocket."""

    async def receive(self) -> bytes:
        """As Peer.receive."""

    async def send(self, data: bytes) -> None:
        """As Peer.send."""


class SpdyForward:
    """A pair of streams for each forwarded connection."""

    def __init__(self, channel: ByteChannel, target: PortTarget, *, pair_timeout_s: float) -> None:
        self._pair_timeout_s = pair_timeout_s
        self._channel = channel
        self._target = target
        self._session = spdy.Session()
        self._pairing = Pairing()
        self._inboxes: dict[int, Inbox] = {}  # by data stream
        self._connections: dict[int, asyncio.Task[None]] = {}  # by data stream
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[int, asyncio.TimerHandle] = {}  # by stream that waits for its partner

    async def serve(self) -> None:
        """Until the client leaves. Raises: SpdyError, PeerGone, and what the channel raises."""
        try:
            while data := await self._channel.receive():
                for event in self._session.receive(data):
                    await self._handle(event)
        except spdy.SpdyError:
            await self._channel.send(self._session.go_away(protocol_error=True))
            raise
        finally:
            for timer in self._timers.values():
                timer.cancel()
            await stop_tasks(*self._tasks)

    async def _handle(self, event: spdy.Event) -> None:
        match event:
            case spdy.StreamOpened():
                await self._opened(event)
            case spdy.StreamData():
                if inbox := self._inboxes.get(event.stream_id):
                    await inbox.put(event.data)
                    if event.fin:
                        inbox.eof()
            case spdy.StreamReset():
                self._forget(event.stream_id)
            case spdy.Answer():
                await self._channel.send(event.data)
            case spdy.GoneAway():
                pass  # no new streams; the open ones go on

    async def _opened(self, event: spdy.StreamOpened) -> None:
        stream_id = event.stream_id
        try:
            pair = self._pairing.opened(stream_id, event.headers)
        except PortForwardError:
            await self._channel.send(self._session.reset(stream_id, spdy.Rst.PROTOCOL_ERROR))
            return
        if event.headers["streamtype"] == "data":
            inbox = self._inboxes[stream_id] = Inbox()
            if event.fin:
                inbox.eof()
        if pair is None:
            self._timers[stream_id] = asyncio.get_running_loop().call_later(self._pair_timeout_s, self._give_up, stream_id)
        await self._channel.send(self._session.reply(stream_id))
        if pair is not None:
            self._connect(pair)

    def _connect(self, pair: Pair) -> None:
        for stream_id in (pair.data_id, pair.error_id):
            self._stop_timer(stream_id)
        task = self._background(self._forward(pair, self._inboxes[pair.data_id]))
        self._connections[pair.data_id] = task
        task.add_done_callback(lambda _: self._connections.pop(pair.data_id, None))

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.log(logging.DEBUG if isinstance(error, ImgsvcError) else logging.ERROR, "forwarded connection ended", exc_info=error)

    def _give_up(self, stream_id: int) -> None:
        self._forget(stream_id)
        self._background(self._reset(stream_id))

    async def _reset(self, stream_id: int) -> None:
        await self._channel.send(self._session.reset(stream_id, spdy.Rst.CANCEL))

    def _stop_timer(self, stream_id: int) -> None:
        if timer := self._timers.pop(stream_id, None):
            timer.cancel()

    def _forget(self, stream_id: int) -> None:
        """The stream is gone, and with a data stream its connection."""
        self._pairing.dropped(stream_id)
        self._stop_timer(stream_id)
        if inbox := self._inboxes.pop(stream_id, None):
            inbox.discard()
        if task := self._connections.get(stream_id):
            task.cancel()

    async def _forward(self, pair: Pair, inbox: Inbox) -> None:
        async def send(data: bytes) -> None:
            await self._channel.send(self._session.data(pair.data_id, data))

        async def finish(error: str) -> None:
            # Clients wait for the end of the error stream before they let the connection go.
            end = self._session.data(pair.data_id, b"", fin=True)
            report = self._session.data(pair.error_id, error.encode(), fin=True)
            reset = self._session.reset(pair.data_id, spdy.Rst.CANCEL) if error else b""
            await self._channel.send(end + report + reset)

        try:
            await forward(self._target, pair.port, inbox, send, finish)
        finally:
            self._inboxes.pop(pair.data_id, None)
            inbox.discard()


async def forward(target: PortTarget, port: int, inbox: Inbox, send: Send, finish: Finish, *, half_close: bool = True) -> None:
    """Carry one connection. finish is called once, with an error text or "", when no more output will come.

    Args: half_close: the client can end its direction by itself, so wait for that.   Raises: what send and finish raise.
    """
    try:
        connection = await target.connect(port)
    except ImgsvcError as error:
        inbox.discard()
        await finish(str(error))
        return
    upload = asyncio.create_task(_upload(inbox, connection))
    try:
        error_text = await _download(connection, send)
        await finish(f"port {port}: {error_text}" if error_text else "")
        if half_close:
            await upload
    finally:
        await stop_tasks(upload)
        connection.close()


async def _upload(inbox: Inbox, connection: Connection) -> None:
    try:
        while data := await inbox.read():
            await connection.write(data)
    except OSError:
        inbox.discard()  # the server reads no more; what it has to say about that comes the other way
    else:
        connection.write_eof()


async def _download(connection: Connection, send: Send) -> str:
    try:
        while data := await connection.read():
            await send(data)
    except OSError as error:
        return error.strerror or str(error)
    return ""
