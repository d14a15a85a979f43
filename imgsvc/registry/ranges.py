"""Who fetches which bytes of a blob, and over how many connections. Pure.

One connection starts on everything that is missing. More connections take the far half of whatever has most left, so a
blob that one connection can fetch at full speed stays one plain request, and nothing is cut into pieces in advance.

Source: RFC 9110 14 (range requests).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from imgsvc.base.oci import KIB, MIB

MIN_SPAN: Final = 4 * MIB  # [bytes] below which another connection costs more than it brings
MAX_CONNECTIONS: Final = 8  # per blob; beyond, registries start to answer 429
TICK_S: Final = 0.25  # time between two decisions about connections
PROOF: Final = 256 * KIB  # [bytes] of a part after which its connection is trusted to bring the rest
_PLAIN_FOR_S: Final = 900.0  # how long an endpoint that refused a range is asked for whole blobs only
_WORTH_IT: Final = 1.3  # twice the connections must bring at least this much more

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)


@dataclass(slots=True, eq=False)
class Span:
    """Bytes [position, end) of the blob still to come over one connection; `end` shrinks when another takes a part.

    is_sure: the connection has shown that it delivers them. is_writing: some are on their way into the sink.
    """

    position: int
    end: int
    is_sure: bool = False
    is_writing: bool = False

    @property
    def left(self) -> int:
        """Bytes to go."""
        return self.end - self.position


class Plan:
    """All spans of one download."""

    def __init__(self, missing: Iterable[tuple[int, int]]) -> None:
        self._waiting = [Span(offset, offset + length) for offset, length in missing if length > 0]
        self._running: list[Span] = []

    @property
    def left(self) -> int:
        """Bytes not fetched yet."""
        return sum(span.left for span in (*self._waiting, *self._running))

    def take(self) -> Span | None:
        """A span that no stream works on, else the far half of the longest running one, else None."""
        if self._waiting:
            span = min(self._waiting, key=lambda s: s.position)
            self._waiting.remove(span)
        else:
            victim = max(self._running, key=lambda s: s.left, default=None)
            if victim is None or victim.left < 2 * MIN_SPAN:
                return None
            middle = victim.position + (victim.left + 1) // 2
            span = Span(middle, victim.end)
            victim.end = middle
        self._running.append(span)
        return span

    def finish(self, span: Span) -> None:
        """A connection is done with its span; what is left of it waits for the next."""
        self._running.remove(span)
        span.is_sure = False
        if span.left > 0:
            self._waiting.append(span)

    def extend(self, span: Span, end: int, *, across: bool) -> bool:
        """Reuse a finished span as the next one of a stream up to `end`; False when there is none.

        The next one waits, or the connection that asked for it is not sure and loses it. Between the two lie few bytes that are
        here already; across: any number.
        """
        reach = end if across else span.end + MIN_SPAN
        unsure = [s for s in self._running if s.left and not (s.is_sure or s.is_writing)]
        ahead = [s for s in (*self._waiting, *unsure) if span.end <= s.position <= reach and s.end <= end]
        if not ahead:
            return False
        following = min(ahead, key=lambda s: s.position)
        span.position, span.end = following.position, following.end
        following.end = following.position
        self._waiting = [s for s in self._waiting if s.left]
        return True


@dataclass(slots=True)
class RangeSupport:
    """Whether an endpoint serves parts of blobs, learnt from its answers. Times are a monotonic clock's seconds.

    Many servers and proxies answer a Range with an error, or with something else than the part, and a plain GET well.
    A first range is a probe; until it has delivered something no other blob asks for a part beside its stream.
    """

    is_proven: bool = False
    _probe: Span | None = None
    _refused_until: float = 0.0
    _may_break: bool = False  # a part came whole, so that the next one that breaks off may be the line's fault

    def is_refused(self, now: float) -> bool:
        """Whether to ask for whole blobs only."""
        return now < self._refused_until

    def admits_another(self, now: float) -> bool:
        """Whether a blob may ask for a part beside its first connection."""
        return self.is_proven or not (self.is_refused(now) or self._probe)

    def begin(self, span: Span) -> None:
        """A part will be asked for."""
        if not self.is_proven and self._probe is None:
            self._probe = span

    def end(self, span: Span) -> None:
        """It was, or never will be. Idempotent."""
        if self._probe is span:
            self._probe = None

    def served(self) -> None:
        """A part came, or much of it."""
        self.is_proven, self._refused_until = True, 0.0

    def completed(self) -> None:
        """A part came to its end."""
        self.served()
        self._may_break = True

    def broke(self, now: float) -> None:
        """A part broke off after few bytes."""
        if not self._may_break:
            self.refused(now)
        self._may_break = False

    def refused(self, now: float) -> None:
        """A range was answered by something else than its bytes."""
        self.is_proven, self._refused_until = False, now + _PLAIN_FOR_S

    def forget(self) -> None:
        """A plain request failed too: perhaps it was not about ranges, and they would save much now."""
        self._refused_until = 0.0


class Tuner:
    """How many connections a blob gets: doubled for as long as that makes it notably faster."""

    def __init__(self, most: int = MAX_CONNECTIONS) -> None:
        self._most = most
        self.target = 1
        self._last: tuple[int, float] | None = None  # connections and rate of the last step
        self._is_settled = False

    def sample(self, connections: int, rate: float) -> None:
        """Learn the rate [bytes/s] of a tick during which `connections` were busy throughout."""
        if self._is_settled or connections != self.target or rate <= 0:
            return
        if self._last is not None and rate < self._last[1] * _WORTH_IT:
            self.target = self._last[0]
            self._is_settled = True
            return
        self._last = (connections, rate)
        self.target = min(connections * 2, self._most)
        self._is_settled = self.target == connections

    def limit(self, connections: int) -> None:
        """The server does not take more than this."""
        self.target = max(1, connections)
        self._is_settled = True


def range_header(span: Span, size: int) -> str:
    """The value of Range for a span of a blob of `size` bytes, "" when it is the whole blob."""
    return "" if (span.position, span.end) == (0, size) else f"bytes={span.position}-{span.end - 1}"


def partial_problem(content_range: str, start: int, end: int, size: int) -> str:
    """Why a 206 is not the range [start, end) of a blob of `size` bytes that was asked for, "" when it is."""
    match = _CONTENT_RANGE.fullmatch(content_range.strip())
    if not match:
        return "206 without a readable Content-Range"
    first, last = int(match[1]), int(match[2])
    if match[3] != "*" and int(match[3]) != size:
        return f"the registry says the blob has {match[3]} bytes, its descriptor says {size}"
    if first != start or last != end - 1:
        return f"bytes {start}-{end - 1} were asked for, {first}-{last} are announced"
    return ""
