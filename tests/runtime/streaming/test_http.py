from __future__ import annotations

import pytest

from imgsvc.runtime.streaming.http import HttpRefusal, Request, negotiate, parse_head, refuse
from imgsvc.runtime.streaming.remotecommand import SPDY_VERSIONS, WEBSOCKET_VERSIONS

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def head(*lines: str, request: str = "POST /exec/token?x=1 HTTP/1.1") -> Request:
    return parse_head(("\r\n".join([request, *lines]) + "\r\n\r\n").encode())


def test_head_is_taken_apart() -> None:
    request = head("Host: a", "X-List: a, b", "x-list:c ")
    assert (request.method, request.path) == ("POST", "/exec/token")
    assert request.values("X-List") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET http://x/ HTTP/1.1\r\n\r\n",
        b"G\0T / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nname : x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
    ],
)
def test_malformed_heads_are_400(raw: bytes) -> None:
    with pytest.raises(HttpRefusal) as caught:
        parse_head(raw)
    assert caught.value.status == 400


def spdy(*versions: str) -> Request:
    return head("Connection: keep-alive, Upgrade", "Upgrade: SPDY/3.1", *(f"X-Stream-Protocol-Version: {v}" for v in versions))


@pytest.mark.parametrize(
    "offered, chosen",
    [
        (("v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"), "v4.channel.k8s.io"),
        (("v2.channel.k8s.io, v4.channel.k8s.io",), "v2.channel.k8s.io"),
        (("channel.k8s.io",), "channel.k8s.io"),
    ],
)
def test_spdy_takes_the_first_it_has(offered: tuple[str, ...], chosen: str) -> None:
    upgrade = negotiate(spdy(*offered), spdy=SPDY_VERSIONS, websocket=WEBSOCKET_VERSIONS)
    assert (upgrade.websocket, upgrade.protocol) == (False, chosen)
    assert upgrade.response.startswith(b"HTTP/1.1 101 ")
    assert f"X-Stream-Protocol-Version: {chosen}\r\n".encode() in upgrade.response


def websocket(*lines: str, version: str = "13", key: str = KEY) -> Request:
    return head("Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Version: {version}", f"Sec-WebSocket-Key: {key}", *lines)


@pytest.mark.parametrize(
    "lines, chosen",
    [
        ((), ""),
        (("Sec-WebSocket-Protocol: v5.channel.k8s.io, v4.channel.k8s.io",), "v5.channel.k8s.io"),
        (("Sec-WebSocket-Protocol: v9.x", "Sec-WebSocket-Protocol: v4.base64.channel.k8s.io"), "v4.base64.channel.k8s.io"),
    ],
)
def test_websocket_takes_the_first_it_has(lines: tuple[str, ...], chosen: str) -> None:
    upgrade = negotiate(websocket(*lines), spdy=SPDY_VERSIONS, websocket=WEBSOCKET_VERSIONS)
    assert (upgrade.websocket, upgrade.protocol) == (True, chosen)
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in upgrade.response
    assert (b"Sec-WebSocket-Protocol" in upgrade.response) == bool(chosen)


@pytest.mark.parametrize(
    "request_head, status",
    [
        (head("Host: a"), 400),
        (head("Upgrade: SPDY/3.1"), 400),
        (head("Connection: Upgrade", "Upgrade: h2c"), 400),
        (spdy(), 400),
        (spdy("v5.channel.k8s.io"), 403),
        (websocket("Sec-WebSocket-Protocol: chat"), 403),
        (websocket(version="8"), 426),
        (websocket(key="short"), 400),
        (websocket(f"Sec-WebSocket-Key: {KEY}"), 400),
    ],
)
def test_refusals(request_head: Request, status: int) -> None:
    with pytest.raises(HttpRefusal) as caught:
        negotiate(request_head, spdy=SPDY_VERSIONS, websocket=WEBSOCKET_VERSIONS)
    assert caught.value.status == status
    assert refuse(caught.value).startswith(f"HTTP/1.1 {status} ".encode())


def test_403_says_what_there_is() -> None:
    with pytest.raises(HttpRefusal) as caught:
        negotiate(spdy("v9"), spdy=("portforward.k8s.io",), websocket=())
    assert caught.value.headers == {"X-Accepted-Stream-Protocol-Versions": "portforward.k8s.io"}
