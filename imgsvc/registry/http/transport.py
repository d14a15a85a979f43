"""One HTTP request to one place: connection pools, TLS settings, deadlines. No authentication, no redirects, no retries.

httpcore is used without httpx around it: a registry client decides itself about redirects, cookies (there are none),
proxies and timeouts, and httpcore's pool is the layer that accepts our network backend.

HTTP/1.1 is what we ask for: one blob is one stream of bytes, and several connections beat several streams of one, the
more so as HTTP/2 frames are taken apart in Python. A server that has only HTTP/2 (it refuses http/1.1 in the TLS handshake,
or answers what is none) is spoken to so after that, one connection for each request: httpcore does not tell a server
that a stream was given up, so what shares a connection could not be closed early.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import httpcore
from h2.exceptions import H2Error

from imgsvc.base.concurrency import in_thread, time_limit
from imgsvc.base.errors import printable
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.exchange import Body, Chunk, Headers, RequestFailed, Response, Route, Timeouts, log_exchange
from imgsvc.registry.http.netguard import ANYWHERE, Reach, reach_of
from imgsvc.registry.http.netstream import AddressRefused, Backend, TlsFailed
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.http.tls import TlsFiles, context_for, hint_about, names_in
from imgsvc.registry.retry import Failure

_KEEP_IDLE: Final = 16  # connections per pool kept open after use
_KEEP_IDLE_S: Final = 30.0
_HTTP_ERRORS: Final = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError, H2Error)


class _HttpResponse(Response):
    """pool: for this answer only, closed with it."""

    def __init__(
        self, raw: httpcore.Response, url: str, phase: str, through_proxy: bool, pool: httpcore.AsyncConnectionPool | None = None
    ) -> None:
        headers = Headers((name.decode("latin-1"), value.decode("latin-1")) for name, value in raw.headers)
        super().__init__(raw.status, headers, url, phase)
        self._raw = raw
        self._pool = pool
        self._through_proxy = through_proxy

    @property
    def tls(self) -> ssl.SSLObject | None:
        """See Response."""
        found = self._connection("ssl_object")
        return found if isinstance(found, ssl.SSLObject) else None

    def reach(self) -> Reach:
        """See Response."""
        address = None if self._through_proxy else self._connection("server_addr")
        return reach_of(str(address[0])) if address else Reach.PUBLIC

    def _connection(self, info: str) -> Any:
        """What the connection below says about itself."""
        stream = self._raw.extensions.get("network_stream")
        return stream.get_extra_info(info) if isinstance(stream, httpcore.AsyncNetworkStream) else None

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """See Response; up to 256 KiB at a time."""
        try:
            async for chunk in self._raw.aiter_stream():
                yield chunk
        except _HTTP_ERRORS as error:
            raise _mapped(error, self.url, self.phase) from error

    async def close(self) -> None:
        """See Response."""
        await self._raw.aclose()
        if self._pool:
            await self._pool.aclose()


class Transport:
    """Connection pools by route. Belongs to one event loop."""

    def __init__(self, timeouts: Timeouts, files: TlsFiles | None = None) -> None:
        """files: None for those of the file system."""
        self.timeouts = timeouts
        self._files = files or TlsFiles()
        self._pools: dict[tuple[object, ...], httpcore.AsyncConnectionPool] = {}
        self._contexts: dict[tuple[object, ...], ssl.SSLContext] = {}
        self._only_h2: dict[str, None] = {}  # scheme and authority of servers without HTTP/1.1

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        *,
        route: Route,
        phase: str,
        body: Body = b"",
        length: int | None = None,
    ) -> Response:
        """Send one request and wait for the answer's head. `length`: of a streamed body [bytes].

        Raises: RequestFailed; InvalidArgument when TLS files cannot be used.
        """
        _check_literal_address(url, route, phase)
        connect = route.connect_within(self.timeouts)
        try:
            request = httpcore.Request(
                method,
                url,
                headers=_request_headers(url, headers, method, body, length),
                content=body,
                extensions={"timeout": {"connect": connect, "read": self.timeouts.stall, "write": self.timeouts.stall, "pool": None}},
            )
        except ValueError:
            # `from None`: the cause would quote the address or a secret.
            what = "the address or a header has characters that cannot be sent"
            raise RequestFailed(what, code="INVALID_ARGUMENT", failure=Failure.DEFINITE, phase=phase, where=shown_url(url)) from None
        # A streamed upload takes as long as it takes; its writes have their own stall clock.
        limit = None if method in ("PUT", "PATCH", "POST") else connect + self.timeouts.headers
        began = time.monotonic()
        try:
            async with time_limit(limit):
                response = await self._exchange(request, url, route, phase, can_repeat=isinstance(body, bytes))
        except TimeoutError as error:
            what = f"no complete answer within {limit:g} s"
            raise RequestFailed(what, code="DEADLINE_EXCEEDED", failure=Failure.BROKEN, phase=phase, where=shown_url(url)) from error
        except _HTTP_ERRORS as error:
            if not isinstance(error, httpcore.RemoteProtocolError) or not _is_no_http1(error):
                raise _mapped(error, url, phase, route.proxy) from error
            what, hint = f"the answer is not HTTP: {printable(str(error), 160)}", "is this the registry's port, and does it want https://?"
            raise RequestFailed(what, code="UNAVAILABLE", failure=Failure.DEFINITE, phase=phase, where=shown_url(url), hint=hint) from error
        log_exchange(method, headers, response, time.monotonic() - began)
        return response

    async def _exchange(self, request: httpcore.Request, url: str, route: Route, phase: str, *, can_repeat: bool) -> Response:
        """In the protocol that the server has. Raises: _HTTP_ERRORS."""
        server = "/".join(urlsplit(url)[:2])
        if server in self._only_h2:
            return await self._exchange_h2(request, url, route, phase)
        try:
            raw = await (await self._pool(route)).handle_async_request(request)
        except (TlsFailed, httpcore.RemoteProtocolError) as error:
            if not can_repeat or not _is_no_http1(error):
                raise
            try:
                response = await self._exchange_h2(request, url, route, phase)
            except _HTTP_ERRORS:
                raise error from None  # it has neither
            self._only_h2[server] = None
            return response
        return _HttpResponse(raw, url, phase, bool(route.proxy))

    async def _exchange_h2(self, request: httpcore.Request, url: str, route: Route, phase: str) -> Response:
        pool = _new_pool(route, await self._context(route, is_h2=True), is_h2=True)
        try:
            raw = await pool.handle_async_request(request)
        except BaseException:
            await pool.aclose()
            raise
        return _HttpResponse(raw, url, phase, bool(route.proxy), pool)

    async def close(self) -> None:
        """Close every connection."""
        pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            await pool.aclose()

    async def _pool(self, route: Route) -> httpcore.AsyncConnectionPool:
        key = (route.tls, route.proxy, route.reachable, self._stamps(route.tls))
        if key not in self._pools:
            context = await self._context(route)
            if key not in self._pools:
                self._pools[key] = _new_pool(route, context)
        return self._pools[key]

    async def _context(self, route: Route, *, is_h2: bool = False) -> ssl.SSLContext:
        """One for each protocol: httpcore writes into it what is offered in the handshake."""
        key = (route.tls, self._stamps(route.tls), is_h2)
        if key not in self._contexts:
            # Reading the system's CAs takes tens of milliseconds.
            self._contexts[key] = await in_thread(context_for, route.tls, self._files)
        return self._contexts[key]

    def _stamps(self, tls: Tls) -> tuple[tuple[int, int, int], ...]:
        """What tells whether the files were replaced."""
        return tuple(map(self._files.stamp, names_in(tls)))


def _new_pool(route: Route, context: ssl.SSLContext, *, is_h2: bool = False) -> httpcore.AsyncConnectionPool:
    proxy = None
    if route.proxy:
        parts = urlsplit(route.proxy)
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        proxy = httpcore.Proxy(bare, auth=auth)
    return httpcore.AsyncConnectionPool(
        ssl_context=context,
        proxy=proxy,
        http1=not is_h2,
        http2=is_h2,
        max_connections=None,  # the callers' limits bound it
        max_keepalive_connections=_KEEP_IDLE,
        keepalive_expiry=_KEEP_IDLE_S,
        network_backend=Backend(ANYWHERE if route.proxy else route.reachable),
    )


def _is_no_http1(error: Exception) -> bool:
    """What a server without HTTP/1.1 does: an alert in the TLS handshake, or frames where a status line should be."""
    if isinstance(error, TlsFailed):
        return error.no_protocol
    return "disconnected" not in str(error)


def _check_literal_address(url: str, route: Route, phase: str) -> None:
    """Through a proxy we do not see the address that is connected to, but the URL may say it."""
    host = urlsplit(url).hostname or ""
    if not route.proxy or route.reachable == ANYWHERE or not (":" in host or host.replace(".", "").isdigit()):
        return
    if (reach := reach_of(host)) not in route.reachable:
        what = f"{host} is a {reach.value} address, which this registry may not redirect to"
        raise RequestFailed(what, code="PERMISSION_DENIED", failure=Failure.DEFINITE, phase=phase, where=shown_url(url))


def _request_headers(
    url: str, headers: Sequence[tuple[str, str]], method: str, body: Body, length: int | None
) -> list[tuple[bytes, bytes]]:
    sent = [("Host", urlsplit(url).netloc), *headers]
    if isinstance(body, bytes):
        length = len(body) if body or method in ("PUT", "PATCH", "POST") else None
    if length is not None:
        sent.append(("Content-Length", str(length)))
    elif not isinstance(body, bytes):
        sent.append(("Transfer-Encoding", "chunked"))
    if any(character in value for _, value in sent for character in "\r\n\0"):
        raise ValueError("a header contains a line break")  # h11 would say so too, and quote it
    return [(name.encode("ascii"), value.encode("latin-1")) for name, value in sent]


def _mapped(error: Exception, url: str, phase: str, proxy: str = "") -> RequestFailed:
    """proxy: what the connection goes through, "" for none."""
    where, text = shown_url(url), printable(str(error), 200)
    if isinstance(error, TlsFailed):
        untrusted = "not trusted" in text
        hint = "write http:// in the [host] table if that is meant" if error.plain else hint_about(text) if untrusted else ""
        failure = Failure.DEFINITE if untrusted or error.plain else Failure.UNREACHABLE
        return RequestFailed(text, code="UNAVAILABLE", failure=failure, phase="tls", where=where, hint=hint, is_plain_http=error.plain)
    if isinstance(error, AddressRefused):
        return RequestFailed(text, code="PERMISSION_DENIED", failure=Failure.DEFINITE, phase="connect", where=where)
    if isinstance(error, httpcore.ConnectTimeout | httpcore.ConnectError | httpcore.ProxyError):
        code = "DEADLINE_EXCEEDED" if isinstance(error, httpcore.ConnectTimeout) else "UNAVAILABLE"
        hint = (
            "hosts explain shows where the proxy is set"
            if proxy
            else "is the name right, and known to this node's DNS?"
            if _is_unknown(text)
            else ""
        )
        what = f"proxy {shown_url(proxy)}: {text}" if proxy else text
        return RequestFailed(what, code=code, failure=Failure.UNREACHABLE, phase="connect", where=where, hint=hint)
    if isinstance(error, httpcore.TimeoutException):
        return RequestFailed(text or "stalled", code="DEADLINE_EXCEEDED", failure=Failure.BROKEN, phase=phase, where=where)
    return RequestFailed(f"connection lost: {text}", code="UNAVAILABLE", failure=Failure.BROKEN, phase=phase, where=where)


def _is_unknown(text: str) -> bool:
    return text.startswith("name not resolved")
