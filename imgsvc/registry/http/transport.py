"""One HTTP request to one place: connection pools, TLS settings, deadlines. No authentication, no redirects, no retries.

An httpx transport of our own: httpx's has one route for all requests, and hides the layer that accepts our network backend,
which is httpcore's pool.

HTTP/1.1 is what we ask for: one blob is one stream of bytes, and several connections beat several streams of one, the
more so as HTTP/2 frames are taken apart in Python. A server that has only HTTP/2 (it refuses http/1.1 in the TLS handshake,
or answers what is none) is spoken to so after that, one connection for each request: httpcore does not tell a server
that a stream was given up, so what shares a connection could not be closed early.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import unquote, urlsplit

import httpcore
import httpx
from h2.exceptions import H2Error

from imgsvc.base.concurrency import in_thread, time_limit
from imgsvc.base.errors import printable
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.exchange import RequestFailed, Route, answer_to, phase_of, route_of, timeouts_of, url_of
from imgsvc.registry.http.netguard import ANYWHERE, Reach, reach_of
from imgsvc.registry.http.netstream import AddressRefused, Backend, TlsFailed
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.http.tls import TlsFiles, context_for, hint_about, names_in
from imgsvc.registry.retry import Failure

_KEEP_IDLE: Final = 16  # connections per pool kept open after use
_KEEP_IDLE_S: Final = 30.0
_HTTP_ERRORS: Final = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError, H2Error)


class _Body(httpx.AsyncByteStream):
    """Up to 256 KiB at a time, not decoded. pool: for this answer only, closed with it."""

    def __init__(self, raw: httpcore.Response, request: httpx.Request, pool: httpcore.AsyncConnectionPool | None) -> None:
        self._raw = raw
        self._request = request
        self._pool = pool

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._raw.aiter_stream():
                yield chunk
        except _HTTP_ERRORS as error:
            raise _mapped(error, self._request) from error

    async def aclose(self) -> None:
        """Idempotent. Before the end, this closes the connection."""
        await self._raw.aclose()
        if self._pool:
            await self._pool.aclose()


class Transport(httpx.AsyncBaseTransport):
    """Connection pools by route. Belongs to one event loop."""

    def __init__(self, files: TlsFiles | None = None) -> None:
        """files: None for those of the file system."""
        self._files = files or TlsFiles()
        self._pools: dict[tuple[object, ...], httpcore.AsyncConnectionPool] = {}
        self._contexts: dict[tuple[object, ...], ssl.SSLContext] = {}
        self._only_h2: dict[str, None] = {}  # scheme and authority of servers without HTTP/1.1

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request of request_for and wait for the answer's head.

        Raises: RequestFailed; InvalidArgument when TLS files cannot be used.
        """
        _check_literal_address(request)
        # A streamed upload takes as long as it takes; its writes have their own stall clock.
        timeouts = timeouts_of(request)
        is_upload = request.method in ("PUT", "PATCH", "POST")
        limit = None if is_upload else route_of(request).connect_within(timeouts) + timeouts.headers
        try:
            async with time_limit(limit):
                return await self._exchange(request)
        except TimeoutError as error:
            raise _failed(f"no complete answer within {limit:g} s", request, code="DEADLINE_EXCEEDED", failure=Failure.BROKEN) from error
        except _HTTP_ERRORS as error:
            if not isinstance(error, httpcore.RemoteProtocolError) or not _is_no_http1(error):
                raise _mapped(error, request, route_of(request).proxy) from error
            what, hint = f"the answer is not HTTP: {printable(str(error), 160)}", "is this the registry's port, and does it want https://?"
            raise _failed(what, request, code="UNAVAILABLE", failure=Failure.DEFINITE, hint=hint) from error

    async def _exchange(self, request: httpx.Request) -> httpx.Response:
        """In the protocol that the server has. Raises: _HTTP_ERRORS."""
        server = "/".join(urlsplit(url_of(request))[:2])
        if server in self._only_h2:
            return await self._exchange_h2(request)
        try:
            pool = await self._pool(route_of(request))
            return _answer(await pool.handle_async_request(_for_httpcore(request)), request)
        except (TlsFailed, httpcore.RemoteProtocolError) as error:
            can_repeat = isinstance(request.stream, httpx.ByteStream)
            if not can_repeat or not _is_no_http1(error):
                raise
            try:
                response = await self._exchange_h2(request)
            except _HTTP_ERRORS:
                raise error from None  # it has neither
            self._only_h2[server] = None
            return response

    async def _exchange_h2(self, request: httpx.Request) -> httpx.Response:
        route = route_of(request)
        pool = _new_pool(route, await self._context(route, is_h2=True), is_h2=True)
        try:
            raw = await pool.handle_async_request(_for_httpcore(request))
        except BaseException:
            await pool.aclose()
            raise
        return _answer(raw, request, pool)

    async def aclose(self) -> None:
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


def _for_httpcore(request: httpx.Request) -> httpcore.Request:
    url = request.url
    return httpcore.Request(
        request.method,
        httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions=request.extensions,
    )


def _answer(raw: httpcore.Response, request: httpx.Request, pool: httpcore.AsyncConnectionPool | None = None) -> httpx.Response:
    stream = raw.extensions.get("network_stream")
    address = stream.get_extra_info("server_addr") if isinstance(stream, httpcore.AsyncNetworkStream) else None
    reach = reach_of(str(address[0])) if address and not route_of(request).proxy else Reach.PUBLIC
    return answer_to(request, raw.status, raw.headers, _Body(raw, request, pool), reach=reach, extensions=dict(raw.extensions))


def _check_literal_address(request: httpx.Request) -> None:
    """Through a proxy we do not see the address that is connected to, but the URL may say it."""
    route, host = route_of(request), urlsplit(url_of(request)).hostname or ""
    if not route.proxy or route.reachable == ANYWHERE or not (":" in host or host.replace(".", "").isdigit()):
        return
    if (reach := reach_of(host)) not in route.reachable:
        what = f"{host} is a {reach.value} address, which this registry may not redirect to"
        raise _failed(what, request, code="PERMISSION_DENIED", failure=Failure.DEFINITE)


def _failed(what: str, request: httpx.Request, *, code: str, failure: Failure, hint: str = "") -> RequestFailed:
    return RequestFailed(what, code=code, failure=failure, phase=phase_of(request), where=shown_url(url_of(request)), hint=hint)


def _mapped(error: Exception, request: httpx.Request, proxy: str = "") -> RequestFailed:
    """proxy: what the connection goes through, "" for none."""
    where, text = shown_url(url_of(request)), printable(str(error), 200)
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
        return _failed(text or "stalled", request, code="DEADLINE_EXCEEDED", failure=Failure.BROKEN)
    return _failed(f"connection lost: {text}", request, code="UNAVAILABLE", failure=Failure.BROKEN)


def _is_unknown(text: str) -> bool:
    return text.startswith("name not resolved")
