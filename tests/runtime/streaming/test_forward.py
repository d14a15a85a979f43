from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from imgsvc.runtime.settings import StreamSettings
from imgsvc.runtime.streaming.server import StreamServer
from tests.runtime.streaming.targets import LoopbackPorts
from tests.runtime.streaming.test_server import serving
from tests.support.stream_client import SpdyClient, masked, spdy_session, tunnel_session, upgrade, websocket_headers, websocket_session
from tests.support.waiting import until

MB = 1000 * 1000
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[int]:
    """A loopback server; yields its port."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def echo_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything back, then the end, after the client's end."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    writer.close()


async def free_port() -> int:
    async with listening(echo_server) as port:
        return port


def session(kind: str, server: StreamServer) -> contextlib.AbstractAsyncContextManager[SpdyClient]:
    url = server.port_forward_url(LoopbackPorts(), [])
    return tunnel_session(url) if kind == "tunnel" else spdy_session(url, "portforward.k8s.io")


async def open_pair(client: SpdyClient, port: int, request: int) -> tuple[int, int]:
    """The streams of one connection: data, error."""
    headers = {"port": str(port), "requestid": str(request)}
    error = await client.open(headers | {"streamtype": "error"}, fin=True)
    data = await client.open(headers | {"streamtype": "data"})
    return data, error


BOTH = pytest.mark.parametrize("kind", ["spdy", "tunnel"])


@BOTH
def test_50_mb_each_way_byte_for_byte(kind: str) -> None:
    sent = random.Random(2).randbytes(50 * MB)

    async def scenario() -> None:
        async with serving() as server, listening(echo_server) as port, session(kind, server) as client:
            data, error = await open_pair(client, port, 0)
            await client.write(data, sent, fin=True)
            await client.until(lambda s: s.ended >= {data, error})
            assert client.state.received[data] == sent
            assert client.state.received[error] == b""

    asyncio.run(scenario())


@BOTH
def test_100_connections_side_by_side_leave_nothing(kind: str) -> None:
    async def scenario() -> None:
        async with serving() as server, listening(echo_server) as port, session(kind, server) as client:
            before = len(os.listdir("/proc/self/fd"))
            pairs = [await open_pair(client, port, n) for n in range(100)]
            for n, (data, _) in enumerate(pairs):
                await client.write(data, str(n).encode() * 100, fin=True)
            await client.until(lambda s: s.ended >= {i for pair in pairs for i in pair})
            assert all(client.state.received[data] == str(n).encode() * 100 for n, (data, _) in enumerate(pairs))
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    asyncio.run(scenario())


def test_a_refused_connection_is_reported_and_the_session_goes_on() -> None:
    async def scenario() -> None:
        closed = await free_port()
        async with serving() as server, listening(echo_server) as port, session("spdy", server) as client:
            data, error = await open_pair(client, closed, 0)
            await client.until(lambda s: s.ended >= {data, error} and data in s.reset)
            assert str(closed).encode() in client.state.received[error]
            good, _ = await open_pair(client, port, 1)
            await client.write(good, b"still here", fin=True)
            await client.until(lambda s: good in s.ended)
            assert client.state.received[good] == b"still here"

    asyncio.run(scenario())


def test_a_server_that_ends_first_may_still_be_sent_to() -> None:
    late = bytearray()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"goodbye")
        writer.write_eof()
        late.extend(await reader.read())
        writer.close()

    async def scenario() -> None:
        async with serving() as server, listening(handler) as port, session("spdy", server) as client:
            data, error = await open_pair(client, port, 0)
            await client.until(lambda s: s.ended >= {data, error})
            assert client.state.received[data] == b"goodbye"
            await client.write(data, b"last words", fin=True)
            await until(lambda: late == b"last words")

    asyncio.run(scenario())


def test_c_c8_a_reset_stream_closes_its_connection() -> None:
    connected, ended = asyncio.Event(), asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        ended.set()
        writer.close()

    async def scenario() -> None:
        async with serving() as server, listening(handler) as port, session("spdy", server) as client:
            data, _ = await open_pair(client, port, 0)
            await connected.wait()
            await client.give_up(data)
            await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(scenario())


def test_a_client_that_vanishes_closes_all_connections() -> None:
    connected: list[Any] = []
    gone = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal gone
        connected.append(writer)
        await reader.read()
        gone += 1
        writer.close()

    async def scenario() -> None:
        async with serving() as server, listening(handler) as port:
            async with session("tunnel", server) as client:
                for n in range(20):
                    await open_pair(client, port, n)
                await until(lambda: len(connected) == 20)
            await until(lambda: gone == 20)
            await until(lambda: not server._sessions)

    asyncio.run(scenario())


def test_bad_and_lonely_streams_are_reset() -> None:
    async def scenario() -> None:
        async with serving(stream_creation_timeout_s=0.2) as server, session("spdy", server) as client:
            bad = await client.open({"streamtype": "data", "port": "99999", "requestid": "1"})
            lonely = await client.open({"streamtype": "data", "port": "80", "requestid": "2"})
            await client.until(lambda s: set(s.reset) == {bad, lonely})

    asyncio.run(scenario())


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v4.base64.channel.k8s.io"])
def test_websocket_channels(protocol: str) -> None:
    async def scenario() -> None:
        closed = await free_port()

        async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readexactly(4)).upper())
            writer.close()

        async with serving(StreamSettings()) as server, listening(once) as port:
            url = server.port_forward_url(LoopbackPorts(), [port, closed])
            async with websocket_session(url, protocol) as client:
                await client.raw(masked(1, b"0YWJjZA==") if "base64" in protocol else masked(2, b"\0abcd"))
                await client.until(lambda: client.close_code == 1000)
                greeting = port.to_bytes(2, "little")
                assert client.channels[0] == greeting + b"ABCD"
                assert client.channels[1] == greeting
                assert client.channels[2] == closed.to_bytes(2, "little")
                assert str(closed).encode() in client.channels[3][2:]

    asyncio.run(scenario())


def test_c_c9_data_for_a_channel_that_is_not_there_ends_the_session() -> None:
    async def scenario() -> None:
        async with serving() as server, listening(echo_server) as port:
            url = server.port_forward_url(LoopbackPorts(), [port])
            _, reader, writer = await upgrade(url, websocket_headers("v4.channel.k8s.io"))
            writer.write(masked(2, b"\x02abc"))
            assert b"\x88\x02\x03\xea" in await reader.read()
            writer.close()

    asyncio.run(scenario())
