from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imgsvc
from imgsvc.base.concurrency import (
    CancelToken,
    Coalesced,
    KeyedLock,
    SingleFlight,
    Slots,
    Threads,
    Undo,
    _TimeLimit,
    all_of,
    both,
    in_thread,
    time_limit,
)
from imgsvc.base.errors import Cancelled, NotFound
from tests.support.waiting import until


def test_a_cancel_token_stops_work_on_another_thread() -> None:
    token = CancelToken()
    token.check()
    threading.Thread(target=token.cancel).start()

    def work() -> None:
        for _ in range(1000):
            token.check()
            time.sleep(0.01)

    with pytest.raises(Cancelled):
        work()


def test_keyed_lock_excludes_per_key_and_forgets() -> None:
    async def main() -> None:
        lock = KeyedLock()
        inside: list[str] = []

        async def work(key: str) -> None:
            async with lock.hold(key):
                assert key not in inside
                inside.append(key)
                await asyncio.sleep(0)
                inside.remove(key)

        async with lock.hold("a"):
            waiting = asyncio.ensure_future(work("a"))
            await work("b")
            waiting_too = asyncio.ensure_future(work("a"))
            await asyncio.sleep(0)
            waiting_too.cancel()
            assert not waiting.done()
        await waiting
        await all_of(*(work(key) for key in "aabbab"))
        assert not lock.busy("a")
        assert not lock.busy("b")

    asyncio.run(main())


def test_one_flight_serves_all_callers() -> None:
    async def main() -> None:
        flights: SingleFlight[int] = SingleFlight()
        runs = 0

        async def work() -> int:
            nonlocal runs
            runs += 1
            mine = runs
            await asyncio.sleep(0)
            return mine

        assert await all_of(*(flights.run("k", work) for _ in range(5))) == [1] * 5
        assert await flights.run("k", work) == 2  # later callers get a new run, not an old result
        assert await all_of(flights.run("a", work), flights.run("b", work)) == [3, 4]

    asyncio.run(main())


def test_a_flight_fails_for_all_its_callers() -> None:
    async def main() -> None:
        flights: SingleFlight[None] = SingleFlight()

        async def work() -> None:
            await asyncio.sleep(0)
            raise NotFound("gone")

        outcomes = await asyncio.gather(*(flights.run("k", work) for _ in range(3)), return_exceptions=True)
        assert [type(o) for o in outcomes] == [NotFound] * 3

    asyncio.run(main())


