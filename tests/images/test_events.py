"""Telling events to listeners."""

from __future__ import annotations

import asyncio

from imgsvc.images.telemetry.events import MAX_WAITING, EventBus


def test_listeners_hear_what_happens_while_they_listen() -> None:
    async def run() -> list[str]:
        bus, heard = EventBus(), []
        bus.publish("before", "x")

        async def listen() -> None:
            heard.extend([f"{event.kind} {event.subject} {event.details}" async for event in bus.listen()])

        task = asyncio.ensure_future(listen())
        await asyncio.sleep(0)
        bus.publish("a", "x", n=1)
        bus.publish("b", "y")
        bus.close()
        await task
        bus.publish("after", "x")
        return heard

    assert asyncio.run(run()) == ["a x {'n': 1}", "b y {}"]


def test_a_slow_listener_is_told_what_it_lost_and_costs_bounded_memory() -> None:
    async def run() -> tuple[str, int, str]:
        bus = EventBus()
        listener = bus.listen()
        first = asyncio.ensure_future(anext(listener))
        await asyncio.sleep(0)
        for number in range(MAX_WAITING + 7):
            bus.publish("n", str(number))
        lost = await first
        oldest = await anext(listener)
        return lost.kind, lost.details["count"], oldest.subject

    assert asyncio.run(run()) == ("lost", 7, "7")
