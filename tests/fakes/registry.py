"""FakeRegistry: a registry on loopback that speaks real HTTP and misbehaves on request.

It serves what was added to it like a well-behaved registry (HEAD, GET, ranges, uploads). Rules come first: a rule sees
every request and may answer with a Reply, whose fields are the faults. It runs in a thread, so tests of any style and
children of the test can talk to it.

    with FakeRegistry() as fake:
        fake.add(image, "library/app")
        fake.rule(fake.times(2, fake.on("/blobs/", Reply(429, {"Retry-After": "3"}))))
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from imgsvc.base.oci import Digest
from tests.support.images import BuiltDocument

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived. headers: lower-case names."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    connection: int = 0

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and how it goes wrong.

    length: Content-Length to announce instead of the true one; -1 announces none and sends chunks. cut_at, stall_at: after
    so many body bytes reset the connection, or go silent. rate: [bytes/s]. delay: before the head [s]. head_rate: of the
    head [bytes/s]. repeat: send the body that many times.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    cut_at: int | None = None
    stall_at: int | None = None
    rate: float = 0.0
    delay: float = 0.0
    head_rate: float = 0.0
    repeat: int = 1


class _TlsOnPlainPortError(Exception):
    pass


Rule = Callable[[Request], Reply | None]


class FakeRegistry:
    """Also a token server or any other HTTP server, by rules alone."""

    def __init__(self, tls: ssl.SSLContext | None = None, *, rate: float = 0.0) -> None:
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.sent = 0  # bytes of blob bodies that went out
        self._rules: list[Rule] = []
        self._tls = tls
        self._rate = rate
        self._uploads: dict[str, bytearray] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections = 0

    # --- what tests use

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address}"

    def add(self, document: BuiltDocument, repository: str, tag: str = "latest") -> None:
        """Offer an image or index under a tag and its digest."""
        for child in document.children:
            self.add(child, repository, str(child.digest))
        for target in (tag, str(document.digest)):
            self.manifests[f"{repository}/{target}"] = (document.media_type, document.data)
        self.blobs.update({str(digest): data for digest, data in document.blobs.items()})

    def add_blob(self, data: bytes) -> Digest:
        digest = Digest.of(data)
        self.blobs[str(digest)] = data
        return digest

    def rule(self, rule: Rule) -> None:
        """Asked before the earlier rules."""
        self._rules.insert(0, rule)

    @staticmethod
    def on(part: str, reply: Reply | Callable[[Request], Reply | None], method: str = "") -> Rule:
        """A rule for paths that contain `part`."""

        def rule(request: Request) -> Reply | None:
            if part not in request.path or (method and request.method != method):
                return None
            return reply(request) if callable(reply) else reply

        return rule

    @staticmethod
    def times(count: int, rule: Rule) -> Rule:
        """A rule that answers so many times only."""
        left = [count]

        def limited(request: Request) -> Reply | None:
            reply = rule(request) if left[0] else None
            left[0] -= reply is not None
            return reply

        return limited

    def seen(self, part: str = "", method: str = "") -> list[Request]:
        """Requests whose path contains `part`."""
        return [r for r in list(self.requests) if part in r.path and method in ("", r.method)]

    def everything_received(self) -> str:
        """All requests as text, to look for secrets in."""
        return "\n".join(f"{r.method} {r.path} {dict(r.query)} {dict(r.headers)} {r.body!r}" for r in self.requests)

    def drop(self) -> None:
        """Close all connections there are."""
        for task in list(self._tasks):
            self._loop.call_soon_threadsafe(task.cancel)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(5)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    # --- the server

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls, limit=256 * 1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        try:
            while request := await self._read(reader, number):
                self.requests.append(request)
                if not await self._send(request, self._answer(request), writer):
                    break
        except _TlsOnPlainPortError:
            writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request to an HTTP server.\n")
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, number: int) -> Request | None:
        first = await reader.read(1)
        if first == b"\x16":  # a TLS hello: answer as Go's server does
            raise _TlsOnPlainPortError
        try:
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        method, target, _ = head[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        parts = urlsplit(target)
        return Request(method, unquote(parts.path), parse_qs(parts.query), headers, body, number)

    def _answer(self, request: Request) -> Reply:
        for rule in list(self._rules):
            if (reply := rule(request)) is not None:
                return reply
        return self.honest(request)

    async def _send(self, request: Request, reply: Reply, writer: asyncio.StreamWriter) -> bool:
        """Returns whether the connection stays usable."""
        await asyncio.sleep(reply.delay)
        total = len(reply.body) * reply.repeat
        headers = dict(reply.headers)
        if reply.length != -1:
            headers["Content-Length"] = str(total if reply.length is None else reply.length)
        else:
            headers["Transfer-Encoding"] = "chunked"
        head = f"HTTP/1.1 {reply.status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        if reply.head_rate:
            for byte in head.encode("latin-1"):
                writer.write(bytes([byte]))
                await asyncio.sleep(1 / reply.head_rate)
        else:
            writer.write(head.encode("latin-1"))
        if request.method != "HEAD":
            await self._send_body(reply, writer, total)
        await writer.drain()
        return reply.length in (None, -1, total)

    async def _send_body(self, reply: Reply, writer: asyncio.StreamWriter, total: int) -> None:
        stop = min(x for x in (total, reply.cut_at, reply.stall_at) if x is not None)
        rate = reply.rate or self._rate
        piece = max(1, min(256 * 1024, int(rate / 50) or 1)) if rate else 256 * 1024
        at, started = 0, self._loop.time()
        while at < stop:
            start = at % len(reply.body)
            data = memoryview(reply.body)[start : start + min(piece, stop - at)]
            writer.write(f"{len(data):x}\r\n".encode() + bytes(data) + b"\r\n" if reply.length == -1 else data)
            await writer.drain()
            at += len(data)
            self.sent += len(data)
            if rate:
                await asyncio.sleep(max(0.0, started + at / rate - self._loop.time()))
        if reply.stall_at is not None and stop == reply.stall_at:
            await asyncio.Event().wait()
        if reply.cut_at is not None and stop == reply.cut_at:
            await asyncio.sleep(0.1)  # a reset discards what the peer has not read yet
            sock: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionResetError
        if reply.length == -1:
            writer.write(b"0\r\n\r\n")

    # --- honest behaviour

    def honest(self, request: Request) -> Reply:
        """What a good registry answers."""
        path = request.path.removeprefix("/v2/")
        if request.path == "/v2/":
            return Reply(body=b"{}", headers={"Content-Type": "application/json"})
        if match := re.fullmatch(r"(.+)/manifests/([^/]+)", path):
            return self._manifest(request, match[1], match[2])
        if match := re.fullmatch(r"(.+)/blobs/([a-z0-9]+:[0-9a-f]+)", path):
            return self._blob(request, match[2])
        if match := re.fullmatch(r"(.+)/tags/list", path):
            names = sorted(key.rpartition("/")[2] for key in self.manifests if key.startswith(match[1] + "/") and ":" not in key)
            return Reply(body=('{"tags":[' + ",".join(f'"{n}"' for n in names) + "]}").encode())
        return _missing("NAME_UNKNOWN")

    def _manifest(self, request: Request, repository: str, target: str) -> Reply:
        found = self.manifests.get(f"{repository}/{target}")
        if found is None:
            return _missing("MANIFEST_UNKNOWN")
        media_type, data = found
        return Reply(headers={"Content-Type": media_type, "Docker-Content-Digest": str(Digest.of(data))}, body=data)

    def _blob(self, request: Request, digest: str) -> Reply:
        data = self.blobs.get(digest)
        if data is None:
            return _missing("BLOB_UNKNOWN")
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if not (match := _RANGE.fullmatch(request.headers.get("range", ""))):
            return Reply(headers=headers, body=data)
        first, last = int(match[1]), min(int(match[2]) if match[2] else len(data) - 1, len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Reply(206, headers, data[first : last + 1])


def _missing(code: str) -> Reply:
    body = f'{{"errors":[{{"code":"{code}","message":"not known here"}}]}}'.encode()
    return Reply(404, {"Content-Type": "application/json"}, body)
