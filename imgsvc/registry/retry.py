"""What to do after something went wrong, and for how long to leave an endpoint alone. Pure: time comes in as a number.

Source: RFC 9110 10.2.3 (Retry-After).
"""

from __future__ import annotations

import email.utils
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Final

from imgsvc.base.numerals import whole_number
from imgsvc.registry.ranges import RangeSupport

_TRIES: Final = 4  # on the last host: the first and three more
_TRIES_WITH_OTHERS: Final = 2  # on a host with others behind it
_FIRST_DELAY_S: Final = 0.25
_MAX_DELAY_S: Final = 8.0
MAX_WAIT_S: Final = 60.0  # longest wait for a rate limit within one pull
_MAX_PARK_S: Final = 300.0  # longest time an endpoint is left alone because it said so
_PROBE_EVERY_S: Final = MAX_WAIT_S  # one request meanwhile: a limit may end early, and any proxy can answer 429
_MAX_ACCOUNTS: Final = 256  # identities remembered per endpoint
_DEFAULT_PARK_S: Final = 2.0  # 429 without a usable Retry-After; doubles with each

_OPEN_AFTER: Final = 3  # failures to connect in a row
_FIRST_OPEN_S: Final = 10.0
_MAX_OPEN_S: Final = 300.0
_BUDGET: Final = 20.0  # retries an endpoint gets in a burst …
_BUDGET_PER_S: Final = 0.5  # … and what grows back, so that a broken one is not hammered by every pull at once

_RETRIED_STATUSES: Final = frozenset({408, 500, 502, 503, 504})


class Failure(Enum):
    """Kinds of failures that are treated differently."""

    UNREACHABLE = "unreachable"  # no connection; nothing was asked
    BROKEN = "broken"  # the connection failed, stalled, or the server said 5xx
    LIMITED = "limited"  # 429, or 503 with Retry-After
    DEFINITE = "definite"  # an answer that will not change by asking again
    LIED = "lied"  # bytes or headers that cannot be true


class Action(Enum):
    """What the caller does next."""

    RETRY = "retry"
    NEXT_HOST = "next host"


@dataclass(frozen=True, slots=True)
class Decision:
    """delay: wait this long before the retry [seconds]."""

    action: Action
    delay: float = 0.0


def kind_of_status(status: int, has_retry_after: bool) -> Failure:
    """The failure an HTTP error status is."""
    if status == 429 or (status == 503 and has_retry_after):
        return Failure.LIMITED
    return Failure.BROKEN if status in _RETRIED_STATUSES else Failure.DEFINITE


def retry_after(value: str, now: datetime) -> float | None:
    """A Retry-After header [seconds from now], None when absent, negative or unreadable; capped to minutes."""
    text = value.strip()
    if (number := whole_number(text, int(_MAX_PARK_S))) is not None:
        return min(float(number), _MAX_PARK_S)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    seconds = (at - now).total_seconds()
    return min(seconds, _MAX_PARK_S) if seconds > 0 else None


def decide(failure: Failure, tries: int, *, is_last: bool, parked_for: float, jitter: float, has_budget: bool) -> Decision:
    """After try number `tries` on one host failed.

    is_last: no other host is left to ask.  parked_for: how long the endpoint is to be left alone [seconds].
    jitter: random, 0 ≤ jitter < 1.  has_budget: the endpoint's retry budget is not used up.
    """
    if failure in (Failure.DEFINITE, Failure.LIED) or tries >= (_TRIES if is_last else _TRIES_WITH_OTHERS):
        return Decision(Action.NEXT_HOST)
    if failure is Failure.LIMITED:
        if is_last and parked_for <= MAX_WAIT_S:
            return Decision(Action.RETRY, parked_for + jitter)
        return Decision(Action.NEXT_HOST)
    if not has_budget or (failure is Failure.UNREACHABLE and not is_last):
        return Decision(Action.NEXT_HOST)
    delay = min(_FIRST_DELAY_S * 2 ** (tries - 1), _MAX_DELAY_S)
    return Decision(Action.RETRY, delay * (0.5 + jitter))


