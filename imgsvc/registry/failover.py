"""Going through the endpoints of an operation: which one is asked next, after how long, and what the final error says."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from imgsvc.base.errors import printable
from imgsvc.registry.endpoint import Endpoint
from imgsvc.registry.http.exchange import RequestFailed
from imgsvc.registry.interfaces import Attempt, PullFailed, RegistryObserver
from imgsvc.registry.observers import LoggingObserver
from imgsvc.registry.retry import MAX_WAIT_S, Action, Decision, Failure, Health, decide

log = logging.getLogger(__name__)

T = TypeVar("T")

# The most telling failure first: it decides the category of the whole operation. "Not found" at a mirror says little.
_TELLING: Final = (
    "DATA_LOSS",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "DEADLINE_EXCEEDED",
    "UNAVAILABLE",
    "NOT_FOUND",
)


class HealthBook:
    """Health of every endpoint this node talks to, by base URL; shared by all operations of one client."""

    def __init__(self, observer: RegistryObserver | None = None) -> None:
        self._entries: dict[str, Health] = {}
        self._observer = observer or LoggingObserver()

    def of(self, endpoint: Endpoint) -> Health:
        """The endpoint's record, kept for as long as the process runs (their number is that of configured hosts)."""
        return self._entries.setdefault(endpoint.host.url, Health())

    def note(self, endpoint: Endpoint, error: RequestFailed) -> None:
        """Learn from a failure."""
        self._observer.failed(error.phase, error.failure.value)
        health, now = self.of(endpoint), time.monotonic()
        if error.failure is Failure.UNREACHABLE:
            health.unreachable(now)
            return
        health.succeeded()
        if error.failure is Failure.LIMITED:
            health.limited(now, error.wait, endpoint.identity)

    def served(self, endpoint: Endpoint) -> None:
        """It did what was asked."""
        self.of(endpoint).succeeded()
        self.of(endpoint).served(endpoint.identity)

    def parked_for(self, endpoint: Endpoint) -> float:
        """Seconds until the endpoint's caller may ask it again after a rate limit; 0 = now."""
        return self.of(endpoint).parked_for(time.monotonic(), endpoint.identity)

    def decide(self, endpoint: Endpoint, error: RequestFailed, tries: int, *, is_last: bool) -> Decision:
        """The next step after `note`."""
        health, now = self.of(endpoint), time.monotonic()
        decision = decide(
            error.failure,
            tries,
            is_last=is_last,
            parked_for=self.parked_for(endpoint),
            jitter=random.random(),  # noqa: S311  # spreads retries; no secret
            has_budget=health.take_retry(now, endpoint.identity),
        )
        self._observer.decided(error.failure.value, decision.action.value)
        return decision


class Failover:
    """One operation over several endpoints, in their order."""

    def __init__(self, endpoints: Sequence[Endpoint], book: HealthBook, attempts: list[Attempt]) -> None:
        self._endpoints = list(endpoints)
        self._book = book
        self._attempts = attempts
        self._errors: list[tuple[Endpoint, RequestFailed]] = []

    async def run(self, action: Callable[[Endpoint], Awaitable[T]], what: str) -> T:
        """The first success of `action`. Raises: PullFailed listing every attempt, under the title `what`."""
        for position, endpoint in enumerate(self._endpoints):
            is_last = position == len(self._endpoints) - 1
            tries, waited = 0, 0.0
            if not await self.admit(endpoint, is_last=is_last):
                continue
            while True:
                tries += 1
                try:
                    result = await action(endpoint)
                except RequestFailed as error:
                    self._errors.append((endpoint, error))
                    if error.failure is Failure.LIED:
                        endpoint.correct(error)  # it was a good answer when it was recorded
                    self._book.note(endpoint, error)
                    decision = self._book.decide(endpoint, error, tries, is_last=is_last)
                    waited += decision.delay
                    if decision.action is Action.NEXT_HOST or waited > MAX_WAIT_S:
                        break
                    await asyncio.sleep(decision.delay)
                    continue
                self._book.served(endpoint)
                return result
        await self._ask_for_reasons()
        raise self.failure(what)

    async def _ask_for_reasons(self) -> None:
        """Put the registries' own words into refusals of HEAD. One request each, and none where that is a burden."""
        for endpoint in dict.fromkeys(endpoint for endpoint, error in self._errors if error.is_silent):
            health, now = self._book.of(endpoint), time.monotonic()
            if self._book.parked_for(endpoint) or not health.take_retry(now, endpoint.identity) or not (told := await endpoint.reason()):
                continue
            self._errors = [(e, told if e is endpoint and error.is_silent else error) for e, error in self._errors]

    async def admit(self, endpoint: Endpoint, *, is_last: bool) -> bool:
        """Whether to ask this endpoint now; for the last one a short rate limit is waited out."""
        identity = await endpoint.identify()
        health, now = self._book.of(endpoint), time.monotonic()
        parked = health.parked_for(now, identity)
        if parked and is_last and parked <= MAX_WAIT_S:
            await asyncio.sleep(parked + random.random())  # noqa: S311  # spreads the waiters; no secret
            return True
        refusal = health.refusal(now, identity, is_last=is_last)
        if not refusal:
            return True
        code = "RESOURCE_EXHAUSTED" if parked else "UNAVAILABLE"
        error = RequestFailed(refusal, code=code, failure=Failure.LIMITED if parked else Failure.UNREACHABLE, phase="skipped")
        self._errors.append((endpoint, error))
        endpoint.record("skipped", 0, now, refusal)
        return False

    def failed(self, endpoint: Endpoint, error: RequestFailed) -> None:
        """Remember a failure that was handled outside run()."""
        self._errors.append((endpoint, error))

    def failure(self, what: str) -> PullFailed:
        """The error of the whole operation."""
        if not self._endpoints:
            return PullFailed(what, [], "FAILED_PRECONDITION", retryable=False, hint="no configured host has the capability for this")
        for attempt in self._attempts:
            log.info("%s: %s [%s] %s after %.2f s", what, attempt.endpoint, attempt.phase, attempt.status or "no answer", attempt.elapsed)
        endpoint, error = min(self._errors, key=_rank)
        hint = error.hint
        note = f", credential {endpoint.credential_use}" if error.status in (401, 403) else ""
        if error.failure is Failure.LIMITED:
            hint = "the registry limits the rate; pull through a mirror or with credentials, or later"
        return PullFailed(
            f"{what}: {printable(error.what, 400)}{note}",
            self._attempts,
            error.code,
            retryable=any(e.retryable for _, e in self._errors),
            where=error.where,
            hint=hint,
        )


def _rank(failed: tuple[Endpoint, RequestFailed]) -> float:
    endpoint, error = failed
    if error.code == "NOT_FOUND" and endpoint.host.canonical:
        # The registry itself says there is no such thing; a dead mirror before it changes nothing.
        return _TELLING.index("DEADLINE_EXCEEDED") - 0.5
    return _TELLING.index(error.code) if error.code in _TELLING else _TELLING.index("UNAVAILABLE") - 0.5
