"""Garbage collection: the pure parts against obvious models, the collector with real threads and fakes of the rest."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import FailedPrecondition, NotFound
from imgsvc.images.leases import Node
from imgsvc.images.upkeep.collector import SLICE, Cached, Collector, Policy, Root, SweepReport, evict, mark, removal_order, sweep, why
from tests.fakes.clock import FakeClock
from tests.fakes.leases import MemoryLeases
from tests.support.waiting import until

GRAPH = st.dictionaries(st.integers(0, 12), st.lists(st.integers(0, 12), max_size=4), max_size=13)


def n(name: object) -> Node:
    return Node("thing", str(name))


def edges_of(graph: dict[int, list[int]]) -> dict[Node, list[Node]]:
    return {n(a): [n(b) for b in needs] for a, needs in graph.items()}


@given(GRAPH, st.lists(st.integers(0, 12), max_size=3))
def test_mark_finds_exactly_what_is_reachable(graph: dict[int, list[int]], roots: list[int]) -> None:
    reached = mark([Root(Node("root", str(r)), f"root {r}", [n(r)]) for r in roots], edges_of(graph))
    model, todo = set[int](), list(roots)
    while todo:
        at = todo.pop()
        if at not in model:
            model.add(at)
            todo += graph.get(at, [])
    assert {node for node in reached if node.kind == "thing"} == {n(a) for a in model}
    for a in model:
        chain = why(n(a), reached)
        assert chain[0].startswith("root ")
        steps = [int(step.split()[1]) for step in chain[1:]] + [a]
        assert all(b in graph[a] for a, b in itertools.pairwise(steps)), "each step of the reason is an edge"


def test_what_nothing_needs_has_no_reason() -> None:
    assert why(n(1), mark([], {n(1): []})) == ()


@given(GRAPH)
def test_removal_order_has_everything_once_and_referrers_first(graph: dict[int, list[int]]) -> None:
    acyclic = edges_of({a: [b for b in needs if b > a] for a, needs in graph.items()})
    order = removal_order(list(acyclic), acyclic)
    position = {node: at for at, node in enumerate(order)}
    assert sorted(order) == sorted(acyclic)
    assert all(position[a] < position[b] for a, needs in acyclic.items() for b in needs if b in position)


@given(GRAPH)
def test_removal_order_survives_cycles(graph: dict[int, list[int]]) -> None:
    edges = edges_of(graph)
    assert sorted(removal_order(list(edges), edges)) == sorted(edges)


def test_one_failure_never_stops_the_rest_and_keeps_what_it_needs() -> None:
    """containerd#3923: one snapshot that cannot be removed. Its parents must stay, everything else goes."""
    edges = {n("child"): [n("parent")], n("parent"): [n("base")], n("base"): [], n("other"): [], n("leased"): [n("kept")], n("kept"): []}
    gone: list[Node] = []

    def remove(*nodes: Node) -> None:
        if n("child") in nodes:
            raise FailedPrecondition("busy")
        gone.extend(nodes)

    report = SweepReport()
    order = removal_order(list(edges), edges)
    sweep(order, set(edges) - {n("leased")}, edges, remove, report)
    assert gone == report.removed == [n("other")]
    assert report.failed == {n("child"): "busy"}
    assert report.kept == {n("parent"), n("base"), n("leased"), n("kept")}


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1000)), max_size=20), st.integers(0, 500))
def test_evict_keeps_the_newest_that_fit(entries: list[tuple[int, int]], budget: int) -> None:
    cached = [Cached(n(at), size, used) for at, (size, used) in enumerate(entries)]
    gone = set(evict(cached, budget))
    kept = [entry for entry in cached if entry.node not in gone]
    assert sum(entry.size for entry in kept) <= budget
    if gone and kept:
        assert min(entry.used_at for entry in kept) >= max(
            entry.used_at for entry in cached if entry.node in gone and entry.size > 0
        ) or any(entry.size == 0 for entry in kept)


class World:
    """Things with references, some of them needed: gc's Keeper, Collectable and Cache in one."""

    kind = "thing"

    def __init__(self, edges: dict[Node, list[Node]], needed: Sequence[Node] = ()) -> None:
        self.edges = edges
        self.needed = list(needed)
        self.broken: set[Node] = set()
        self.on_remove: Callable[[Node], None] = lambda node: None
        self.cache: list[Cached] = []

    def roots(self) -> Iterable[Root]:
        return [Root(Node("image", "i"), "image i", list(self.needed))]

    def walk(self) -> Iterable[tuple[Node, Sequence[Node]]]:
        return list(self.edges.items())

    def remove(self, *nodes: Node) -> None:
        for node in nodes:
            self.on_remove(node)
            if node in self.broken:
                raise OSError(5, "Input/output error")
            self.edges.pop(node, None)

    def cached(self) -> Iterable[Cached]:
        return self.cache


def run(world: World, tmp_path: Path, check: Callable[[Collector, MemoryLeases], Awaitable[None]], policy: Policy | None = None) -> None:
    async def life() -> None:
        leases = MemoryLeases(FakeClock())
        threads = Threads(2, "gc")
        collector = Collector(
            keepers=[world],
            collectables=[world],
            cache=world,
            leases=leases,
            threads=threads,
            root=tmp_path,
            policy=policy or Policy(startup_delay=0, schedule_delay=0.01),
        )
        try:
            async with asyncio.timeout(20):
                await check(collector, leases)
        finally:
            threads.close()

    asyncio.run(life())


