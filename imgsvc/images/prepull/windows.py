"""Times of the week in which something is allowed: "22:00-06:00", "Mon-Fri 19:30-24:00", "Sun 00:00-24:00". Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from imgsvc.base.errors import InvalidArgument, printable

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES: Final = 24 * 60
_WEEK_MINUTES: Final = 7 * _DAY_MINUTES
_WINDOW = re.compile(r"(?:([A-Za-z]{3})(?:-([A-Za-z]{3}))? )?([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Windows:
    """Spans of the week as (start, length) in minutes since Monday 00:00 local time; none at all means always."""

    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Windows:
        """Raises: InvalidArgument."""
        return cls(tuple(span for text in texts for span in _spans(text)))

    def closes_in(self, now: datetime) -> timedelta | None:
        """How long it is still open; None when it is closed. Always open is a week."""
        minute = _minute(now)
        lefts = [length - (minute - start) % _WEEK_MINUTES for start, length in self.spans]
        longest = max((left for left in lefts if left > 0), default=0) if self.spans else _WEEK_MINUTES
        return timedelta(minutes=longest) - timedelta(seconds=now.second) if longest else None

    def opens_in(self, now: datetime) -> timedelta:
        """How long it is still closed; zero when it is open."""
        if self.closes_in(now) is not None:
            return timedelta()
        minute = _minute(now)
        return timedelta(minutes=min((start - minute) % _WEEK_MINUTES for start, _ in self.spans)) - timedelta(seconds=now.second)


def _spans(text: str) -> Sequence[tuple[int, int]]:
    match = _WINDOW.fullmatch(text.strip())
    if match is None:
        raise _bad(text)
    first, last = (match[1] or "Mon").lower(), (match[2] or match[1] or "Sun").lower()
    hours = [int(match[3]), int(match[5])]
    minutes = [int(match[4]), int(match[6])]
    start, end = (hours[0] * 60 + minutes[0], hours[1] * 60 + minutes[1])
    if first not in _DAYS or last not in _DAYS or max(minutes) > 59 or start >= _DAY_MINUTES or end > _DAY_MINUTES or start == end:
        raise _bad(text)
    length = (end - start) % _DAY_MINUTES or _DAY_MINUTES
    begin = _DAYS.index(first)
    return [((begin + day) % 7 * _DAY_MINUTES + start, length) for day in range((_DAYS.index(last) - begin) % 7 + 1)]


def _minute(now: datetime) -> int:
    return now.weekday() * _DAY_MINUTES + now.hour * 60 + now.minute


def _bad(text: str) -> InvalidArgument:
    return InvalidArgument(f'invalid window "{printable(text, 60)}"', hint='write "22:00-06:00" or "Mon-Fri 19:30-24:00"')
