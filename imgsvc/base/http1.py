"""A small HTTP/1.1 server for what the daemon offers read-only: the mirror endpoint and metrics.

GET and HEAD only, no request bodies, every number bounded. h11 holds the protocol; files go out by sendfile(2).

Source: RFC 9110 (ranges: section 14), RFC 9112.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs, unquote

import h11

from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import InvalidArgument, Unavailable, from_os_error
from imgsvc.base.oci import KIB, MIB

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 512  # of one server; a node's peers open a handful each
MAX_HEAD: Final = 32 * KIB  # [bytes] of one request's head; tokens in headers reach some KiB
IDLE_S: Final = 75.0  # a connection without a request is closed after that; longer than most clients' pools keep it
STALL_S: Final = 60.0  # a client that takes no byte for that long is dropped
_SEND: Final = 4 * MIB  # [bytes] per sendfile call; each has STALL_S to move
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. path is decoded; headers have lower-case names; client: subject of its verified certificate, or ""."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    client: str = ""


@dataclass(frozen=True, slots=True)
class FileBody:
    """Part of a file [bytes]. fd is owned by the response and closed after it."""

    fd: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class StreamBody:
    """Parts of a file that come in over time, exactly `count` bytes. chunks.aclose() is called at the end, if it has one.

    The descriptors of the parts stay their owner's.
    """

    chunks: AsyncIterator[FileBody]
    count: int


@dataclass(frozen=True, slots=True)
class Response:
    """What is answered. The length of the body is added to the headers."""

    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes | FileBody | StreamBody = b""

    @property
    def length(self) -> int:
        """Of the body [bytes]."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.count


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(slots=True)
class HttpServer:
    """Listens, parses, answers. create with `serve`."""

    handler: Handler
    name: str
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        """Listen on "host:port". Raises: InvalidArgument, Unavailable."""
        host, port = split_address(address, self.name)
        try:
            self._server = await asyncio.start_server(self._connected, host, port, ssl=tls, limit=MAX_HEAD)
        except OSError as error:
            raise Unavailable(f"cannot listen: {error.strerror or error}", where=f"{self.name} address {address}") from error

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            await _Connection(reader, writer, self.handler, self.name).run()
        except (OSError, TimeoutError, h11.ProtocolError, asyncio.IncompleteReadError) as error:
            log.debug("%s: connection ended: %s", self.name, error)
        finally:
            self._connections.discard(task)
            writer.transport.abort()


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler, name: str) -> None:
        self._reader, self._writer = reader, writer
        self._handler, self._name = handler, name
        self._protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        # A client that is slower than we are must not make us hold its bytes.
        writer.transport.set_write_buffer_limits(high=MIB)

    async def run(self) -> None:
        """Requests one after the other until either side has enough."""
        while True:
            try:
                request = await self._next_request()
                if request is None:
                    break
                await self._answer(request, await self._ask(request))
            except h11.RemoteProtocolError as error:
                if self._protocol.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    await self._answer(None, Response(error.error_status_hint or 400))
                break
            if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
                break
            self._protocol.start_next_cycle()
        with contextlib.suppress(ssl.SSLError):
            self._writer.close()
            async with time_limit(1.0):
                await self._writer.wait_closed()

    async def _next_request(self) -> Request | None:
        request: Request | None = None
        async with time_limit(IDLE_S):
            while True:
                event = self._protocol.next_event()
                if event is h11.NEED_DATA:
                    self._protocol.receive_data(await self._reader.read(64 * KIB))
                elif isinstance(event, h11.Request):
                    request = self._parse(event)
                elif isinstance(event, h11.EndOfMessage):
                    return request
                elif isinstance(event, h11.Data):
                    raise h11.RemoteProtocolError("a request with a body", error_status_hint=413)
                else:
                    return None

    def _parse(self, event: h11.Request) -> Request:
        target = event.target.decode("ascii", "replace")
        path, _, query = target.partition("?")
        try:
            parsed = parse_qs(query, keep_blank_values=True, max_num_fields=32)
        except ValueError as error:
            raise h11.RemoteProtocolError("too many query fields", error_status_hint=400) from error
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        return Request(event.method.decode("ascii"), unquote(path), parsed, headers, self._client())

    def _client(self) -> str:
        certificate = self._writer.get_extra_info("peercert") or {}
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        return names[0] if names else ("certificate" if certificate else "")

    async def _ask(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            return Response(405, [("Allow", "GET, HEAD")])
        try:
            return await self._handler(request)
        except Exception:
            log.exception("%s: %s %s failed unexpectedly", self._name, request.method, request.path)
            return Response(500)

    async def _answer(self, request: Request | None, response: Response) -> None:
        body = response.body
        try:
            headers = [*response.headers, ("Content-Length", str(response.length))]
            self._writer.write(self._protocol.send(h11.Response(status_code=response.status, headers=headers)) or b"")
            if request is not None and request.method == "HEAD":
                pass
            elif isinstance(body, FileBody):
                await self._send_file(body)
            elif isinstance(body, StreamBody):
                await self._send_stream(body)
            elif body:
                self._writer.write(self._protocol.send(h11.Data(data=body)) or b"")
            self._writer.write(self._protocol.send(h11.EndOfMessage()) or b"")
            async with time_limit(STALL_S):
                await self._writer.drain()
        finally:
            if isinstance(body, FileBody):
                os.close(body.fd)
            elif isinstance(body, StreamBody) and hasattr(body.chunks, "aclose"):
                await body.chunks.aclose()

    async def _send_file(self, body: FileBody) -> None:
        if not body.count:
            return
        # The protocol counts the bytes; the kernel moves them.
        self._protocol.send_with_data_passthrough(h11.Data(data=_Length(body.count)))  # type: ignore[arg-type]  # anything with a length
        loop, offset, end = asyncio.get_running_loop(), body.offset, body.offset + body.count
        with os.fdopen(os.dup(body.fd), "rb", buffering=0) as file:
            while offset < end:
                async with time_limit(STALL_S):
                    sent = await loop.sendfile(self._writer.transport, file, offset, min(_SEND, end - offset))
                if not sent:
                    raise OSError("the file is shorter than it was")
                offset += sent

    async def _send_stream(self, body: StreamBody) -> None:
        left = body.count
        async for part in body.chunks:
            left -= part.count
            await self._send_file(part)
        if left:
            raise OSError("the stream is shorter than announced")


class _Length:
    """A placeholder for data of that length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def split_address(address: str, name: str) -> tuple[str, int]:
    """Take "host:port" or "[::1]:port" apart. Raises: InvalidArgument."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or not host:
        raise InvalidArgument(f'"{address}" is not host:port', where=f"{name} address", hint='e.g. "127.0.0.1:5001"')
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it. A name counts as reachable from outside, except localhost."""
    host = split_address(address, "")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_tls(cert_file: str, key_file: str, client_ca_file: str = "") -> ssl.SSLContext:
    """A server's TLS; with client_ca_file, clients need a certificate signed by it. Raises: InvalidArgument, NotFound."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _certificate_errors(cert_file):
        context.load_cert_chain(cert_file, key_file)
    if client_ca_file:
        with _certificate_errors(client_ca_file):
            context.load_verify_locations(client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def _certificate_errors(where: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise InvalidArgument(f"not a usable certificate or key: {error.reason or error}", where=where) from error
    except OSError as error:
        raise from_os_error(error, "reading a certificate", where=where) from error


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """(offset, count) of a single byte range; None when there is none that we serve: the whole is answered then.

    Raises: ValueError when it lies outside (416).
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        count = min(int(match[2]), size)
        if not count:
            raise ValueError("an empty range")
        return size - count, count
    first = int(match[1])
    last = min(int(match[2]) if match[2] else size - 1, size - 1)
    if match[2] and int(match[2]) < first:
        return None
    if first >= size:
        raise ValueError("beyond the end")
    return first, last - first + 1
