"""The client's requests and answers as httpx's: hooks, other transports, and what httpx must not do by itself."""

from __future__ import annotations

import logging
import mmap
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx
import pytest

from imgsvc.base.oci import MIB
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.bulk import BulkTransport
from imgsvc.registry.http.exchange import (
    Body,
    RequestFailed,
    Route,
    Timeouts,
    header_of,
    phase_of,
    read_body,
    request_for,
    route_of,
    url_of,
)
from imgsvc.registry.http.sender import Sender
from imgsvc.registry.http.transport import Transport
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.support import QUICK, noise, run

ROUTE = Route(Tls())


@pytest.mark.parametrize("transport", [Transport, BulkTransport])
def test_hooks_and_traces_see_every_request(transport: type[Transport | BulkTransport], caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    async def asked(request: httpx.Request) -> None:
        seen.append(f"{request.method} {request.url.path} {phase_of(request)} {route_of(request) == ROUTE}")
        request.headers["X-Hook"] = "1"

    async def told(response: httpx.Response) -> None:
        seen.append(f"{response.status_code} {response.headers['x-word']} {response.request.url.path}")

    async def main() -> None:
        caplog.set_level(logging.DEBUG, "imgsvc")
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {"X-Word": "w"}, b"ok")))
            sender = Sender(transport(), QUICK)
            sender.client.event_hooks["request"].append(asked)
            sender.client.event_hooks["response"].append(told)
            async with aclosing(await sender.send("GET", f"{fake.url}/x", [], route=ROUTE, phase="fetch")) as response:
                assert await read_body(response, 10) == b"ok"
            await sender.close()
            assert fake.requests[0].headers["x-hook"] == "1"
        assert seen == ["GET /x fetch True", "200 w /x"]
        assert "/x: 200 after" in caplog.text

    run(main())


def test_another_transport_takes_the_place_of_ours() -> None:
    async def main() -> None:
        sender = Sender(httpx.MockTransport(lambda _: httpx.Response(200, content=pieces())), Timeouts())
        async with aclosing(await sender.send("GET", "http://r.test/v2/a", [], route=ROUTE, phase="resolve")) as response:
            assert await read_body(response, 100) == b"ab"

    run(main())


def test_our_transport_serves_a_plain_client() -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {"Content-Encoding": "identity"}, b"ok")))
            told: list[str] = []

            async def trace(name: str, info: object) -> None:
                told.append(name)

            async with httpx.AsyncClient(transport=Transport(), trust_env=False) as client:
                assert (await client.get(f"{fake.url}/x", extensions={"trace": trace})).text == "ok"
            assert "connection.connect_tcp.started" in told

    run(main())


@pytest.mark.parametrize("location", ["http://[bad", "http://r.test:x/", "/else\x7f", "http://[::1/\u00fc"])
def test_httpx_neither_follows_nor_reads_a_redirect_and_keeps_no_cookie(location: str) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(307, {"Location": location, "Set-Cookie": "a=b"})))
            sender = Sender(Transport(), QUICK)
            for _ in range(2):
                async with aclosing(await sender.send("GET", f"{fake.url}/x", [], route=ROUTE, phase="fetch")) as response:
                    assert (response.status_code, header_of(response, "location")) == (307, location)
            await sender.close()
            assert not sender.client.cookies.jar
            assert ["cookie" in request.headers for request in fake.requests] == [False, False]

    run(main())


def test_of_two_values_the_first_counts_and_bytes_are_characters() -> None:
    headers = [(b"Location", b"/a"), (b"Location", b"/b"), (b"Warning", "z\u00fc".encode())]
    response = httpx.Response(200, headers=headers)
    response.headers.encoding = "latin-1"
    assert header_of(response, "location") == "/a"
    assert header_of(response, "warning") == "z\u00c3\u00bc"
    assert header_of(response, "etag") == ""


@pytest.mark.parametrize("address", ["http://R.test:80/a/../b?x='|%7e", "https://[::1]:443/%zz"])
def test_an_address_is_sent_and_told_as_it_was_given(address: str) -> None:
    request = request_for("GET", address, [], route=ROUTE, phase="fetch", timeouts=QUICK)
    assert url_of(request) == address
    assert address.endswith(request.extensions["target"].decode())
    assert request.headers["host"] == address.split("/")[2]


async def pieces() -> AsyncIterator[bytes]:
    yield b"ab"


@pytest.mark.parametrize(
    "method, body, length, expected",
    [
        ("GET", b"", None, {}),
        ("POST", b"", None, {"content-length": "0"}),
        ("PUT", b"abc", None, {"content-length": "3"}),
        ("PUT", pieces(), 2, {"content-length": "2"}),
        ("PUT", pieces(), None, {"transfer-encoding": "chunked"}),
    ],
)
def test_a_request_says_how_long_its_body_is(method: str, body: Body, length: int | None, expected: dict[str, str]) -> None:
    request = request_for(method, "http://r.test/", [], route=ROUTE, phase="push", timeouts=QUICK, body=body, length=length)
    assert dict(request.headers) == {"host": "r.test", **expected}


@pytest.mark.parametrize("name, value", [("X-A", "a\r\nB: c"), ("X-\u00fc", "secret"), ("X-A", "\u0416")])
def test_what_cannot_be_sent_is_refused_without_being_quoted(name: str, value: str) -> None:
    with pytest.raises(RequestFailed, match="characters that cannot be sent") as caught:
        request_for("GET", "http://r.test/", [(name, value)], route=ROUTE, phase="push", timeouts=QUICK)
    assert caught.value.__cause__ is None
    assert value not in str(caught.value)


def test_a_body_from_the_download_process_is_looked_at_where_it_came_into_memory() -> None:
    async def main() -> None:
        data = noise(3 * MIB)
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {}, data)))
            sender = Sender(BulkTransport(), QUICK)
            got = b""
            async with aclosing(await sender.send("GET", f"{fake.url}/x", [], route=ROUTE, phase="fetch")) as response:
                async for chunk in response.aiter_raw():
                    lot: object = chunk
                    assert isinstance(lot, memoryview)
                    assert isinstance(lot.obj, mmap.mmap)
                    got += lot
            await sender.close()
            assert got == data

    run(main())
