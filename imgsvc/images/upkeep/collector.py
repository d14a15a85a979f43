"""Garbage collection: mark what is needed, sweep the rest. Knows nodes and edges, not their meaning.

    mark            pure: from the roots along references; remembers from where, so that `explain` can say why
    removal_order   pure: what refers goes before what it refers to
    sweep           removes in that order; a failure keeps what the failed thing needs, and nothing else
    evict           pure: which cached objects exceed a budget
    Collector       when to do all that: after deletions and expired leases, when space is low, on request

Collecting runs beside pulls. It lists what exists first and reads the roots second, so that it never judges a thing
that came later. What becomes needed afterwards is named in a lease before a caller relies on it, and each slice of the
sweep asks the leases again right before it removes (leases.LeaseManager.collecting, removal).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from imgsvc.base.concurrency import Threads, time_limit
from imgsvc.base.errors import ImgsvcError
from imgsvc.base.failpoints import afailpoint, failpoint
from imgsvc.base.fsutil import free_space
from imgsvc.images.leases import Lease, LeaseManager, Node

log = logging.getLogger(__name__)

SLICE: Final = 256  # things removed between two looks at the leases; bounds how long a new lease waits
PAUSE: Final = 0.005  # [s] between two slices, for everything else
SPACE_INTERVAL: Final = 30.0  # [s] between two looks at free space
PERIOD: Final = 3600.0  # [s] after which an idle node collects: what failed before, what has grown old

Edges = Mapping[Node, Sequence[Node]]


@dataclass(frozen=True, slots=True)
class Root:
    """Something that is needed by itself. why: for people, e.g. "image docker.io/library/nginx:latest"."""

    node: Node
    why: str
    references: Sequence[Node] = ()


@dataclass(frozen=True, slots=True)
class Cached:
    """A needed thing that can be had again: the blob of an unpacked layer. size [bytes]; used_at orders them."""

    node: Node
    size: int
    used_at: float


class Keeper(Protocol):
    """A source of roots: image records, containers."""

    def roots(self) -> Iterable[Root]:
        """What is needed now. Called on the event loop, where it must take its snapshot; iterated on a thread."""


class Collectable(Protocol):
    """One kind of removable object: blobs, snapshots, unfinished writes."""

    @property
    def kind(self) -> str:
        """Node.kind of all of them."""

    def walk(self) -> Iterable[tuple[Node, Sequence[Node]]]:
        """Each thing that may be collected, with what it needs. Blocking."""

    def remove(self, *nodes: Node) -> None:
        """Remove some, none of which needs another, in one commit. Absent is a success. Blocking.

        Raises: ImgsvcError, OSError when one could not be removed; then any of the others may still be there.
        """


class Cache(Protocol):
    """Which of the needed objects are kept for speed only."""

    def cached(self) -> Iterable[Cached]:
        """All of them. As Keeper.roots."""


@dataclass(slots=True)
class SweepReport:
    """What a sweep did. kept: garbage that stays because a lease, or something that failed, needs it."""

    removed: list[Node] = field(default_factory=list)
    failed: dict[Node, str] = field(default_factory=dict)
    kept: set[Node] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """One collection. live: objects in use; evicted: cached objects among the removed. Durations [s]."""

    reason: str
    live: int
    evicted: int
    sweep: SweepReport
    mark_s: float
    sweep_s: float

    def to_json(self) -> dict[str, Any]:
        """For `imgsvc gc --json`."""
        return {
            "reason": self.reason,
            "live": self.live,
            "removed": [str(node) for node in self.sweep.removed],
            "failed": {str(node): why for node, why in self.sweep.failed.items()},
            "kept": sorted(str(node) for node in self.sweep.kept),
            "evicted": self.evicted,
            "mark_seconds": round(self.mark_s, 3),
            "sweep_seconds": round(self.sweep_s, 3),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why one thing stays or goes. why: the chain from its root, root first; empty for garbage."""

    node: Node
    stays: bool
    why: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `imgsvc gc --explain --json`."""
        return {"kind": self.node.kind, "id": self.node.id, "stays": self.stays, "why": list(self.why)}


def mark(roots: Iterable[Root], edges: Edges) -> dict[Node, Root | Node]:
    """Everything needed, each with the root or the node that needs it (the first one met)."""
    reached: dict[Node, Root | Node] = {}
    waiting: list[Node] = []
    for root in roots:
        reached.setdefault(root.node, root)
        for node in (*root.references, *edges.get(root.node, ())):
            if node not in reached:
                reached[node] = root
                waiting.append(node)
    while waiting:
        node = waiting.pop()
        for needed in edges.get(node, ()):
            if needed not in reached:
                reached[needed] = node
                waiting.append(needed)
    return reached


def why(node: Node, reached: Mapping[Node, Root | Node]) -> tuple[str, ...]:
    """The chain that keeps `node`, root first; empty when nothing does."""
    chain: list[str] = []
    source = reached.get(node)
    while source is not None:
        if isinstance(source, Root):
            chain.append(source.why)
            break
        chain.append(str(source))
        source = reached[source]
    return tuple(reversed(chain))


def removal_order(garbage: Collection[Node], edges: Edges) -> list[Node]:
    """What refers before what it refers to; in a cycle, somewhere. Nodes outside of `garbage` do not matter."""
    inside = frozenset(garbage)
    referrers = dict.fromkeys(garbage, 0)
    for node in garbage:
        for needed in edges.get(node, ()):
            if needed in inside:
                referrers[needed] += 1
    order = [node for node, count in referrers.items() if count == 0]
    for node in order:  # grows meanwhile: level by level, so that many in a row can be removed together
        for needed in edges.get(node, ()):
            if needed in inside:
                referrers[needed] -= 1
                if referrers[needed] == 0:
                    order.append(needed)
    if len(order) < len(inside):
        done = frozenset(order)
        order += [node for node in inside if node not in done]
    return order


def sweep(nodes: Iterable[Node], removable: Collection[Node], edges: Edges, remove: Callable[..., None], report: SweepReport) -> None:
    """Remove `nodes`, given in removal order, and note in `report` what became of them. Blocking.

    What is not `removable`, or fails, keeps what it needs; everything else goes. Never raises for a single thing.
    """
    for group in _together(nodes, edges):
        wanted = [node for node in group if node not in report.kept and node in removable]
        for node in set(group).difference(wanted):
            report.kept.add(node)
            report.kept.update(edges.get(node, ()))
        if wanted and not _removed(wanted, remove, report):
            for node in wanted if len(wanted) > 1 else ():
                _removed([node], remove, report)
            for node in report.failed.keys() & wanted:
                report.kept.update(edges.get(node, ()))


def _removed(nodes: Sequence[Node], remove: Callable[..., None], report: SweepReport) -> bool:
    """Whether all are gone. A failure is noted of one alone: of several, each may be tried again."""
    try:
        failpoint("gc.remove")
        remove(*nodes)
    except (ImgsvcError, OSError) as error:
        if len(nodes) == 1:
            report.failed[nodes[0]] = str(error)
        return False
    report.removed += nodes
    failpoint("gc.removed")
    return True


def _together(nodes: Iterable[Node], edges: Edges) -> Iterator[list[Node]]:
    """Runs of objects of one kind, none of which needs another, so that one failure does not affect the rest of the run."""
    group: list[Node] = []
    needed: set[Node] = set()
    for node in nodes:
        if group and (node in needed or node.kind != group[0].kind):
            yield group
            group, needed = [], set()
        group.append(node)
        needed.update(edges.get(node, ()))
    if group:
        yield group


def evict(cached: Iterable[Cached], budget: int) -> list[Node]:
    """Which cached objects to remove so that the rest fits into `budget` [bytes], least recently used first."""
    entries = sorted(cached, key=lambda entry: entry.used_at, reverse=True)
    gone: list[Node] = []
    used = 0
    for entry in entries:
        used += entry.size
        if used > budget:
            gone.append(entry.node)
    return gone


@dataclass(frozen=True, slots=True)
class Policy:
    """When to collect, and how much cache to keep. Delays [s], sizes [bytes].

    schedule_delay: from a trigger to the collection, so that many deletions share one.  cache_budget: -1 keeps all.
    min_free: below that much free space everything cached goes.
    """

    startup_delay: float = 10.0
    schedule_delay: float = 1.0
    cache_budget: int = -1
    min_free: int = 0


class Collector:
    """Decides when to collect, and does it. On the event loop; heavy work goes to `threads`."""

    def __init__(
        self,
        *,
        keepers: Sequence[Keeper],
        collectables: Sequence[Collectable],
        cache: Cache,
        leases: LeaseManager,
        threads: Threads,
        root: Path,
        policy: Policy,
        collected: Callable[[CollectionReport | None], None] = lambda report: None,
    ) -> None:
        """root: directory on the file system whose free space counts. collected: called after every collection, with None when it failed."""
        self._collected = collected
        self._keepers = keepers
        self._collectables = {collectable.kind: collectable for collectable in collectables}
        self._cache = cache
        self._leases = leases
        self._threads = threads
        self._root = root
        self.policy = policy  # may change at any time
        self._reasons: set[str] = set()
        self._triggered = asyncio.Event()
        self._one = asyncio.Lock()

    def trigger(self, reason: str) -> None:
        """Collect soon. Cheap, any number of times."""
        self._reasons.add(reason)
        self._triggered.set()

    async def run(self) -> None:
        """Collect when triggered, when space is low, and every PERIOD. Runs until cancelled; failures are logged."""
        await asyncio.sleep(self.policy.startup_delay)
        self.trigger("start")
        next_at = 0.0
        hopeless = False  # low on space, and the last collection found nothing to give
        while True:
            with contextlib.suppress(TimeoutError):
                async with time_limit(SPACE_INTERVAL):
                    await self._triggered.wait()
            low = free_space(self._root) < self.policy.min_free
            hopeless &= low
            if time.monotonic() >= next_at:
                self.trigger("period")
            if low and not hopeless:
                self.trigger("low space")
            if not self._triggered.is_set():
                continue
            await asyncio.sleep(self.policy.schedule_delay)
            try:
                report = await self.collect("")
                hopeless = low and not report.sweep.removed
            except (ImgsvcError, OSError) as error:
                log.error("collecting garbage failed: %s", error)
            next_at = time.monotonic() + PERIOD

    async def collect(self, reason: str = "request") -> CollectionReport:
        """Collect now; waits for a collection that runs. Answers all triggers so far. Raises: ImgsvcError when it cannot even mark."""
        async with self._one:
            reasons = sorted({reason, *self._reasons} - {""})
            self._reasons.clear()
            self._triggered.clear()
            try:
                report = await self._collect(", ".join(reasons))
            except (ImgsvcError, OSError):
                self._collected(None)
                raise
        self._collected(report)
        level = logging.WARNING if report.sweep.failed else logging.INFO
        log.log(
            level,
            "garbage collected (%s): %d removed, %d of them cached, %d failed, %d live; marked in %.3f s, swept in %.3f s",
            report.reason, len(report.sweep.removed), report.evicted, len(report.sweep.failed), report.live, report.mark_s, report.sweep_s,
        )  # fmt: skip
        for node, failure in report.sweep.failed.items():
            log.warning("%s could not be removed, the next collection tries again: %s", node, failure)
        return report

    async def explain(self) -> list[Verdict]:
        """Why each thing stays or goes, if a collection ran now. Changes nothing."""
        async with self._one:
            with self._leases.collecting():
                edges, reached = await self._mark()
            return await self._threads.run(lambda: [Verdict(node, node in reached, why(node, reached)) for node in sorted(edges)])

    async def _collect(self, reason: str) -> CollectionReport:
        began = time.monotonic()
        with self._leases.collecting():
            edges, reached = await self._mark()
            garbage = [node for node in edges if node not in reached]
            evicted = await self._threads.run(self._evicted, self._cache.cached())
            order = await self._threads.run(removal_order, garbage, edges)
            marked = time.monotonic()
            await afailpoint("gc.marked")
            report = await self._sweep(order + evicted, edges)
        gone = len(set(evicted).intersection(report.removed))
        return CollectionReport(reason, len(reached), gone, report, marked - began, time.monotonic() - marked)

    async def _mark(self) -> tuple[Edges, dict[Node, Root | Node]]:
        """What is there, with its references; and what of it is needed."""
        await afailpoint("gc.mark")
        edges = await self._threads.run(lambda: {node: needs for kind in self._collectables.values() for node, needs in kind.walk()})
        sources = [keeper.roots() for keeper in self._keepers]
        sources.append(_lease_roots(self._leases.leases()))
        return edges, await self._threads.run(lambda: mark((root for source in sources for root in source), edges))

    async def _sweep(self, order: Sequence[Node], edges: Edges) -> SweepReport:
        report = SweepReport()
        for start in range(0, len(order), SLICE):
            nodes = order[start : start + SLICE]
            async with self._leases.removal(nodes) as free:
                await self._threads.run(sweep, nodes, frozenset(free), edges, self._remove, report)
            await afailpoint("gc.slice")
            await asyncio.sleep(PAUSE)
        return report

    def _remove(self, *nodes: Node) -> None:
        self._collectables[nodes[0].kind].remove(*nodes)

    def _evicted(self, cached: Iterable[Cached]) -> list[Node]:
        failpoint("gc.evict")
        budget = 0 if free_space(self._root) < self.policy.min_free else self.policy.cache_budget
        return [] if budget < 0 else evict(cached, budget)


def _lease_roots(leases: Iterable[Lease]) -> Iterable[Root]:
    for lease in leases:
        yield Root(Node("lease", lease.id), f"lease {lease.id} ({lease.purpose or 'no purpose given'})", tuple(lease.resources))
