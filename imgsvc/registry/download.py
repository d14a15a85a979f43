"""One blob into a sink: over several connections and hosts, resuming wherever one breaks off.

The digest is the caller's to verify. Here every byte goes to its place once, a server that announces or sends other bytes
than asked for is caught, and a connection that stalls or trickles is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from imgsvc.oci import KIB, MIB, Descriptor
from imgsvc.registry.documents import lied
from imgsvc.registry.endpoint import Ask, Endpoint
from imgsvc.registry.exchange import Chunk, RequestFailed, Response
from imgsvc.registry.failover import Failover, HealthBook
from imgsvc.registry.interfaces import BlobSink
from imgsvc.registry.ranges import TICK_S, Plan, Span, Tuner, partial_problem, range_header
from imgsvc.registry.redact import shown_url
from imgsvc.registry.retry import MAX_WAIT_S, Action, Failure

_PROGRESS: Final = MIB  # [bytes] after which earlier failures are forgotten


@dataclass(frozen=True, slots=True)
class Pace:
    """The slowest connection that is tolerated: bytes per second over a window of time spent waiting for the network."""

    min_rate: float = 1 * KIB
    window: float = 30.0


@dataclass(frozen=True, slots=True)
class Source:
    """A place to fetch the blob from: `path` at an endpoint."""

    endpoint: Endpoint
    path: str


class ConnectionBudget:
    """Connections beyond the first of each blob, over the whole node."""

    def __init__(self, most: int) -> None:
        self._most = self._free = most

    def resize(self, most: int) -> None:
        """Another limit from now on; what is taken stays taken."""
        self._free += most - self._most
        self._most = most

    def take(self) -> bool:
        """One more, if there is one."""
        if self._free <= 0:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        """Return one."""
        self._free += 1


class Download:
    """One run. Its counters tell who served what."""

    def __init__(
        self,
        descriptor: Descriptor,
        sources: Sequence[Source],
        sink: BlobSink,
        *,
        failover: Failover,
        book: HealthBook,
        pace: Pace,
        extra: ConnectionBudget,
    ) -> None:
        self._descriptor = descriptor
        self._sources = list(sources)
        self._sink = sink
        self._failover = failover
        self._book = book
        self._pace = pace
        self._extra = extra
        self._plan = Plan(sink.missing())
        self._tuner = Tuner()
        self._workers: set[asyncio.Task[None]] = set()
        self._current = 0
        self._tries = 0
        self._waited = 0.0
        self._progress = 0
        self._etags: dict[str, str] = {}
        self._received = 0
        self.by_endpoint: Counter[str] = Counter()

    async def run(self) -> None:
        """Raises: PullFailed when no endpoint is left; what the sink raises."""
        if self._plan.left and not await self._admitted():
            raise self._failed()
        try:
            while self._workers or self._plan.left:
                self._start_workers()
                await self._watch()
        finally:
            for worker in self._workers:
                worker.cancel()
            # A cancelled worker first finishes the write it has under way.
            await asyncio.gather(*self._workers, return_exceptions=True)

    def _start_workers(self) -> None:
        while len(self._workers) < self._tuner.target:
            is_extra = bool(self._workers)
            if is_extra and (self._book.of(self._endpoint).parked_for(time.monotonic()) or not self._extra.take()):
                return
            span = self._plan.take()
            if span is None:
                if is_extra:
                    self._extra.give_back()
                return
            worker = asyncio.create_task(self._work(span))
            self._workers.add(worker)
            if is_extra:
                worker.add_done_callback(lambda _: self._extra.give_back())

    async def _watch(self) -> None:
        before, connections, started = self._received, len(self._workers), time.monotonic()
        done, self._workers = await asyncio.wait(self._workers, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
        failures = [error for worker in done if (error := worker.exception())]
        if failures:
            raise failures[0]
        if not done:
            self._tuner.sample(connections, (self._received - before) / (time.monotonic() - started))

    @property
    def _source(self) -> Source:
        return self._sources[min(self._current, len(self._sources) - 1)]

    @property
    def _endpoint(self) -> Endpoint:
        return self._source.endpoint

    async def _work(self, span: Span) -> None:
        try:
            while span.left:
                endpoint = self._endpoint
                try:
                    await self._fetch(self._source, span)
                except RequestFailed as error:
                    self._book.note(endpoint, error)
                    if len(self._workers) > 1:
                        # The others go on; whoever is left alone decides about the host.
                        self._tuner.limit(len(self._workers) - 1)
                        return
                    await self._recover(endpoint, error)
                else:
                    self._book.of(endpoint).served()
        finally:
            self._plan.finish(span)

    async def _recover(self, endpoint: Endpoint, error: RequestFailed) -> None:
        """Wait, or go to the next host. Raises: PullFailed when there is none."""
        self._failover.failed(endpoint, error)
        if self._received - self._progress >= _PROGRESS:
            self._tries, self._waited = 0, 0.0
        self._progress = self._received
        self._tries += 1
        is_last = self._current == len(self._sources) - 1
        decision = self._book.decide(endpoint, error, self._tries, is_last=is_last)
        self._waited += decision.delay
        if decision.action is Action.RETRY and self._waited <= MAX_WAIT_S:
            await asyncio.sleep(decision.delay)
            return
        if error.failure is Failure.LIED:
            self._book.of(endpoint).quarantine(str(self._descriptor.digest))
        self._current += 1
        self._tries, self._waited = 0, 0.0
        if not await self._admitted():
            raise self._failed()

    async def _admitted(self) -> bool:
        """Move on to the first endpoint from the current one that may be asked."""
        while self._current < len(self._sources):
            if await self._failover.admit(self._endpoint, is_last=self._current == len(self._sources) - 1):
                return True
            self._current += 1
        return False

    def _failed(self) -> Exception:
        return self._failover.failure(f"blob {self._descriptor.digest} not fetched")

    async def _fetch(self, source: Source, span: Span) -> None:
        endpoint, began = source.endpoint, time.monotonic()
        size, start, end = self._descriptor.size, span.position, span.end
        headers = [("Accept", "*/*")]
        if wanted := range_header(span, size):
            headers.append(("Range", wanted))
            if etag := self._etags.get(endpoint.base):
                headers.append(("If-Range", etag))
        ask = Ask(
            "GET",
            source.path,
            "fetch",
            scopes=(endpoint.scope(),),
            headers=tuple(headers),
            ok=frozenset({200, 206}),
            is_bulk=True,
        )
        async with await endpoint.ask(ask) as response:
            self._book.of(endpoint).succeeded()
            self._check_etag(endpoint, response)
            skip = self._check_head(response, start, end)
            if skip and len(self._workers) > 1:
                raise lied(response, "the whole blob instead of the range asked for", code="UNAVAILABLE")
            try:
                await self._copy(endpoint, response, span, end, skip)
            except RequestFailed as error:
                endpoint.record("fetch", response.status, began, error.what)
                raise

    def _check_etag(self, endpoint: Endpoint, response: Response) -> None:
        etag = response.headers.get("etag")
        if etag.startswith("W/") or not etag:
            return
        if self._etags.setdefault(endpoint.base, etag) != etag:
            raise lied(response, "the content changed between two ranges (another ETag)")

    def _check_head(self, response: Response, start: int, end: int) -> int:
        """Bytes to drop at the start of the body: 0, or `start` when a server without ranges sends everything."""
        size = self._descriptor.size
        expected = size if response.status == 200 else end - start
        length = response.headers.get("content-length")
        if response.status == 206 and (problem := partial_problem(response.headers.get("content-range"), start, end, size)):
            raise lied(response, problem)
        if length and (not length.isdigit() or int(length[:20]) != expected):
            encoding = response.headers.get("content-encoding")
            note = f" with Content-Encoding {encoding[:40]!r}" if encoding else ""
            raise lied(response, f"{length[:20]} bytes announced, {expected} expected{note}")
        return start if response.status == 200 else 0

    async def _copy(self, endpoint: Endpoint, response: Response, span: Span, announced_end: int, skip: int) -> None:
        """Move the body into the sink until the span ends. The span may have become shorter since `announced_end` was asked for."""
        clock = _Clock(self._pace, shown_url(response.url))
        async with contextlib.aclosing(response.chunks()) as chunks:
            while (chunk := await clock.next(chunks)) is not None:
                if skip:
                    dropped = min(skip, len(chunk))
                    skip -= dropped
                    chunk = chunk[dropped:]
                if len(chunk) > span.left:
                    if span.end == announced_end:
                        raise lied(response, "more bytes than the blob has")
                    chunk = chunk[: span.left]  # the rest is another connection's now
                offset = span.position
                span.position += len(chunk)
                self._received += len(chunk)
                self.by_endpoint[endpoint.base] += len(chunk)
                await self._sink.write_at(offset, chunk)
                if not span.left and span.end != announced_end:
                    return
        if span.left:
            what = f"body ended {span.left} bytes early"
            raise RequestFailed(
                what, code="UNAVAILABLE", failure=Failure.BROKEN, phase="fetch", status=response.status, where=shown_url(response.url)
            )


class _Clock:
    """Measures the time spent waiting for the network, which a slow disk does not count into."""

    def __init__(self, pace: Pace, where: str) -> None:
        self._pace = pace
        self._where = where
        self._waited = 0.0
        self._bytes = 0

    async def next(self, chunks: AsyncIterator[Chunk]) -> Chunk | None:
        """The next chunk, None at the end. Raises: RequestFailed when the connection is too slow."""
        started = time.monotonic()
        chunk: Chunk | None = await anext(chunks, None)
        self._waited += time.monotonic() - started
        self._bytes += len(chunk or b"")
        if self._waited >= self._pace.window:
            rate = self._bytes / self._waited
            if rate < self._pace.min_rate and chunk is not None:
                what = f"only {rate:.0f} bytes/s over {self._waited:.0f} s, less than {self._pace.min_rate:.0f}"
                raise RequestFailed(what, code="DEADLINE_EXCEEDED", failure=Failure.BROKEN, phase="fetch", where=self._where)
            self._waited, self._bytes = 0.0, 0
        return chunk
