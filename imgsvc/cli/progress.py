"""The live display of a pull or push: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

from imgsvc.cli.output import human_size

_BAR_WIDTH: Final = 14  # [characters]; two of them, sizes and state fit into 80 columns
_FULL_WIDTH: Final = 78  # [characters] of a line with sizes
_NARROW_REST: Final = 26  # [characters] of a line without them, beside its bars
_REFRESH_S: Final = 0.1
_WINDOW_S: Final = 5.0  # of which the speed is shown
_FINISHED: Final = ("done", "exists")
_WAITING: Final = ("waiting",)


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
        if state in _WAITING:
            return  # those that are to come are all told of before anything happens; drawn one by one, the total would be wrong
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
        shown = _shown(self._layers, max(window.lines - 2, 1))
        lines = [*(_line(digest, layer, window.columns - 1) for digest, layer in shown), self._total()]
        # Up, and everything below away: there may be fewer lines than last time.
        self._stream.write(f"\x1b[{self._drawn}A\x1b[J" if self._drawn else "")
        self._stream.writelines(f"{line[: window.columns - 1]}\n" for line in lines)
        self._stream.flush()
        self._drawn = len(lines)

    def _total(self) -> str:
        moving = [layer for layer in self._layers.values() if layer.state != "exists"]
        have, total = sum(layer.downloaded for layer in moving), sum(layer.size for layer in moving)
        elapsed, speed = time.monotonic() - self._began, self._speed.note(have)
        left = f", {(total - have) / speed:.0f} s left" if speed and have < total else ""
        return f"total  {human_size(have)} of {human_size(total)}, {human_size(speed)}/s, {elapsed:.1f} s{left}"


def _shown(layers: Mapping[str, _Layer], rows: int) -> Sequence[tuple[str, _Layer]]:
    """Layers that fit on the screen: what has scrolled away cannot be drawn again. Finished ones go first, then those that wait."""
    shown = list(layers.items())
    for states, order in ((_FINISHED, shown.copy()), (_WAITING, shown[::-1])):
        for item in order:
            if len(shown) > rows and item[1].state in states:
                shown.remove(item)
    return shown[:rows]


def _line(digest: str, layer: _Layer, columns: int) -> str:
    """One layer: two bars, sizes between them where there is room."""
    sizes = f"{human_size(layer.downloaded):>10} / {human_size(layer.size):<10} " if columns >= _FULL_WIDTH else ""
    width = _BAR_WIDTH if sizes else max(1, min(_BAR_WIDTH, (columns - _NARROW_REST) // 2))
    return f"{digest[7:19]} {_bar(layer.downloaded, layer.size, width)} {sizes}{_bar(layer.unpacked, layer.size, width)} {layer.state}"


def _bar(done: int, size: int, width: int) -> str:
    filled = min(width, round(done / size * width)) if size else width
    return "█" * filled + "·" * (width - filled)
