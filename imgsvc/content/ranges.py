"""Which bytes of a file are there: a set of disjoint, sorted, half-open ranges. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """Ranges [start, end) that were added, merged where they touch. Offsets in bytes. Not thread-safe."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Include [start, end)."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def clip(self, size: int) -> None:
        """Forget everything from `size` on."""
        keep = bisect_left(self._starts, size)
        del self._starts[keep:], self._ends[keep:]
        if self._ends:
            self._ends[-1] = min(self._ends[-1], size)

    @property
    def prefix(self) -> int:
        """Bytes present from offset 0 without a gap."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    @property
    def end(self) -> int:
        """Behind the last byte that is present."""
        return self._ends[-1] if self._ends else 0

    def missing(self, total: int) -> list[tuple[int, int]]:
        """Gaps in [0, total) as (offset, length), in order."""
        gaps = []
        position = 0
        for start, end in self:
            if start >= total:
                break
            if start > position:
                gaps.append((position, start - position))
            position = end
        if position < total:
            gaps.append((position, total - position))
        return gaps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))
