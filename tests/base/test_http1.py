"""The small HTTP server."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator

import httpx
import pytest

from imgsvc.base.errors import InvalidArgument, Unavailable
from imgsvc.base.http1 import FileBody, HttpServer, Request, Response, StreamBody, is_loopback, parse_range, split_address

DATA = os.urandom(3 * 1024 * 1024 + 7)


def file_body(offset: int, count: int) -> FileBody:
    with tempfile.TemporaryFile() as stream:
        stream.write(DATA)
        stream.flush()
        return FileBody(os.dup(stream.fileno()), offset, count)


async def chunks() -> AsyncIterator[FileBody]:
    whole = file_body(0, len(DATA))
    try:
        for at in range(0, len(DATA), 65536):
            await asyncio.sleep(0)
            yield FileBody(whole.fd, at, min(65536, len(DATA) - at))
    finally:
        os.close(whole.fd)


async def handler(request: Request) -> Response:
    match request.path:
        case "/file":
            return Response(200, [], file_body(0, len(DATA)))
        case "/part":
            return Response(206, [], file_body(100, 1000))
        case "/stream":
            return Response(200, [], StreamBody(chunks(), len(DATA)))
        case "/short":
            return Response(200, [], StreamBody(chunks(), len(DATA) + 1))
        case "/bug":
            raise ZeroDivisionError
        case _:
            return Response(200, [("X-Path", request.path)], repr(dict(request.query)).encode())


def serve(work: str, **options: object) -> httpx.Response:
    async def run() -> httpx.Response:
        server = HttpServer(handler, "test")
        await server.start("127.0.0.1:0")
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
                return await client.request(str(options.get("method", "GET")), work, content=options.get("content"))  # type: ignore[arg-type]
        finally:
            await server.close()

    return asyncio.run(run())


@pytest.mark.parametrize("path, expected", [("/file", DATA), ("/part", DATA[100:1100]), ("/stream", DATA), ("/x?a=1&a=2&b=", None)])
def test_bodies(path: str, expected: bytes | None) -> None:
    answer = serve(path)

    assert answer.content == (expected if expected is not None else b"{'a': ['1', '2'], 'b': ['']}")
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_head_has_the_length_and_no_body() -> None:
    answer = serve("/file", method="HEAD")

    assert answer.content == b""
    assert answer.headers["content-length"] == str(len(DATA))


def test_methods_bodies_and_bugs() -> None:
    assert serve("/x", method="POST").status_code == 405
    assert serve("/x", content=b"body").status_code == 413
    assert serve("/bug").status_code == 500


def test_a_stream_that_ends_early_is_a_broken_answer_not_a_short_one() -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        serve("/short")


def test_one_connection_serves_many_requests_and_no_descriptor_is_left() -> None:
    async def run() -> None:
        server = HttpServer(handler, "test")
        await server.start("127.0.0.1:0")
        before = len(os.listdir("/proc/self/fd"))
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", limits=limits, trust_env=False) as client:
            for _ in range(20):
                assert (await client.get("/part")).content == DATA[100:1100]
            assert len(os.listdir("/proc/self/fd")) <= before + 2
        await server.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /?" + b"a&" * 100 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + bytes(100) + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_an_error_or_nothing_and_the_server_goes_on(raw: bytes) -> None:
    async def run() -> bytes:
        server = HttpServer(handler, "test")
        await server.start("127.0.0.1:0")
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw)
            try:
                answer = await asyncio.wait_for(reader.read(65536), 5)
            except ConnectionResetError:
                answer = b""
            writer.close()
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"http://127.0.0.1:{server.port}/x")).status_code == 200
            return answer
        finally:
            await server.close()

    answer = asyncio.run(run())
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("bytes=0-99", (0, 100)),
        ("bytes=990-2000", (990, 10)),
        ("bytes=10-", (10, 990)),
        ("bytes=-10", (990, 10)),
        ("bytes=-5000", (0, 1000)),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,5-6", None),
        ("items=0-1", None),
        ("bytes=0x1-2", None),
    ],
)
def test_ranges(text: str, expected: tuple[int, int] | None) -> None:
    assert parse_range(text, 1000) == expected


@pytest.mark.parametrize("text", ["bytes=1000-", "bytes=99999-100000", "bytes=-0"])
def test_ranges_outside(text: str) -> None:
    with pytest.raises(ValueError, match=r"end|empty"):
        parse_range(text, 1000)


def test_addresses() -> None:
    assert split_address("[::1]:80", "x") == ("::1", 80)
    assert is_loopback("127.0.0.1:1")
    assert is_loopback("[::1]:1")
    assert not is_loopback("0.0.0.0:1")
    assert not is_loopback("node.example:1")
    for bad in ("127.0.0.1", ":80", "h:port", "h:99999"):
        with pytest.raises(InvalidArgument):
            split_address(bad, "x")


def test_an_address_that_is_taken_is_an_error_with_its_name() -> None:
    async def run() -> None:
        first, second = HttpServer(handler, "a"), HttpServer(handler, "b")
        await first.start("127.0.0.1:0")
        try:
            with pytest.raises(Unavailable, match="b address"):
                await second.start(f"127.0.0.1:{first.port}")
        finally:
            await first.close()

    asyncio.run(run())
