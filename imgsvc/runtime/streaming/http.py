"""The HTTP/1.1 side of an upgrade, without sockets: request head → request, request → chosen protocol or refusal.

Source: RFC 9112 sections 3 and 5; RFC 6455 section 4.2; facts of the CRI streaming server for the SPDY headers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from imgsvc.runtime.streaming.websocket import WebSocketError, accept_key

MAX_HEAD: Final = 16 * 1024  # [bytes] of request line and headers
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_STREAM_VERSION: Final = "X-Stream-Protocol-Version"


class HttpRefusal(Exception):
    """The request gets this answer, and the connection ends."""

    def __init__(self, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Request:
    """A request head. headers: lower-case name → values in order."""

    method: str
    path: str
    headers: dict[str, list[str]]

    def values(self, name: str) -> list[str]:
        """All values of a header, comma lists taken apart."""
        return [v for line in self.headers.get(name.lower(), ()) for v in (part.strip() for part in line.split(",")) if v]


@dataclass(frozen=True, slots=True)
class Upgrade:
    """An accepted upgrade: response is what to send; protocol is the chosen sub-protocol, "" for none."""

    websocket: bool
    protocol: str
    response: bytes


def parse_head(head: bytes) -> Request:
    """A request head up to and including its empty line. Raises: HttpRefusal."""
    lines = head.decode("latin-1").split("\r\n")[:-2]
    match lines[0].split(" "):
        case [method, target, "HTTP/1.1"] if _TOKEN.fullmatch(method) and target.startswith("/"):
            pass
        case _:
            raise HttpRefusal(HTTPStatus.BAD_REQUEST, "not an HTTP/1.1 request")
    headers: dict[str, list[str]] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise HttpRefusal(HTTPStatus.BAD_REQUEST, "malformed header")
        headers.setdefault(name.lower(), []).append(value.strip(" \t"))
    return Request(method, target.partition("?")[0], headers)


def response(status: HTTPStatus, headers: Mapping[str, str], body: str = "") -> bytes:
    """A whole response; one that ends the connection when it has a body."""
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    if body:
        lines += ["Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(body.encode())}", "Connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def refuse(refusal: HttpRefusal) -> bytes:
    """The answer to a request that is not upgraded."""
    return response(refusal.status, refusal.headers, refusal.text + "\n")


def negotiate(request: Request, *, spdy: Collection[str], websocket: Collection[str]) -> Upgrade:
    """Choose the first protocol of the client's list that the server has. Raises: HttpRefusal."""
    upgrades = [u.lower() for u in request.values("upgrade")]
    if "upgrade" not in [c.lower() for c in request.values("connection")] or not upgrades:
        raise HttpRefusal(HTTPStatus.BAD_REQUEST, "this address answers upgrade requests only (SPDY/3.1 or websocket)")
    if "websocket" in upgrades:
        return _negotiate_websocket(request, websocket)
    if "spdy/3.1" in upgrades:
        return _negotiate_spdy(request, spdy)
    raise HttpRefusal(HTTPStatus.BAD_REQUEST, "unknown Upgrade; there are SPDY/3.1 and websocket")


def _negotiate_spdy(request: Request, supported: Collection[str]) -> Upgrade:
    offered = request.values(_STREAM_VERSION)
    if not offered:
        raise HttpRefusal(HTTPStatus.BAD_REQUEST, f"header {_STREAM_VERSION} is missing")
    chosen = next((p for p in offered if p in supported), None)
    if chosen is None:
        accepted = {"X-Accepted-Stream-Protocol-Versions": ",".join(supported)}
        raise HttpRefusal(HTTPStatus.FORBIDDEN, f"none of the offered protocols is supported; there are {', '.join(supported)}", accepted)
    headers = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", _STREAM_VERSION: chosen}
    return Upgrade(websocket=False, protocol=chosen, response=response(HTTPStatus.SWITCHING_PROTOCOLS, headers))


def _negotiate_websocket(request: Request, supported: Collection[str]) -> Upgrade:
    if request.values("sec-websocket-version") != ["13"]:
        raise HttpRefusal(HTTPStatus.UPGRADE_REQUIRED, "WebSocket version must be 13", {"Sec-WebSocket-Version": "13"})
    keys = request.headers.get("sec-websocket-key", [])
    try:
        accept = accept_key(keys[0] if len(keys) == 1 else "")
    except WebSocketError as error:
        raise HttpRefusal(HTTPStatus.BAD_REQUEST, str(error)) from error
    offered = request.values("sec-websocket-protocol") or [""]
    chosen = next((p for p in offered if p in supported), None)
    if chosen is None:
        raise HttpRefusal(
            HTTPStatus.FORBIDDEN, f"none of the offered protocols is supported; there are {', '.join(filter(None, supported))}"
        )
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Accept": accept}
    if chosen:
        headers["Sec-WebSocket-Protocol"] = chosen
    return Upgrade(websocket=True, protocol=chosen, response=response(HTTPStatus.SWITCHING_PROTOCOLS, headers))
