from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from imgsvc.base.errors import InvalidArgument, NotFound
from imgsvc.runtime.settings import StreamSettings
from imgsvc.runtime.streaming.interfaces import Streams, StreamWants, TerminalSize
from imgsvc.runtime.streaming.server import MAX_HANDSHAKES, StreamServer
from tests.runtime.streaming.targets import ALL, OUTPUT, TERMINAL, LoopbackPorts, ScriptedTarget, echo, forever
from tests.support.stream_client import (
    data_frame,
    masked,
    run_spdy,
    run_websocket,
    spdy_headers,
    spdy_session,
    upgrade,
    websocket_headers,
    websocket_session,
)
from tests.support.waiting import until

MB = 1000 * 1000
BIG = 50 * MB
Runner = Callable[..., Coroutine[Any, Any, Any]]
TRANSPORTS = pytest.mark.parametrize("run", [run_spdy, run_websocket], ids=["spdy", "websocket"])


@contextlib.asynccontextmanager
async def serving(config: StreamSettings | None = None, **settings: Any) -> AsyncIterator[StreamServer]:
    server = StreamServer(config or StreamSettings(), **settings)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def resident() -> int:
    """[bytes] of memory this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@TRANSPORTS
def test_50_mb_each_way_byte_for_byte(run: Runner) -> None:
    sent = random.Random(1).randbytes(BIG)

    async def scenario() -> None:
        async with serving() as server:
            ended = await run(server.exec_url(ScriptedTarget(echo), ALL), ("stdin", "stdout", "stderr"), sent)
            assert ended.stdout == sent
            assert ended.stderr == str(BIG).encode()
            assert ended.exit_code == 0

    asyncio.run(scenario())


@TRANSPORTS
@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_exit_codes(run: Runner, code: int) -> None:
    async def script(streams: Streams) -> int:
        assert streams.stdin is None
        assert streams.stdout
        await streams.stdout.write(b"done")
        return code

    async def scenario() -> None:
        async with serving() as server:
            ended = await run(server.exec_url(ScriptedTarget(script), OUTPUT), ("stdout", "stderr"))
            assert (ended.stdout, ended.exit_code) == (b"done", code)

    asyncio.run(scenario())


@TRANSPORTS
def test_a_target_that_cannot_start_is_reported(run: Runner) -> None:
    async def script(streams: Streams) -> int:
        raise NotFound("the container is gone")

    async def scenario() -> None:
        async with serving() as server:
            ended = await run(server.attach_url(ScriptedTarget(script), OUTPUT), ("stdout", "stderr"))
            assert ended.status["reason"] == "InternalError"
            assert "the container is gone" in ended.status["message"]

    asyncio.run(scenario())


def test_spdy_resize() -> None:
    seen: list[TerminalSize | None] = []

    async def script(streams: Streams) -> int:
        assert streams.sizes
        while size := await streams.sizes.next():
            seen.append(size)
        return 0

    async def scenario() -> None:
        async with serving() as server, spdy_session(server.exec_url(ScriptedTarget(script), TERMINAL)) as client:
            ids = [await client.open({"streamtype": role}) for role in ("error", "stdin", "stdout", "resize")]
            await client.write(ids[3], b'{"Width":80,"Hei')
            await client.write(ids[3], b'ght":24}')
            await until(lambda: seen == [TerminalSize(80, 24)])
            await client.write(ids[3], b'{"Width":1,"Height":1}{"Width":132,"Height":50}', fin=True)
            await client.until(lambda s: s.ended >= set(ids))
            assert seen[-1] == TerminalSize(132, 50)

    asyncio.run(scenario())


def test_websocket_resize() -> None:
    async def script(streams: Streams) -> int:
        assert streams.sizes
        size = await streams.sizes.next()
        assert size
        return size.width

    async def scenario() -> None:
        async with serving() as server, websocket_session(server.exec_url(ScriptedTarget(script), TERMINAL)) as client:
            await client.write(4, b'{"Width":99,"Height":24}')
            await client.until(lambda: client.close_code == 1000)
            assert json.loads(client.channels[3])["details"]["causes"][0]["message"] == "99"

    asyncio.run(scenario())


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", ""])
def test_older_websocket_protocols(protocol: str) -> None:
    async def script(streams: Streams) -> int:
        assert streams.stdout
        await streams.stdout.write(b"out")
        return 7

    async def scenario() -> None:
        async with serving() as server, websocket_session(server.exec_url(ScriptedTarget(script), OUTPUT), protocol) as client:
            await client.until(lambda: client.close_code == 1000)
            assert client.channels[1] == b"out"
            expected = b"NonZeroExitCode" if protocol.startswith("v4") else b"command terminated with exit code 7"
            assert expected in client.channels[3]
            assert client.opcodes[0] == (1 if "base64" in protocol else 2)

    asyncio.run(scenario())


def test_a_websocket_starts_with_an_empty_message_on_the_first_output() -> None:
    async def scenario() -> None:
        wants = StreamWants(stdin=True, stdout=False, stderr=True, tty=False)
        async with serving() as server:
            url = server.exec_url(ScriptedTarget(forever), wants)
            _, reader, writer = await upgrade(url, websocket_headers("v5.channel.k8s.io"))
            assert await reader.readexactly(3) == b"\x82\x01\x02"
            writer.close()

    asyncio.run(scenario())


def test_pings_are_answered_during_a_session() -> None:
    async def scenario() -> None:
        async with serving() as server:
            async with websocket_session(server.exec_url(ScriptedTarget(forever), OUTPUT)) as client:
                await client.raw(masked(9, b"are you there"))
                await client.until(lambda: 10 in client.opcodes)
            async with spdy_session(server.exec_url(ScriptedTarget(forever), OUTPUT)) as spdy:
                await spdy.raw(b"\x80\x03\x00\x06\0\0\0\x04\0\0\0\x09")
                await spdy.until(lambda s: s.pings == [9])

    asyncio.run(scenario())


async def status_of(url: str, headers: dict[str, str], method: str = "POST") -> int:
    answer, _, writer = await upgrade(url, headers, method=method)
    writer.close()
    return answer.status


def test_c_c10_wrong_addresses_are_404() -> None:
    async def scenario() -> None:
        async with serving() as server:
            url = server.exec_url(ScriptedTarget(forever), OUTPUT)
            base, _, token = url.rpartition("/")
            headers = spdy_headers("v4.channel.k8s.io")
            assert await status_of(f"{base}/{'A' * 22}", headers) == 404
            assert await status_of(f"{base}/", headers) == 404
            assert await status_of(f"{url}/more", headers) == 404
            assert await status_of(f"{base.replace('exec', 'attach')}/{token}", headers) == 404
            assert await status_of(f"{base.rpartition('/')[0]}/{token}", headers) == 404
            assert await status_of(url, headers) == 101
            assert await status_of(url, headers) == 404

    asyncio.run(scenario())


def test_a_refused_proposal_leaves_the_address_usable() -> None:
    async def scenario() -> None:
        async with serving() as server:
            url = server.exec_url(ScriptedTarget(forever), OUTPUT)
            assert await status_of(url, {}) == 400
            assert await status_of(url, spdy_headers("v9.channel.k8s.io")) == 403
            assert await status_of(url, websocket_headers("chat")) == 403
            assert await status_of(url, spdy_headers("v4.channel.k8s.io"), "DELETE") == 405
            assert await status_of(url, spdy_headers("v4.channel.k8s.io"), "GET") == 101

    asyncio.run(scenario())


def test_a_request_head_without_end_is_431() -> None:
    async def scenario() -> None:
        async with serving() as server:
            host, port = server.exec_url(ScriptedTarget(forever), OUTPUT).split("/")[2].split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 40_000)
            assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
            writer.close()

    asyncio.run(scenario())


def test_c_c8_S14_connections_that_say_nothing_are_bounded_and_keep_nobody_out() -> None:
    async def scenario() -> None:
        async with serving() as server:
            url = server.exec_url(ScriptedTarget(forever), OUTPUT)
            host, port = url.split("/")[2].split(":")
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_HANDSHAKES + 44)]
            for _, writer in silent:
                writer.write(b"GET / HTTP/1.1\r\n")
            assert await silent[0][0].read() == b""  # the oldest ones make room
            await until(lambda: len(server._handshakes) == MAX_HANDSHAKES)
            assert await status_of(url, spdy_headers("v4.channel.k8s.io")) == 101
            for _, writer in silent:
                writer.close()
            await until(lambda: not server._handshakes)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "wants",
    [StreamWants(stdin=True, stdout=True, stderr=True, tty=True), StreamWants(stdin=False, stdout=False, stderr=False, tty=False)],
)
def test_what_cri_forbids_gets_no_address(wants: StreamWants) -> None:
    async def scenario() -> None:
        async with serving() as server:
            with pytest.raises(InvalidArgument):
                server.exec_url(ScriptedTarget(forever), wants)

    asyncio.run(scenario())


@pytest.mark.parametrize("ports", [[0], [65536], [-1], list(range(1, 200))])
def test_bad_ports_get_no_address(ports: list[int]) -> None:
    async def scenario() -> None:
        async with serving() as server:
            with pytest.raises(InvalidArgument):
                server.port_forward_url(LoopbackPorts(), ports)

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.1", "::", "localhost", ""])
def test_c_c10_other_addresses_than_loopback_need_tls(address: str) -> None:
    with pytest.raises(InvalidArgument):
        asyncio.run(StreamServer(StreamSettings(address=address)).start())


def test_ipv6_loopback() -> None:
    async def scenario() -> None:
        async with serving(StreamSettings(address="::1")) as server:
            url = server.exec_url(ScriptedTarget(forever), OUTPUT)
            assert url.startswith("http://[::1]:")
            assert await status_of(url, spdy_headers("v4.channel.k8s.io")) == 101

    asyncio.run(scenario())


def test_streams_that_are_not_opened_in_time_end_the_session() -> None:
    async def scenario() -> None:
        async with serving(stream_creation_timeout_s=0.2) as server:
            target = ScriptedTarget(echo)
            async with spdy_session(server.exec_url(target, ALL)) as client:
                await client.open({"streamtype": "error"})
                await client.until(lambda s: s.closed)
            assert not target.started.is_set()

    asyncio.run(scenario())


def test_streams_of_no_use_are_reset() -> None:
    async def scenario() -> None:
        async with serving() as server, spdy_session(server.exec_url(ScriptedTarget(forever), OUTPUT)) as client:
            bad = [await client.open(h) for h in ({"streamtype": "error"}, {"streamtype": "error"}, {"streamtype": "video"}, {})]
            await client.until(lambda s: set(s.reset) == set(bad[1:]) and s.replied == {bad[0]})

    asyncio.run(scenario())


def test_idle_sessions_end() -> None:
    async def scenario() -> None:
        target = ScriptedTarget(forever)
        async with serving(StreamSettings(idle_timeout=0.4)) as server, websocket_session(server.exec_url(target, OUTPUT)) as client:
            await client.until(lambda: client.closed)
            assert target.cancelled

    asyncio.run(scenario())


@pytest.mark.parametrize("session", [spdy_session, websocket_session], ids=["spdy", "websocket"])
def test_c_c8_a_client_that_vanishes_cancels_its_target(session: Any) -> None:
    async def scenario() -> None:
        async with serving() as server:
            target = ScriptedTarget(forever)
            async with session(server.exec_url(target, OUTPUT)) as client:
                if session is spdy_session:
                    for role in ("error", "stdout", "stderr"):
                        await client.open({"streamtype": role})
                await target.started.wait()
            await asyncio.wait_for(target.ended.wait(), 5)
            assert target.cancelled
            await until(lambda: not server._sessions)

    asyncio.run(scenario())


def test_c_c8_a_client_that_vanishes_is_seen_while_nothing_is_read_from_it() -> None:
    async def scenario() -> None:
        async with serving() as server:
            target = ScriptedTarget(forever)
            url = urlsplit(server.exec_url(target, ALL))
            fields = "".join(f"{k}: {v}\r\n" for k, v in websocket_headers("v5.channel.k8s.io").items())
            with socket.create_connection((url.hostname, url.port)) as client:
                client.sendall(f"GET {url.path} HTTP/1.1\r\n{fields}\r\n".encode())
                await target.started.wait()
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(1000):
                        client.send(masked(2, b"\0" + bytes(MB)))
                        await asyncio.sleep(0.01)
            # The client read nothing, so its kernel resets the connection instead of queueing an end behind the data.
            await asyncio.wait_for(target.ended.wait(), 10)
            assert target.cancelled

    asyncio.run(scenario())


def test_c_c9_protocol_errors_end_the_session_and_its_target() -> None:
    async def scenario() -> None:
        async with serving() as server:
            target = ScriptedTarget(forever)
            async with websocket_session(server.exec_url(target, OUTPUT)) as client:
                await client.raw(masked(2, b"\x09nonsense"))
                await client.until(lambda: client.close_code == 1002)
            await asyncio.wait_for(target.ended.wait(), 5)
            spdy_target = ScriptedTarget(forever)
            async with spdy_session(server.exec_url(spdy_target, OUTPUT)) as spdy:
                for role in ("error", "stdout", "stderr"):
                    await spdy.open({"streamtype": role})
                await spdy_target.started.wait()
                await spdy.raw(data_frame(99, b"x"))
                await spdy.until(lambda s: s.gone_away == 1)
            await asyncio.wait_for(spdy_target.ended.wait(), 5)

    asyncio.run(scenario())


def test_closing_the_server_ends_all_sessions() -> None:
    async def scenario() -> None:
        target = ScriptedTarget(forever)
        async with serving() as server:
            session = websocket_session(server.exec_url(target, OUTPUT))
            client = await session.__aenter__()
            await target.started.wait()
            await server.close()
            assert target.cancelled
            await client.until(lambda: client.closed)
            await session.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_a_client_that_never_reads_costs_bounded_memory() -> None:
    sent = 0

    async def script(streams: Streams) -> int:
        nonlocal sent
        assert streams.stdout
        while True:
            await streams.stdout.write(bytes(65536))
            sent += 65536

    async def scenario() -> None:
        async with serving() as server:
            url = server.exec_url(ScriptedTarget(script), OUTPUT)
            _, _, writer = await upgrade(url, websocket_headers("v5.channel.k8s.io"))
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # a ReadTransport too
            before = resident()
            at_rest = -1
            async with asyncio.timeout(60):
                while sent != at_rest:
                    at_rest = sent
                    await asyncio.sleep(1.0)
            assert resident() - before < 16 * MB
            writer.transport.abort()

    asyncio.run(scenario())


def test_a_target_that_never_reads_holds_its_client_back() -> None:
    async def scenario() -> None:
        async with serving() as server, websocket_session(server.exec_url(ScriptedTarget(forever), ALL)) as client:
            before = resident()
            chunk, written = masked(2, b"\0" + bytes(32768)), 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    while True:
                        await client.raw(chunk)
                        written += 32768
            assert written < 30 * MB  # kernel buffers of a loopback connection
            assert resident() - before < 16 * MB

    asyncio.run(scenario())


def test_a_slow_client_still_gets_everything_and_the_status() -> None:
    async def script(streams: Streams) -> int:
        assert streams.stdout
        await streams.stdout.write(bytes(8 * MB))
        return 3

    async def scenario() -> None:
        async with serving() as server:
            url = server.exec_url(ScriptedTarget(script), OUTPUT)
            _, reader, writer = await upgrade(url, websocket_headers("v5.channel.k8s.io"))
            got = b""
            while data := await reader.read(400_000):
                got += data
                await asyncio.sleep(0.01)
            assert len(got) > 8 * MB
            assert b"NonZeroExitCode" in got[-400:]
            assert got[-4:] == b"\x88\x02" + struct.pack(">H", 1000)
            writer.close()

    asyncio.run(scenario())


def test_200_sessions_side_by_side_leave_nothing() -> None:
    async def scenario() -> None:
        async with serving() as server:
            before = len(os.listdir("/proc/self/fd"))
            urls = [server.exec_url(ScriptedTarget(echo), ALL) for _ in range(200)]
            runs = [(run_spdy, run_websocket)[i % 2](url, ("stdin", "stdout", "stderr"), b"x" * i) for i, url in enumerate(urls)]
            results = await asyncio.gather(*runs)
            assert [r.stdout for r in results] == [b"x" * i for i in range(200)]
            await until(lambda: not server._sessions)
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    asyncio.run(scenario())
