"""Requests and answers are httpx's; what this client adds to them, and how a request fails. transport.py and bulk.py answer them.

What one request goes by beside its bytes is in `request.extensions`: "route" (Route), "phase" (see RequestFailed), "address" (its
URL as it was given: httpx spells some differently), "timeouts" (Timeouts), besides httpx's own "timeout" and "target". A
transport of ours adds "reach" to `response.extensions`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import ImgsvcError, ResourceExhausted, printable
from imgsvc.base.numerals import whole_number
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.netguard import ANYWHERE, Reach
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.retry import Failure

log = logging.getLogger(__name__)

_MAX_HEADER_VALUE: Final = 64 * 1024  # [characters] h11 bounds the whole head to about 100 KiB
_MAX_URL: Final = 64 * 1024  # [characters] of httpx
_ENCODING: Final = "latin-1"  # of header values: every byte is a character
_UNSENDABLE: Final = "the address or a header has characters that cannot be sent"

Body = bytes | AsyncIterable[bytes]


class RequestFailed(ImgsvcError):
    """One request to one endpoint did not succeed. `code` is the category of this very failure.

    phase: "connect", "tls", "auth", "resolve", "fetch", "push". status: HTTP status, 0 without an answer.
    wait: Retry-After [seconds] where the server said so. is_plain_http: it answered HTTP where TLS was tried. is_silent: the
    answer to a HEAD, which has no room for a reason.
    """

    def __init__(
        self,
        what: str,
        *,
        code: str,
        failure: Failure,
        phase: str,
        status: int = 0,
        where: str = "",
        hint: str = "",
        wait: float | None = None,
        is_plain_http: bool = False,
        is_silent: bool = False,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.code = code  # type: ignore[misc]  # an instance may narrow the class's category
        self.retryable = failure in (Failure.UNREACHABLE, Failure.BROKEN, Failure.LIMITED)  # type: ignore[misc]  # likewise
        self.failure = failure
        self.phase = phase
        self.status = status
        self.wait = wait
        self.is_plain_http = is_plain_http
        self.is_silent = is_silent


@dataclass(frozen=True, slots=True)
class Timeouts:
    """All in seconds. connect: TCP and TLS. headers: until the answer's head is complete. stall: no byte of a body."""

    connect: float = 15.0
    headers: float = 30.0
    stall: float = 30.0


@dataclass(frozen=True, slots=True)
class Route:
    """How to get to a server. proxy: URL or "". reachable: address classes that may be connected to."""

    tls: Tls
    proxy: str = ""
    connect_timeout: float | None = None
    reachable: frozenset[Reach] = ANYWHERE

    def connect_within(self, timeouts: Timeouts) -> float:
        """How long connecting may take [s]: its own time, where it has one."""
        return timeouts.connect if self.connect_timeout is None else self.connect_timeout


class _Answer(httpx.Response):
    """An answer that httpx leaves as it is: redirects are followed by endpoint.py, which decides what may go where.

    httpx reads a Location even when it is not to follow it, and raises an error of its own for one that is no URL.
    """

    @property
    def has_redirect_location(self) -> bool:
        """No."""
        return False


def request_for(
    method: str,
    url: str,
    headers: Iterable[tuple[str, str]],
    *,
    route: Route,
    phase: str,
    timeouts: Timeouts,
    body: Body = b"",
    length: int | None = None,
) -> httpx.Request:
    """A request with exactly these headers, Host, and what its body needs. `length`: of a streamed body [bytes].

    Raises: RequestFailed when it cannot be sent.
    """
    try:
        sent = _whole_head(url, headers, length)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        timeout = httpx.Timeout(timeouts.stall, connect=route.connect_within(timeouts), pool=None)
        facts = {"route": route, "phase": phase, "address": url, "timeouts": timeouts}
        extensions = facts | {"target": target.encode(), "timeout": timeout.as_dict()}
        return httpx.Request(method, url, headers=httpx.Headers(sent, encoding=_ENCODING), content=body, extensions=extensions)
    except (ValueError, httpx.InvalidURL):
        # `from None`: the cause would quote the address or a secret.
        is_long = len(url) > _MAX_URL
        what = f"the address has {len(url)} characters, more than {_MAX_URL}" if is_long else _UNSENDABLE
        raise RequestFailed(what, code="INVALID_ARGUMENT", failure=Failure.DEFINITE, phase=phase, where=shown_url(url)) from None


def _whole_head(url: str, headers: Iterable[tuple[str, str]], length: int | None) -> list[tuple[str, str]]:
    """Headers with Host. Raises: ValueError for what cannot be sent."""
    sent = list(headers)
    if not any(name.lower() == "host" for name, _ in sent):
        sent.insert(0, ("Host", urlsplit(url).netloc))
    if length is not None:
        sent.append(("Content-Length", str(length)))
    if not url.isascii() or any(not name.isascii() or set(value) & set("\r\n\0") for name, value in sent):
        raise ValueError("not to be sent")  # h11 would say so too, and quote it
    return sent


