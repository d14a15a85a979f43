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

import httpx

from imgsvc.base.concurrency import stop_tasks
from imgsvc.base.numerals import whole_number
from imgsvc.base.oci import KIB, MIB, Descriptor
from imgsvc.registry.documents import lied
from imgsvc.registry.endpoint import Ask, Endpoint
from imgsvc.registry.failover import Failover, HealthBook
from imgsvc.registry.http.exchange import RequestFailed, header_of, url_of
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.interfaces import BlobSink
from imgsvc.registry.ranges import PROOF, TICK_S, Plan, Span, Tuner, partial_problem, range_header
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
        self._workers: dict[asyncio.Task[None], Span] = {}
        self._current = 0
        self._tries = 0
        self._waited = 0.0
        self._progress = 0
        self._etags: dict[str, str] = {}
        self._plain_failed: set[str] = set()  # endpoints where a plain request failed like the ranged one before it
        self.received = 0
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
            await stop_tasks(*self._workers)  # a cancelled worker first finishes the write it has under way

    def _start_workers(self) -> None:
        while len(self._workers) < self._tuner.target:
            is_extra = bool(self._workers)
            if is_extra and not self._may_add():
                return
            span = self._plan.take()
            if span is None:
                if is_extra:
                    self._extra.give_back()
                return
            worker = asyncio.create_task(self._work(span))
            self._workers[worker] = span
            if is_extra:
                self._begin_probe(worker, span)
                worker.add_done_callback(lambda _: self._extra.give_back())

    def _begin_probe(self, worker: asyncio.Task[None], span: Span) -> None:
        """Now, because the worker itself begins later than another blob may ask."""
        ranges = self._book.of(self._endpoint).ranges
        ranges.begin(span)
        worker.add_done_callback(lambda _: ranges.end(span))

    def _may_add(self) -> bool:
        """Whether to fetch over another connection; takes it from the budget then."""
        ranges = self._book.of(self._endpoint).ranges
        return not self._book.parked_for(self._endpoint) and ranges.admits_another(time.monotonic()) and self._extra.take()

    async def _watch(self) -> None:
        before, connections, started = self.received, len(self._workers), time.monotonic()
        done, _ = await asyncio.wait(self._workers, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
        for worker in done:
            del self._workers[worker]
        failures = [error for worker in done if not worker.cancelled() and (error := worker.exception())]
        if failures:
            raise failures[0]
        if not done:
            self._tuner.sample(connections, (self.received - before) / (time.monotonic() - started))

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
                wanted = self._range_of(endpoint, span)
                try:
                    await self._fetch(self._source, span, wanted)
                except RequestFailed as error:
                    is_refusal = self._is_refused_range(endpoint, error, wanted)
                    if not is_refusal:
                        self._book.note(endpoint, error)
                    if len(self._workers) > 1:
                        # The others go on; the last remaining stream decides about the host.
                        self._tuner.limit(len(self._workers) - 1)
                        return
                    if not is_refusal and (span.left or not wanted):
                        await self._recover(endpoint, error, wanted)
                else:
                    self._book.served(endpoint)
        finally:
            self._plan.finish(span)

    def _range_of(self, endpoint: Endpoint, span: Span) -> str:
        """The Range to ask for, "" for a plain request: the whole blob, of which what is here already is dropped."""
        if self._book.of(endpoint).ranges.is_refused(time.monotonic()):
            return ""
        return range_header(span, self._descriptor.size)

    def _is_refused_range(self, endpoint: Endpoint, error: RequestFailed, wanted: str) -> bool:
        """Learn from the failure of a request with a Range. True: the next request is plain and may follow at once."""
        ranges, now = self._book.of(endpoint).ranges, time.monotonic()
        if not wanted or endpoint.base in self._plain_failed:
            return False
        is_answer = error.status >= 400 and error.status != 401 and error.phase == "fetch"
        if error.failure is Failure.LIED or (is_answer and (error.failure is Failure.DEFINITE or not ranges.is_proven)):
            ranges.refused(now)
        return ranges.is_refused(now)

    async def _recover(self, endpoint: Endpoint, error: RequestFailed, wanted: str) -> None:
        """Wait, or go to the next host. Raises: PullFailed when there is none."""
        self._failover.failed(endpoint, error)
        if self.received - self._progress >= _PROGRESS:
            self._tries, self._waited = 0, 0.0
        self._progress = self.received
        self._tries += 1
        is_last = self._current == len(self._sources) - 1
        decision = self._book.decide(endpoint, error, self._tries, is_last=is_last)
        self._waited += decision.delay
        if decision.action is Action.RETRY and self._waited <= MAX_WAIT_S:
            await asyncio.sleep(decision.delay)
            return
        if wanted and error.failure is Failure.BROKEN and endpoint.base not in self._plain_failed:
            self._book.of(endpoint).ranges.refused(time.monotonic())  # one plain request before the host is left
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

    async def _fetch(self, source: Source, span: Span, wanted: str) -> None:
        endpoint, began = source.endpoint, time.monotonic()
        headers = [("Accept", "*/*")]
        if wanted:
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
        ranges = self._book.of(endpoint).ranges
        start, end = (span.position, span.end) if wanted else (0, self._descriptor.size)
        if wanted:
            ranges.begin(span)
        try:
            response = await endpoint.ask(ask)
        except RequestFailed:
            if not wanted:
                ranges.forget()
                self._plain_failed.add(endpoint.base)
            raise
        async with contextlib.aclosing(response):
            self._book.of(endpoint).succeeded()
            if response.status_code == 200:
                if wanted:
                    ranges.refused(time.monotonic())
                start, end = 0, self._descriptor.size
            self._check_head(response, start, end)
            self._check_etag(endpoint, response)
            if response.status_code == 200 and span.position and len(self._workers) > 1:
                raise lied(response, "the whole blob instead of the range asked for", code="UNAVAILABLE")
            before = self.received
            span.is_sure = response.status_code == 200
            try:
                await self._copy(endpoint, response, span, start, end)
            except RequestFailed as error:
                endpoint.record("fetch", response.status_code, began, error.what)
                if response.status_code == 200:
                    ranges.forget()
                elif self.received - before < _PROGRESS:
                    ranges.broke(time.monotonic())
                raise
            if response.status_code == 206 and span.position == end:
                ranges.completed()

    def _check_etag(self, endpoint: Endpoint, response: httpx.Response) -> None:
        etag = header_of(response, "etag")
        if etag.startswith("W/") or not etag:
            return
        if self._etags.setdefault(endpoint.base, etag) != etag:
            raise lied(response, "the content changed between two requests (another ETag)")

    def _check_head(self, response: httpx.Response, start: int, end: int) -> None:
        """Whether the answer announces the bytes [start, end). Raises: RequestFailed."""
        size = self._descriptor.size
        length, encoding = header_of(response, "content-length"), header_of(response, "content-encoding").strip().lower()
        if response.status_code == 206:
            if problem := partial_problem(header_of(response, "content-range"), start, end, size):
                raise lied(response, problem)
            if encoding not in ("", "identity"):
                raise lied(response, f"a part of the blob with Content-Encoding {encoding[:40]!r}, which was not asked for")
        if length and whole_number(length, end - start) != end - start:
            note = f" with Content-Encoding {encoding[:40]!r}" if encoding else ""
            raise lied(response, f"{length[:20]} bytes announced, {end - start} expected{note}")

    async def _take(self, endpoint: Endpoint, span: Span, part: memoryview, received: int) -> None:
        """Store the span's next bytes. received: of this answer so far, with these [bytes]."""
        offset = span.position
        span.position += len(part)
        self.received += len(part)
        self.by_endpoint[endpoint.base] += len(part)
        if not span.is_sure and received >= PROOF:
            span.is_sure = True
            ranges = self._book.of(endpoint).ranges
            ranges.served()
            ranges.end(span)
        span.is_writing = True
        await self._sink.write_at(offset, part)
        span.is_writing = False

    async def _copy(self, endpoint: Endpoint, response: httpx.Response, span: Span, at: int, announced_end: int) -> None:
        """Move a body that starts at byte `at` of the blob into the sink until the span ends, which may have become shorter since.

        What others gave back and still lies ahead of this stream is taken from it too.
        """
        clock = _Clock(self._pace, shown_url(url_of(response)))
        start = at
        chunks = response.aiter_raw()
        while (chunk := await clock.next(chunks)) is not None:
            with memoryview(chunk) as rest:  # views are given back at once: a failure's traceback would keep the body's memory
                taken = 0
                while taken < len(rest):
                    if not span.left:
                        raise lied(response, "more bytes than were asked for")
                    skipped = min(span.position - at, len(rest) - taken)
                    with rest[taken + skipped : taken + skipped + span.left] as part:
                        taken += skipped + len(part)
                        at += skipped + len(part)
                        if part:
                            await self._take(endpoint, span, part, at - start)
                    if not span.left and span.end != announced_end and not self._goes_on(endpoint, span, announced_end):
                        return  # the rest is another connection's now
        if span.left:
            raise RequestFailed(
                "the body ended early",
                code="UNAVAILABLE",
                failure=Failure.BROKEN,
                phase="fetch",
                status=response.status_code,
                where=shown_url(url_of(response)),
            )

    def _goes_on(self, endpoint: Endpoint, span: Span, end: int) -> bool:
        """Whether a stream up to `end` that has reached the end of its span is read on, for what others have not brought."""
        across = self._book.of(endpoint).ranges.is_refused(time.monotonic())
        if not self._plan.extend(span, end, across=across):
            return False
        for worker, theirs in self._workers.items():
            if not (theirs.left or theirs.is_sure or theirs.is_writing):
                worker.cancel()  # it waits for bytes that come from here now
        return True


class _Clock:
    """Measures the time spent waiting for the network, which a slow disk does not count into."""

    def __init__(self, pace: Pace, where: str) -> None:
        self._pace = pace
        self._where = where
        self._waited = 0.0
        self._bytes = 0

    async def next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        """The next chunk, None at the end. Raises: RequestFailed when the connection is too slow."""
        started = time.monotonic()
        chunk: bytes | None = await anext(chunks, None)
        self._waited += time.monotonic() - started
        self._bytes += len(chunk or b"")
        if self._waited >= self._pace.window:
            rate = self._bytes / self._waited
            if rate < self._pace.min_rate and chunk is not None:
                what = f"less than {self._pace.min_rate:.0f} bytes/s over {self._pace.window:g} s"
                raise RequestFailed(what, code="DEADLINE_EXCEEDED", failure=Failure.BROKEN, phase="fetch", where=self._where)
            self._waited, self._bytes = 0.0, 0
        return chunk
