"""How the CLI shows things: tables, JSON, sizes, and the live display of a pull."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TextIO

_BAR_WIDTH: Final = 24  # [characters]
_REFRESH_S: Final = 0.1


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
    state: str
    changed: float


class PullDisplay:
    """Progress of one pull: bars on a terminal, one plain line per change of state elsewhere."""

    def __init__(self, reference: str, stream: TextIO) -> None:
        self._reference = reference
        self._stream = stream
        self._live = stream.isatty()
        self._layers: dict[str, _Layer] = {}
        self._began = time.monotonic()
        self._drawn = 0
        self._last = 0.0

    def resolved(self, digest: str, endpoint: str) -> None:
        """The reference has a digest."""
        print(f"{self._reference}: {digest} from {endpoint}", file=self._stream)

    def layer(self, digest: str, size: int, downloaded: int, state: str) -> None:
        """One layer moved on."""
        old = self._layers.get(digest)
        self._layers[digest] = _Layer(size, downloaded, state, time.monotonic())
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
        width = shutil.get_terminal_size().columns
        lines = [self._line(digest, layer) for digest, layer in self._layers.items()] + [self._total()]
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A")
        self._stream.writelines(f"\x1b[2K{line[: width - 1]}\n" for line in lines)
        self._stream.flush()
        self._drawn = len(lines)

    def _line(self, digest: str, layer: _Layer) -> str:
        share = layer.downloaded / layer.size if layer.size else 1.0
        done = round(share * _BAR_WIDTH)
        bar = "█" * done + "·" * (_BAR_WIDTH - done)
        return f"{digest[7:19]}  {bar}  {human_size(layer.downloaded):>10} / {human_size(layer.size):<10}  {layer.state}"

    def _total(self) -> str:
        moving = [layer for layer in self._layers.values() if layer.state != "exists"]
        have, total = sum(layer.downloaded for layer in moving), sum(layer.size for layer in moving)
        elapsed = time.monotonic() - self._began
        speed = have / elapsed if elapsed > 0 else 0.0
        left = f", {(total - have) / speed:.0f} s left" if speed and have < total else ""
        return f"total  {human_size(have)} of {human_size(total)}, {human_size(speed)}/s, {elapsed:.1f} s{left}"


def plural(count: int, noun: str) -> str:
    """3, "image" → "3 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"imgsvc: {text}", file=sys.stderr)
