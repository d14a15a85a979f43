"""Turns between images."""

from __future__ import annotations

import asyncio

from imgsvc.registry.slots import FairSlots
from tests.registry.support import run


async def take(slots: FairSlots, group: str, order: list[str], hold: asyncio.Event) -> None:
    async with slots.slot("registry", group):
        order.append(group)
        await asyncio.sleep(0.001)
        await hold.wait()


def test_groups_are_served_in_turn_within_both_limits() -> None:
    async def main() -> None:
        slots, order = FairSlots(per_node=1, per_image=5), list[str]()
        gates = [asyncio.Event() for _ in range(6)]
        groups = ["a", "a", "a", "a", "b", "c"]
        tasks = []
        for group, gate in zip(groups, gates, strict=True):
            gate.set()
            tasks.append(asyncio.create_task(take(slots, group, order, gate)))
        await asyncio.gather(*tasks)
        assert order == ["a", "a", "b", "c", "a", "a"]

    run(main())


def test_a_group_keeps_to_its_share() -> None:
    async def main() -> None:
        slots, order, gate = FairSlots(per_node=4, per_image=2), list[str](), asyncio.Event()
        tasks = [asyncio.create_task(take(slots, group, order, gate)) for group in "aaaab"]
        for _ in range(5):
            await asyncio.sleep(0)
        assert sorted(order) == ["a", "a", "b"]
        gate.set()
        await asyncio.gather(*tasks)
        assert len(order) == 5

    run(main())


def test_who_is_cancelled_while_waiting_takes_no_slot_along() -> None:
    async def main() -> None:
        slots, order, gate = FairSlots(per_node=1, per_image=1), list[str](), asyncio.Event()
        first = asyncio.create_task(take(slots, "a", order, gate))
        waiting = [asyncio.create_task(take(slots, group, order, gate)) for group in "ab"]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        gate.set()
        await first
        await asyncio.wait_for(take(slots, "c", order, gate), 1)
        assert order == ["a", "c"]

    run(main())


def test_who_is_cancelled_the_moment_the_slot_comes_gives_it_on() -> None:
    async def main() -> None:
        slots, order, gate = FairSlots(per_node=1, per_image=1), list[str](), asyncio.Event()
        first = asyncio.create_task(take(slots, "a", order, gate))
        second = asyncio.create_task(take(slots, "b", order, gate))
        third = asyncio.create_task(take(slots, "c", order, gate))
        await asyncio.sleep(0)
        gate.set()
        await first  # its slot is handed to the second, which has not run since
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.wait_for(third, 1)
        assert order[-1] == "c"

    run(main())