@dataclass(slots=True)
class _Account:
    """What one identity may ask of an endpoint.

    parked_until: no request before, but one at probe_at to see whether the rate limit still holds.  parks_in_a_row: of these.
    budget: retries left, as of budget_at.
    """

    parked_until: float = 0.0
    probe_at: float = 0.0
    is_probing: bool = False
    parks_in_a_row: int = 0
    budget: float = _BUDGET
    budget_at: float = 0.0


@dataclass(slots=True)
class Health:
    """What this node knows about one endpoint, over all pulls. Times are a monotonic clock's seconds.

    Registries limit the rate of an account, or of an address without one, so a limit holds for the identity it was told to;
    and the retries that one identity uses up are not another's.
    """

    accounts: OrderedDict[str, _Account] = field(default_factory=OrderedDict)
    failures_in_a_row: int = 0
    open_until: float = 0.0
    opened_in_a_row: int = 0
    probing_until: float = 0.0
    bad_digests: dict[str, None] = field(default_factory=dict)
    ranges: RangeSupport = field(default_factory=RangeSupport)

    def _account(self, identity: str) -> _Account:
        """Made when there is none; those used last are kept."""
        account = self.accounts.setdefault(identity, _Account())
        self.accounts.move_to_end(identity)
        if len(self.accounts) > _MAX_ACCOUNTS:
            self.accounts.popitem(last=False)
        return account

    def parked_for(self, now: float, identity: str) -> float:
        """Seconds until an identity may ask the endpoint again after a rate limit; 0 = now."""
        return max(0.0, self._account(identity).parked_until - now)

    def refusal(self, now: float, identity: str, *, is_last: bool) -> str:
        """Why not to ask this endpoint now, "" when it may be asked.

        A long rate limit lets a probe through each minute. An open circuit lets one through when its time is over, and never
        stands in the way of the last host.
        """
        account = self._account(identity)
        if now < account.parked_until:
            if now < account.probe_at:
                return "rate limited, as it said before"
            account.probe_at, account.is_probing = now + _PROBE_EVERY_S, True
        if is_last or self.failures_in_a_row < _OPEN_AFTER:
            return ""
        if now < self.open_until:
            return "circuit open after failures to connect"
        if now < self.probing_until:
            return "circuit half-open, another pull is probing"
        self.probing_until = now + _FIRST_OPEN_S
        return ""

    def succeeded(self) -> None:
        """It answered, be it with an error status."""
        self.failures_in_a_row = self.opened_in_a_row = 0
        self.open_until = self.probing_until = 0.0

    def served(self, identity: str) -> None:
        """It did what an identity asked: its rate limit is over."""
        account = self._account(identity)
        account.parks_in_a_row = 0
        if account.is_probing:  # other answers may belong to requests from before the limit
            account.parked_until, account.is_probing = 0.0, False

    def unreachable(self, now: float) -> None:
        """No connection."""
        self.failures_in_a_row += 1
        self.probing_until = 0.0
        if self.failures_in_a_row >= _OPEN_AFTER and now >= self.open_until:
            self.open_until = now + min(_FIRST_OPEN_S * 2**self.opened_in_a_row, _MAX_OPEN_S)
            self.opened_in_a_row += 1

    def limited(self, now: float, wait: float | None, identity: str) -> None:
        """It asked to be left alone by an identity for `wait` seconds, or did not say how long."""
        account = self._account(identity)
        if wait is None:
            wait = min(_DEFAULT_PARK_S * 2**account.parks_in_a_row, MAX_WAIT_S)
        account.parks_in_a_row = min(account.parks_in_a_row + 1, 16)
        account.parked_until = max(account.parked_until, now + min(wait, _MAX_PARK_S))
        account.probe_at, account.is_probing = now + _PROBE_EVERY_S, False

    def take_retry(self, now: float, identity: str) -> bool:
        """Spend one retry of an identity's budget if there is one."""
        account = self._account(identity)
        account.budget = min(_BUDGET, account.budget + (now - account.budget_at) * _BUDGET_PER_S)
        account.budget_at = now
        if account.budget < 1:
            return False
        account.budget -= 1
        return True

    def quarantine(self, digest: str) -> None:
        """It served wrong bytes under this digest: asked for it last from now on. The latest 256 are remembered."""
        self.bad_digests[digest] = None
        if len(self.bad_digests) > 256:
            del self.bad_digests[next(iter(self.bad_digests))]