def test_a_collection_removes_garbage_and_reports(tmp_path: Path) -> None:
    world = World({n(1): [n(2)], n(2): [], n(3): [n(4)], n(4): [n(2)]}, [n(1)])

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        report = await collector.collect("test")
        assert report.sweep.removed == [n(3), n(4)]
        assert set(world.edges) == {n(1), n(2)}
        assert report.to_json()["removed"] == ["thing 3", "thing 4"]
        assert (await collector.collect()).sweep.removed == []

    run(world, tmp_path, check)


def test_explain_says_why_and_changes_nothing(tmp_path: Path) -> None:
    world = World({n(1): [n(2)], n(2): [], n(3): [], n(4): []}, [n(1)])

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        await leases.hold([n(4)], lease_id="L", purpose="pull x")
        verdicts = {verdict.node: verdict for verdict in await collector.explain()}
        assert verdicts[n(2)].why == ("image i", "thing 1")
        assert verdicts[n(4)].why == ("lease L (pull x)",)
        assert not verdicts[n(3)].stays
        assert verdicts[n(3)].to_json() == {"kind": "thing", "id": "3", "stays": False, "why": []}
        assert len(world.edges) == 4

    run(world, tmp_path, check)


def test_a_failed_removal_is_tried_again_by_the_next_collection(tmp_path: Path) -> None:
    world = World({n(1): [], n(2): []})
    world.broken.add(n(1))

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        report = await collector.collect()
        assert list(report.sweep.failed) == [n(1)]
        assert report.sweep.removed == [n(2)]
        world.broken.clear()
        assert (await collector.collect()).sweep.removed == [n(1)]

    run(world, tmp_path, check)


def test_c_d7_what_a_pull_leases_while_the_sweep_runs_stays(tmp_path: Path) -> None:
    """Marked as garbage, then named by a pull that even ends before its slice comes: it must still be there."""
    things = [n(f"{at:04}") for at in range(SLICE * 3)]
    world = World({node: [] for node in things})

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        loop = asyncio.get_running_loop()
        wanted: list[Node] = []

        def on_remove(node: Node) -> None:
            if not wanted:
                wanted.extend(list(world.edges)[:SLICE][:1])
                asyncio.run_coroutine_threadsafe(pull(), loop)

        async def pull() -> None:
            lease = await leases.hold(wanted)
            world.needed += wanted  # the image record
            await leases.release(lease)

        world.on_remove = on_remove
        await collector.collect()
        assert set(world.edges) <= set(wanted), "only what the pull named may be left"

    run(world, tmp_path, check)


def test_c_d7_a_lease_sees_a_thing_whole_or_not_at_all(tmp_path: Path) -> None:
    """Whoever got a lease and then finds the thing there finds it there forever."""
    things = [n(f"{at:04}") for at in range(SLICE * 4)]
    world = World({node: [] for node in things})

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        seen: list[Node] = []

        async def pulls() -> None:
            for node in things[::7]:
                lease = await leases.hold([node])
                if node in world.edges:
                    seen.append(node)
                    world.needed.append(node)
                await leases.release(lease)
                await asyncio.sleep(0.001)

        await asyncio.gather(collector.collect(), pulls())
        assert all(node in world.edges for node in seen)
        await collector.collect()
        assert set(world.edges) == set(seen)

    run(world, tmp_path, check)


def test_triggers_are_gathered_and_the_loop_outlives_failures(tmp_path: Path) -> None:
    world = World({n(1): []})
    marks = 0
    walk = world.walk

    def failing_walk() -> Iterable[tuple[Node, Sequence[Node]]]:
        nonlocal marks
        marks += 1
        if marks == 1:
            raise NotFound("the first look fails")
        return walk()

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        world.walk = failing_walk  # type: ignore[method-assign]
        task = asyncio.create_task(collector.run())
        await until(lambda: marks == 1)
        for _ in range(10):
            collector.trigger("image removed")
        await until(lambda: not world.edges)
        await asyncio.sleep(0.1)
        assert marks == 2
        task.cancel()

    run(world, tmp_path, check)


@pytest.mark.parametrize("policy, left", [(Policy(cache_budget=-1), 3), (Policy(cache_budget=250), 2), (Policy(cache_budget=0), 0)])
def test_the_cache_keeps_to_its_budget(tmp_path: Path, policy: Policy, left: int) -> None:
    things = [n(at) for at in range(3)]
    world = World({node: [] for node in things}, things)
    world.cache = [Cached(node, 100, used_at=at) for at, node in enumerate(things)]

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        report = await collector.collect()
        assert sorted(world.edges) == things[3 - left :]
        assert report.evicted == 3 - left

    run(world, tmp_path, check, policy)


def test_low_space_gives_up_the_whole_cache_by_itself_except_what_is_leased(tmp_path: Path) -> None:
    things = [n(at) for at in range(3)]
    world = World({node: [] for node in things}, things)
    world.cache = [Cached(node, 100, used_at=at) for at, node in enumerate(things)]

    async def check(collector: Collector, leases: MemoryLeases) -> None:
        await leases.hold([n(1)])
        task = asyncio.create_task(collector.run())
        await until(lambda: len(world.edges) == 1)
        assert list(world.edges) == [n(1)]
        task.cancel()

    run(world, tmp_path, check, Policy(startup_delay=0, schedule_delay=0, cache_budget=-1, min_free=1 << 62))