def test_the_last_caller_to_leave_cancels_the_flight_and_waits_for_it() -> None:
    async def main() -> None:
        flights: SingleFlight[None] = SingleFlight()
        events: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                events.append("cleaned up")

        first, last = (asyncio.ensure_future(flights.run("k", work)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert not last.done()
        assert events == []
        last.cancel()
        await asyncio.wait([last])
        assert events == ["cleaned up"]

    asyncio.run(main())


def test_a_new_flight_waits_until_the_cancelled_one_has_given_back_what_it_holds() -> None:
    async def main() -> None:
        flights: SingleFlight[str] = SingleFlight()
        held = False

        async def work() -> str:
            nonlocal held
            assert not held, "two runs for one key at the same time"
            held = True
            try:
                await asyncio.sleep(0.01)
                return "done"
            finally:
                await asyncio.sleep(0.02)
                held = False

        leaving = asyncio.ensure_future(flights.run("k", work))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        assert await flights.run("k", work) == "done"
        assert leaving.cancelled()

    asyncio.run(main())


def test_a_cancelled_caller_waits_for_its_thread() -> None:
    async def main() -> None:
        threads = Threads(1, "test")
        release, ended = threading.Event(), threading.Event()

        def call() -> None:
            release.wait(5)
            ended.set()

        caller = asyncio.ensure_future(threads.run(call))
        await asyncio.sleep(0.01)
        caller.cancel()
        await asyncio.sleep(0.01)
        assert not caller.done()
        release.set()
        await asyncio.wait([caller])
        assert caller.cancelled()
        assert ended.is_set()
        threads.close()

    asyncio.run(main())


def test_coalesced_calls_begin_after_they_were_asked_for() -> None:
    async def main() -> None:
        begun = 0

        async def sync() -> None:
            nonlocal begun
            begun += 1
            await asyncio.sleep(0.01)

        coalesced = Coalesced(sync)
        first = asyncio.ensure_future(coalesced())
        await asyncio.sleep(0.001)
        assert begun == 1
        # These ask while the first runs: it may have passed their data by, so one more run serves them all.
        await all_of(coalesced(), coalesced(), coalesced())
        assert begun == 2
        assert first.done()

    asyncio.run(main())


def test_a_failed_coalesced_call_fails_its_callers_only() -> None:
    async def main() -> None:
        outcomes = [OSError("disk"), None]

        async def sync() -> None:
            if error := outcomes.pop(0):
                raise error

        coalesced = Coalesced(sync)
        with pytest.raises(OSError, match="disk"):
            await coalesced()
        await coalesced()

    asyncio.run(main())


def test_all_of_raises_the_first_failure_after_the_rest_has_ended() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def fails() -> None:
            raise NotFound("first")

        async def lingers() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                ended.append("lingers")

        with pytest.raises(NotFound, match="first"):
            await all_of(lingers(), fails())
        assert ended == ["lingers"]

    asyncio.run(main())


def test_both_keeps_the_two_apart() -> None:
    async def number() -> int:
        return 1

    async def text() -> str:
        return "a"

    async def main() -> tuple[int, str]:
        return await both(number(), text())

    assert asyncio.run(main()) == (1, "a")


def test_failures_after_everybody_left_are_not_reported_as_forgotten() -> None:
    complaints: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        flights: SingleFlight[None] = SingleFlight()
        threads = Threads(1, "test")

        async def fails_when_cancelled() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                raise NotFound("while it gives back what it holds")

        def fails_late() -> None:
            time.sleep(0.05)
            raise NotFound("after its caller has left")

        for work in (flights.run("x", fails_when_cancelled), threads.run(fails_late)):
            caller = asyncio.ensure_future(work)
            await asyncio.sleep(0.01)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
        threads.close()

    asyncio.run(main())
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("limit", [_TimeLimit, time_limit])
def test_a_time_limit_holds_in_a_task_that_is_being_cancelled_too(limit: Callable[[float | None], Any]) -> None:
    async def main() -> None:
        seen: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                short = limit(0.01)
                try:
                    async with short:
                        await asyncio.sleep(10)
                except TimeoutError:
                    seen.append(f"out of time, {short.expired()}")
                async with limit(None):
                    seen.append("cleaned up")

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()
        assert seen == ["out of time, True", "cleaned up"]

        async def cancelled() -> None:
            async with limit(10):
                await asyncio.sleep(10)

        task = asyncio.create_task(cancelled())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()

    asyncio.run(main())


def test_slots_go_by_order_and_survive_those_who_leave() -> None:
    async def main() -> None:
        slots, held = Slots(2), []

        async def work(name: str, order: float) -> None:
            await slots.acquire(order)
            held.append(name)

        await work("a", 9)
        await work("b", 9)
        tasks = {name: asyncio.create_task(work(name, order)) for name, order in (("c", 3), ("d", 1), ("e", 1), ("f", 2))}
        await asyncio.sleep(0)
        assert held == ["a", "b"]
        tasks["e"].cancel()
        slots.release()
        tasks["d"].cancel()  # in the moment its turn has come
        await asyncio.wait(tasks.values(), timeout=0.05)
        assert held == ["a", "b", "f"]
        slots.release()
        await tasks["c"]
        slots.release()
        slots.release()
        await asyncio.wait_for(asyncio.gather(work("g", 0), work("h", 0)), 1)
        assert held == ["a", "b", "f", "c", "g", "h"]

    asyncio.run(main())


@pytest.mark.parametrize("when", ["opening", "held"])
def test_what_a_thread_opened_is_given_back_also_when_the_caller_leaves_meanwhile(when: str) -> None:
    opening, opened = threading.Event(), threading.Event()
    given_back: list[str] = []

    def take() -> str:
        opening.set()
        assert opened.wait(10)
        return "writer"

    async def hold(threads: Threads) -> None:
        async with threads.holding(take, given_back.append):
            await asyncio.Event().wait()

    async def scenario() -> None:
        threads = Threads(2, "test")
        holder = asyncio.ensure_future(hold(threads))
        await asyncio.to_thread(opening.wait, 10)
        if when == "held":
            opened.set()
            await asyncio.sleep(0.05)
        holder.cancel()
        await asyncio.sleep(0)
        opened.set()
        await asyncio.wait([holder])
        assert holder.cancelled()
        threads.close()

    asyncio.run(scenario())
    assert given_back == ["writer"]


def test_what_could_not_be_opened_is_not_given_back() -> None:
    given_back: list[str] = []

    def refuse() -> str:
        raise OSError("full")

    async def scenario() -> None:
        threads = Threads(1, "test")
        with pytest.raises(OSError, match="full"):
            async with threads.holding(refuse, given_back.append):
                raise AssertionError
        threads.close()

    asyncio.run(scenario())
    assert given_back == []


def test_whoever_is_cancelled_while_it_waits_for_the_rest_leaves_nothing_running() -> None:
    ended: list[str] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            ended.append("slow")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError

    async def main() -> None:
        parent = asyncio.ensure_future(all_of(slow_to_end(), fail()))
        await asyncio.sleep(0.01)
        parent.cancel()
        await asyncio.wait([parent])
        assert ended == ["slow"]
        assert parent.cancelled()

    asyncio.run(main())


def test_undoing_runs_backwards_to_its_end_and_keeps_the_first_error(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    async def step(name: str) -> None:
        await asyncio.sleep(0.01)
        done.append(name)
        if name == "second":
            raise OSError("cannot")

    async def work(undo: Undo) -> None:
        async with undo:
            for name in ("first", "second", "third"):
                undo.push(name, step, name)
            raise ValueError("cause")

    async def scenario() -> None:
        undo = Undo()
        with pytest.raises(ValueError, match="cause") as caught:
            await work(undo)
        assert caught.value.__notes__ == ["second failed, too: cannot"]
        assert undo.failed

        async with Undo() as fine:
            fine.push("never", step, "never")

    asyncio.run(scenario())
    assert done == ["third", "second", "first"]
    assert "second failed, after a failure: cannot" in caplog.text


def test_undoing_goes_on_when_the_caller_is_cancelled_meanwhile() -> None:
    done: list[str] = []

    async def step(name: str) -> None:
        done.append(f"{name} begun")
        await asyncio.sleep(0.01)
        done.append(name)

    async def work() -> None:
        async with Undo() as undo:
            undo.push("first", step, "first")
            undo.push("second", step, "second")
            raise ValueError

    async def scenario() -> None:
        caller = asyncio.ensure_future(work())
        await until(lambda: done)
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()

    asyncio.run(scenario())
    assert done == ["second begun", "second", "first begun", "first"]


def test_long_work_is_asked_to_stop_before_it_is_waited_for() -> None:
    begun = threading.Event()
    cancel = CancelToken()

    def work() -> None:
        begun.set()
        while True:
            cancel.check()

    async def scenario() -> None:
        threads = Threads(1, "test")
        caller = asyncio.ensure_future(threads.run_cancellable(cancel, work))
        await in_thread(begun.wait, 10)
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()
        threads.close()

    asyncio.run(scenario())


def test_there_is_one_way_from_the_event_loop_to_a_thread() -> None:
    source = Path(imgsvc.__file__).parent
    hops = {str(file.relative_to(source)) for file in source.rglob("*.py") if ".run_in_executor(" in file.read_text()}
    assert hops == {"base/concurrency.py"}  # ruff's banned-api, which forbids asyncio.to_thread, does not see methods
