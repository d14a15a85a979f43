"""A request and its answer, for transport.py in this process and bulk.py in another one."""

from __future__ import annotations

import contextlib
import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

from imgsvc.base.concurrency import time_limit
from imgsvc.base.errors import ImgsvcError, ResourceExhausted, printable
from imgsvc.base.numerals import whole_number
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.netguard import ANYWHERE, Reach
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.retry import Failure

log = logging.getLogger(__name__)

_MAX_HEADER_VALUE: Final = 64 * 1024  # [characters] h11 bounds the whole head to about 100 KiB

Body = bytes | AsyncIterable[bytes]
Chunk = bytes | memoryview


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


class Headers:
    """Response headers; names in any case, values as text, those with control characters dropped."""

    def __init__(self, items: Iterable[tuple[str, str]]) -> None:
        self._items = [(name.lower(), value) for name, value in items]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._items)

    def get(self, name: str) -> str:
        """The first value, "" when absent."""
        return next(iter(self.all(name)), "")

    def all(self, name: str) -> list[str]:
        """Every value."""
        wanted = name.lower()
        return [value for key, value in self._items if key == wanted and len(value) <= _MAX_HEADER_VALUE]


class Response(ABC):
    """An answer whose body is still to come. Close it; closing early closes the connection."""

    def __init__(self, status: int, headers: Headers, url: str, phase: str) -> None:
        self.status = status
        self.headers = headers
        self.url = url
        self.phase = phase

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The TLS session, when it is one of this process; for what `hosts check` reports."""
        return None

    @abstractmethod
    def reach(self) -> Reach:
        """Address class of the server; unknown through a proxy, so PUBLIC, the narrowest."""

    @abstractmethod
    def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The body as it arrives, not decoded. A chunk is good until the next one is asked for. Raises: RequestFailed."""

    @abstractmethod
    async def close(self) -> None:
        """Idempotent."""

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises: ResourceExhausted beyond `limit` bytes; RequestFailed."""
        length = self.headers.get("content-length")
        parts, total = [], 0
        if (whole_number(length, limit) or 0) <= limit:
            async with contextlib.aclosing(self.chunks()) as chunks:
                async for chunk in chunks:
                    total += len(chunk)
                    if total > limit:
                        break
                    parts.append(bytes(chunk))
                else:
                    return b"".join(parts)
        await self.close()
        raise ResourceExhausted(f"answer larger than {limit} bytes", where=shown_url(self.url))

    async def read_some(self, limit: int) -> bytes:
        """The start of the body, whatever happens after it: for error texts."""
        parts, total = [], 0
        try:
            async with time_limit(5), contextlib.aclosing(self.chunks()) as chunks:
                async for chunk in chunks:
                    parts.append(bytes(chunk[: limit - total]))
                    total += len(parts[-1])
                    if total >= limit:
                        break
        except (RequestFailed, TimeoutError):
            pass  # the status says enough
        return b"".join(parts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


class Sender(Protocol):
    """Who makes requests. timeouts: for those that begin from now on."""

    timeouts: Timeouts

    async def send(self, method: str, url: str, headers: Sequence[tuple[str, str]], *, route: Route, phase: str) -> Response:
        """Send one request without a body and wait for the answer's head.

        Raises: RequestFailed; InvalidArgument when TLS files cannot be used.
        """


def log_exchange(method: str, sent: Sequence[tuple[str, str]], response: Response, seconds: float) -> None:
    """One exchange for the log: headers that explain something, and none that may hold a secret."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    asked = "".join(f", {name} {printable(value, 80)}" for name, value in sent if name in ("Range", "If-None-Match"))
    told = "".join(f", {name} {printable(value, 120)}" for name in _TOLD if (value := response.headers.get(name)))
    authorized = ", authorized" if any(name == "Authorization" for name, _ in sent) else ""
    outcome = f"{response.status} after {seconds:.3f} s{authorized}{asked};{told.removeprefix(',')}"
    log.debug("%s %s: %s", method, shown_url(response.url), outcome)


_TOLD: Final = (
    "Content-Type", "Content-Length", "Content-Range", "Docker-Content-Digest", "WWW-Authenticate", "Retry-After", "RateLimit-Remaining",
    "Warning", "Age", "X-Cache",
)  # fmt: skip
