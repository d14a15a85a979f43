"""Output of the CLI: tables, JSON, sizes. The live display of a pull is in progress.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

PHASES: Final = ("resolve", "verify", "unwrap", "download", "waited", "unpacked")


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
