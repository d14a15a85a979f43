"""How the CLI shows things: tables, JSON, sizes, and the live display of a pull."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TextIO

PHASES: Final = ("resolve", "verify", "unwrap", "download", "waited", "unpacked")
_BAR_WIDTH: Final = 14  # [characters]; two of them, sizes and state fit into 80 columns
_REFRESH_S: Final = 0.1
_WINDOW_S: Final = 5.0  # of which the speed is shown
_FINISHED: Final = ("done", "exists")


def print_json(value: Any) -> None:
    """Stable keys, readable."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Left-aligned columns under a header."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def human_size(count: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclass(slots=True)
class _Layer:
    size: int
    downloaded: int
    unpacked: int
    state: str


class Speed:
    """Bytes per second over the last seconds, so that a stall shows and bytes from an earlier try do not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, total: int) -> float:
        """The speed, now that `total` bytes are here; 0 before there are two looks to compare."""
        now = self._clock()
        self._seen.append((now, total))
        while now - self._seen[0][0] > _WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        then, before = self._seen[0]
        return max(0.0, (total - before) / (now - then)) if now > then else 0.0


class PullDisplay:
    """Progress of a pull or push: bars on a terminal, one plain line per change of state elsewhere."""

    def __init__(self, reference: str, stream: TextIO) -> None:
        self._reference = reference
        self._stream = stream
        self._live = stream.isatty()
        self._layers: dict[str, _Layer] = {}
        self._began = time.monotonic()
        self._speed = Speed()
        self._drawn = 0
        self._last = 0.0

    def resolved(self, digest: str, endpoint: str) -> None:
        """The reference has a digest."""
        print(f"{self._reference}: {digest} from {endpoint}", file=self._stream)

    def layer(self, digest: str, size: int, downloaded: int, state: str, unpacked: int = 0) -> None:
        """One layer moved on. Sizes are of the layer as it is stored [bytes]."""
        old = self._layers.get(digest)
        self._layers[digest] = _Layer(size, downloaded, unpacked, state)
        if self._live:
            if time.monotonic() - self._last >= _REFRESH_S:
                self._draw()
        elif old is None or old.state != state:
            print(f"{digest[7:19]}: {state} ({human_size(size)})", file=self._stream, flush=True)

    def end(self) -> None:
        """Draw the last state."""
        if self._live:
            self._draw()

    def _draw(self) -> None:
        self._last = time.monotonic()
        window = shutil.get_terminal_size()
        lines = [*self._shown(window.lines - 2), self._total()]
        # Up, and everything below away: there may be fewer lines than last time.
        self._stream.write(f"\x1b[{self._drawn}A\x1b[J" if self._drawn else "")
        self._stream.writelines(f"{line[: window.columns - 1]}\n" for line in lines)
        self._stream.flush()
        self._drawn = len(lines)

    def _shown(self, rows: int) -> list[str]:
        """Layers that fit on the screen, unfinished ones first to stay: what has scrolled away cannot be drawn again."""
        shown = list(self._layers.items())
        for item in list(shown):
            if len(shown) > rows and item[1].state in _FINISHED:
                shown.remove(item)
        return [_line(digest, layer) for digest, layer in shown[: max(rows, 1)]]

    def _total(self) -> str:
        moving = [layer for layer in self._layers.values() if layer.state != "exists"]
        have, total = sum(layer.downloaded for layer in moving), sum(layer.size for layer in moving)
        elapsed, speed = time.monotonic() - self._began, self._speed.note(have)
        left = f", {(total - have) / speed:.0f} s left" if speed and have < total else ""
        return f"total  {human_size(have)} of {human_size(total)}, {human_size(speed)}/s, {elapsed:.1f} s{left}"


def _line(digest: str, layer: _Layer) -> str:
    sizes = f"{human_size(layer.downloaded):>10} / {human_size(layer.size):<10}"
    return f"{digest[7:19]} {_bar(layer.downloaded, layer.size)} {sizes} {_bar(layer.unpacked, layer.size)} {layer.state}"


def _bar(done: int, size: int) -> str:
    filled = min(_BAR_WIDTH, round(done / size * _BAR_WIDTH)) if size else _BAR_WIDTH
    return "█" * filled + "·" * (_BAR_WIDTH - filled)


def print_timings(timings: Mapping[str, float]) -> None:
    """Seconds by phase, in the order in which a pull goes through them, whatever ran side by side."""
    known = [phase for phase in PHASES if phase in timings]
    others = sorted(timings.keys() - set(PHASES) - {"total"})
    print_table(("PHASE", "SECONDS"), [(phase, f"{timings[phase]:.3f}") for phase in (*known, *others, "total") if phase in timings])


def plural(count: int, noun: str) -> str:
    """3, "image" → "3 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"imgsvc: {text}", file=sys.stderr)