def route_of(request: httpx.Request) -> Route:
    """How to get to its server."""
    route: Route = request.extensions.get("route", Route(Tls()))
    return route


def timeouts_of(request: httpx.Request) -> Timeouts:
    """How long it may take."""
    timeouts: Timeouts = request.extensions.get("timeouts", Timeouts())
    return timeouts


def phase_of(message: httpx.Request | httpx.Response) -> str:
    """What the request, or the one that was answered, is for; see RequestFailed."""
    return str(_request(message).extensions.get("phase", "fetch"))


def url_of(message: httpx.Request | httpx.Response) -> str:
    """The URL of the request, or of the one that was answered, as it was given."""
    request = _request(message)
    return str(request.extensions.get("address", request.url))


def _request(message: httpx.Request | httpx.Response) -> httpx.Request:
    return message.request if isinstance(message, httpx.Response) else message


def answer_to(
    request: httpx.Request,
    status: int,
    headers: Sequence[tuple[bytes, bytes]],
    body: httpx.AsyncByteStream,
    *,
    reach: Reach,
    extensions: dict[str, Any] | None = None,
) -> httpx.Response:
    """An answer whose body is still to come: for transports. Its errors are RequestFailed.

    reach: address class of the server; unknown through a proxy, so PUBLIC, the narrowest.
    """
    response = _Answer(status, headers=headers, stream=body, request=request, extensions={**(extensions or {}), "reach": reach})
    response.headers.encoding = _ENCODING
    return response


def reach_behind(response: httpx.Response) -> Reach:
    """Address class of the server that answered; the narrowest where it is not known."""
    reach: Reach = response.extensions.get("reach", Reach.PUBLIC)
    return reach


def header_pairs(message: httpx.Request | httpx.Response) -> tuple[tuple[str, str], ...]:
    """All headers in their order, names spelled as they were, one character for each byte."""
    return tuple((name.decode(_ENCODING), value.decode(_ENCODING)) for name, value in message.headers.raw)


def header_values(response: httpx.Response, name: str) -> list[str]:
    """Every value of a header of sane length."""
    return [value for value in response.headers.get_list(name) if len(value) <= _MAX_HEADER_VALUE]


def header_of(response: httpx.Response, name: str) -> str:
    """The first value of a header, "" when absent. httpx would join several with commas: no Location or digest is made of two."""
    return next(iter(header_values(response, name)), "")


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """The whole body, not decoded. Raises: ResourceExhausted beyond `limit` bytes; RequestFailed."""
    length = header_of(response, "content-length")
    parts, total = [], 0
    if (whole_number(length, limit) or 0) <= limit:
        async for chunk in response.aiter_raw():
            total += len(chunk)
            if total > limit:
                break
            parts.append(bytes(chunk))
        else:
            return b"".join(parts)
    await response.aclose()
    raise ResourceExhausted(f"answer larger than {limit} bytes", where=shown_url(url_of(response)))


async def read_start(response: httpx.Response, limit: int) -> bytes:
    """The start of the body, whatever happens after it: for error texts."""
    parts, total = [], 0
    try:
        async with time_limit(5):
            async for chunk in response.aiter_raw():
                parts.append(bytes(chunk[: limit - total]))
                total += len(parts[-1])
                if total >= limit:
                    break
    except (RequestFailed, TimeoutError):
        pass  # the status says enough
    return b"".join(parts)


async def note_start(request: httpx.Request) -> None:
    """A hook for requests: when this one began."""
    request.extensions["began"] = time.monotonic()


async def log_exchange(response: httpx.Response) -> None:
    """A hook for responses: one exchange for the log, with headers that explain something and none that may hold a secret."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    request = response.request
    asked = "".join(f", {name} {printable(value, 80)}" for name in ("Range", "If-None-Match") if (value := request.headers.get(name)))
    told = "".join(f", {name} {printable(value, 120)}" for name in _TOLD if (value := header_of(response, name)))
    authorized = ", authorized" if "Authorization" in request.headers else ""
    seconds = time.monotonic() - request.extensions["began"]
    outcome = f"{response.status_code} after {seconds:.3f} s{authorized}{asked};{told.removeprefix(',')}"
    log.debug("%s %s: %s", request.method, shown_url(url_of(response)), outcome)


_TOLD: Final = (
    "Content-Type", "Content-Length", "Content-Range", "Docker-Content-Digest", "WWW-Authenticate", "Retry-After", "RateLimit-Remaining",
    "Warning", "Age", "X-Cache",
)  # fmt: skip
