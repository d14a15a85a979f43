"""Who fetches which bytes of a blob, and over how many connections. Pure.

One connection starts on everything that is missing. More connections take the far half of whatever has most left, so a
blob that one connection can fetch at full speed stays one plain request, and nothing is cut into pieces in advance.

Source: RFC 9110 14 (range requests); needs.md A1.1, A3.4, C-R13.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from imgsvc.oci import MIB

MIN_SPAN: Final = 4 * MIB  # [bytes] below which another connection costs more than it brings
MAX_CONNECTIONS: Final = 8  # per blob; beyond, registries start to answer 429
TICK_S: Final = 0.25  # time between two decisions about connections
_WORTH_IT: Final = 1.3  # twice the connections must bring at least this much more

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)


@dataclass(slots=True, eq=False)
class Span:
    """Bytes [position, end) of the blob still to come over one connection; `end` shrinks when another takes a part."""

    position: int
    end: int

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
        """Bytes nobody has fetched yet."""
        return sum(span.left for span in (*self._waiting, *self._running))

    def take(self) -> Span | None:
        """A span nobody works on, else the far half of the longest running one, else None."""
        if self._waiting:
            span = self._waiting.pop(0)
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
        if span.left > 0:
            self._waiting.insert(0, span)


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
    """The Range of a request, "" for a whole blob."""
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
