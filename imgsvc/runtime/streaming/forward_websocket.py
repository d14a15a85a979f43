"""Port-forward over WebSocket: SPDY inside a tunnel, or (older clients) two channels per port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from imgsvc.base.concurrency import stop_tasks
from imgsvc.runtime.streaming import websocket
from imgsvc.runtime.streaming.flow import Inbox, until_first
from imgsvc.runtime.streaming.forward import forward
from imgsvc.runtime.streaming.interfaces import PortTarget
from imgsvc.runtime.streaming.peer import Peer
from imgsvc.runtime.streaming.portforward import port_greeting
from imgsvc.runtime.streaming.remotecommand import ChannelDecoder, RemoteCommandError, Version, channel_message

MAX_PORTS: Final = 64  # of one session: channels are numbered in one byte, two per port


class WebSocketTunnel:
    """A byte stream inside binary messages: a ByteChannel."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._receiver = websocket.Receiver()

    async def receive(self) -> bytes:
        """As Peer.receive. Raises: WebSocketError."""
        while data := await self._peer.receive():
            inner = b""
            for event in self._receiver.receive(data):
                match event:
                    case websocket.MessagePart():
                        inner += event.data
                    case websocket.Answer():
                        await self._peer.send(event.data)
                    case websocket.Closed():
                        await self._peer.send(event.answer)
                        return b""
            if inner:
                return inner
        return b""

    async def send(self, data: bytes) -> None:
        """As Peer.send."""
        if data:
            await self._peer.send(websocket.frame(websocket.Opcode.BINARY, data))


class WebSocketForward:
    """Channels 2i (data) and 2i+1 (error) for the i-th port; one connection for each."""

    def __init__(self, peer: Peer, version: Version, ports: Sequence[int], target: PortTarget) -> None:
        self._peer = peer
        self._base64 = version.base64
        self._ports = ports
        self._target = target
        self._receiver = websocket.Receiver()
        self._decoder = ChannelDecoder(version)
        self._inboxes = [Inbox() for _ in ports]

    async def serve(self) -> None:
        """Until all connections have ended, or the client leaves. Raises: WebSocketError, RemoteCommandError, PeerGone."""
        try:
            await until_first(self._pump(), self._forward_all())
        except (websocket.WebSocketError, RemoteCommandError):
            await self._peer.send(websocket.close_frame(websocket.CloseCode.PROTOCOL_ERROR))
            raise

    async def _pump(self) -> None:
        while data := await self._peer.receive():
            for event in self._receiver.receive(data):
                match event:
                    case websocket.MessagePart():
                        await self._channel_data(event)
                    case websocket.Answer():
                        await self._peer.send(event.data)
                    case websocket.Closed():
                        await self._peer.send(event.answer)
                        return

    async def _channel_data(self, part: websocket.MessagePart) -> None:
        for item in self._decoder.feed(part):
            index, is_error = divmod(item.channel, 2)
            if not 0 <= index < len(self._ports) or is_error:
                raise RemoteCommandError(f"channel {item.channel} takes no data")
            await self._inboxes[index].put(item.data)

    async def _forward_all(self) -> None:
        for channel, port in ((c, p) for i, p in enumerate(self._ports) for c in (2 * i, 2 * i + 1)):
            await self._send(channel, port_greeting(port))
        tasks = [asyncio.create_task(self._forward(i)) for i in range(len(self._ports))]
        try:
            await asyncio.gather(*tasks)
        finally:
            await stop_tasks(*tasks)
        await self._peer.send(websocket.close_frame(websocket.CloseCode.NORMAL))

    async def _forward(self, index: int) -> None:
        async def send(data: bytes) -> None:
            await self._send(2 * index, data)

        async def finish(error: str) -> None:
            if error:
                await self._send(2 * index + 1, error.encode())

        inbox = self._inboxes[index]
        try:
            await forward(self._target, self._ports[index], inbox, send, finish, half_close=False)
        finally:
            inbox.discard()

    async def _send(self, channel: int, data: bytes) -> None:
        await self._peer.send(channel_message(channel, data, as_base64=self._base64))
