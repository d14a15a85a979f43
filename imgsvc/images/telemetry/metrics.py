"""Counters, gauges and histograms in Prometheus' text format; a label never has more values than are known beforehand.

Values that come from outside (hosts, codes) go through Bounded, which calls what is too many "other". Everything belongs
to the event loop's thread.

Source: Prometheus exposition format 0.0.4.
"""

from __future__ import annotations

import bisect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from imgsvc.base.http1 import Request, Response

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_SERIES: Final = 200  # label combinations of one metric; beyond it, all is counted under "other"
SECONDS: Final = (0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
MIB_PER_SECOND: Final = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 4000.0)

Labels = tuple[str, ...]


class Metric(Protocol):
    """One name with its series."""

    def lines(self) -> Iterator[str]:
        """As text."""


@dataclass(slots=True)
class Counter:
    """Only ever grows. labels: names of its labels."""

    name: str
    text: str
    labels: Labels = ()
    _values: dict[Labels, float] = field(default_factory=dict)

    def add(self, *values: str, by: float = 1) -> None:
        """Count under these label values."""
        key = _bounded(values, self._values)
        self._values[key] = self._values.get(key, 0) + by

    def lines(self) -> Iterator[str]:
        """See Metric."""
        yield from _head(self.name, self.text, "counter")
        for values, value in (self._values or ({} if self.labels else {(): 0})).items():
            yield f"{self.name}{_shown(self.labels, values)} {_number(value)}"


@dataclass(frozen=True, slots=True)
class Gauge:
    """Read when the page is scraped. read: label values → value."""

    name: str
    text: str
    labels: Labels
    read: Callable[[], Mapping[Labels, float]]

    def lines(self) -> Iterator[str]:
        """See Metric."""
        yield from _head(self.name, self.text, "gauge")
        for values, value in self.read().items():
            yield f"{self.name}{_shown(self.labels, values)} {_number(value)}"


@dataclass(slots=True)
class Histogram:
    """How often a value was how large. buckets: upper bounds, ascending."""

    name: str
    text: str
    labels: Labels = ()
    buckets: Sequence[float] = SECONDS
    _values: dict[Labels, tuple[list[int], list[float]]] = field(default_factory=dict)

    def observe(self, value: float, *values: str) -> None:
        """Count a value."""
        counts, total = self._values.setdefault(_bounded(values, self._values), ([0] * (len(self.buckets) + 1), [0.0]))
        counts[bisect.bisect_left(self.buckets, value)] += 1
        total[0] += value

    def lines(self) -> Iterator[str]:
        """See Metric."""
        yield from _head(self.name, self.text, "histogram")
        for values, (counts, total) in self._values.items():
            seen = 0
            for bound, count in zip([*map("{:g}".format, self.buckets), "+Inf"], counts, strict=True):
                seen += count
                yield f"{self.name}_bucket{_shown((*self.labels, 'le'), (*values, bound))} {seen}"
            yield f"{self.name}_sum{_shown(self.labels, values)} {_number(total[0])}"
            yield f"{self.name}_count{_shown(self.labels, values)} {seen}"


class Bounded:
    """At most `limit` different values; whatever comes after them is "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value, or "other"."""
        if value not in self._known:
            if len(self._known) >= self._limit:
                return "other"
            self._known.add(value)
        return value


class Page:
    """All metrics of a daemon, served under /metrics."""

    def __init__(self, metrics: Iterable[Metric] = ()) -> None:
        self._metrics = list(metrics)
        self._prepare: list[Callable[[], Awaitable[None]]] = []

    def add(self, *metrics: Metric) -> None:
        """Show these, too."""
        self._metrics += metrics

    def before(self, prepare: Callable[[], Awaitable[None]]) -> None:
        """Have something run before the page is read, for gauges that cannot be had at once."""
        self._prepare.append(prepare)

    def text(self) -> str:
        """Everything."""
        return "".join(f"{line}\n" for metric in self._metrics for line in metric.lines())

    async def handle(self, request: Request) -> Response:
        """An http1.Handler."""
        if request.path not in ("/metrics", "/v1/metrics"):
            return Response(404, [("Content-Type", "text/plain")], b"metrics are at /metrics\n")
        for prepare in self._prepare:
            await prepare()
        return Response(200, [("Content-Type", CONTENT_TYPE)], self.text().encode())


def _bounded(values: Labels, known: Mapping[Labels, object]) -> Labels:
    return values if values in known or len(known) < MAX_SERIES else ("other",) * len(values)


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _number(value: float) -> str:
    """Every digit: of a counter that is shown rounded, a rate is nonsense."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _shown(labels: Labels, values: Labels) -> str:
    pairs = ",".join(f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
