"""Contract of leases.LeaseManager, on the durable one and on the fake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from imgsvc.base.errors import FailedPrecondition, InvalidArgument, NotFound
from imgsvc.base.metadb.database import MetaDB
from imgsvc.images.leases import LeaseBook, LeaseManager, Node
from tests.fakes.clock import FakeClock
from tests.fakes.leases import MemoryLeases

A, B, C = (Node("content", name) for name in "abc")

Check = Callable[[LeaseManager, FakeClock], Awaitable[None]]


@pytest.fixture(params=["book", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Check], None]:
    def runner(check: Check) -> None:
        asyncio.run(_run(check, request.param, tmp_path))

    return runner


async def _run(check: Check, kind: str, path: Path) -> None:
    clock = FakeClock()
    if kind == "memory":
        await check(MemoryLeases(clock), clock)
        return
    db = MetaDB(path / "meta", sync=False)
    try:
        await check(LeaseBook(db, clock), clock)
    finally:
        db.close()


def test_a_lease_holds_what_it_names_until_released(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        first = await leases.hold([A, B], purpose="pull")
        second = await leases.hold([B])
        assert leases.holders(A) == [first]
        assert leases.holders(B) == sorted([first, second])
        assert leases.holders(C) == []
        await leases.release(first)
        await leases.release(first)
        assert leases.holders(A) == []
        assert [lease.id for lease in leases.leases()] == [second]

    run(check)


def test_resources_can_be_added(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        lease = await leases.hold([A])
        await leases.add(lease, [B])
        assert leases.leases()[0].resources == {A, B}
        with pytest.raises(NotFound):
            await leases.add("other", [B])

    run(check)


def test_holding_under_a_known_id_adds(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        await leases.hold([A], lease_id="container-1", permanent=True)
        assert await leases.hold([B], lease_id="container-1") == "container-1"
        (lease,) = leases.leases()
        assert (lease.resources, lease.permanent) == (frozenset({A, B}), True)

    run(check)


def test_expiry_is_recorded_and_renewed(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        lease = await leases.hold([A], expires_in=timedelta(seconds=10))
        assert leases.leases()[0].expires_at == clock.now + timedelta(seconds=10)
        clock.advance(5)
        await leases.renew(lease, timedelta(seconds=10))
        assert leases.leases()[0].expires_at == clock.now + timedelta(seconds=10)
        await leases.renew(lease, None)
        assert leases.leases()[0].expires_at is None
        with pytest.raises(NotFound):
            await leases.renew("other", None)

    run(check)


@pytest.mark.parametrize("lease_id, seconds", [("", 1), ("x", 0), ("x", -1)])
def test_impossible_leases_are_refused(run: Callable[[Check], None], lease_id: str, seconds: int) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        with pytest.raises(InvalidArgument):
            await leases.hold([A], lease_id=lease_id, expires_in=timedelta(seconds=seconds))
        assert leases.leases() == []

    run(check)


def test_removal_passes_over_what_is_named(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        await leases.hold([B])
        async with leases.removal([A, B, C]) as free:
            assert free == [A, C]

    run(check)


def test_a_lease_waits_for_a_removal_that_has_begun(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        async with leases.removal([A]):
            wanted = asyncio.create_task(leases.hold([A, B]))
            other = await leases.hold([C])
            await asyncio.sleep(0.02)
            assert not wanted.done()
        await asyncio.wait_for(wanted, 5)
        await leases.release(other)
        assert leases.holders(A) == [wanted.result()]

    run(check)


def test_what_was_named_during_a_collection_stays_named_until_it_ends(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        before = await leases.hold([B])
        with leases.collecting():
            await leases.release(await leases.hold([A]))
            await leases.release(before)
            async with leases.removal([A, B]) as free:
                assert free == [B]
            with pytest.raises(FailedPrecondition), leases.collecting():
                pass
        async with leases.removal([A]) as free:
            assert free == [A]

    run(check)


def test_parallel_changes_of_one_lease_all_count(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        lease = await leases.hold([])
        nodes = [Node("content", str(n)) for n in range(50)]
        await asyncio.gather(*(leases.add(lease, [node]) for node in nodes))
        assert leases.leases()[0].resources == set(nodes)

    run(check)


def test_a_lease_may_last_for_a_block(run: Callable[[Check], None]) -> None:
    async def check(leases: LeaseManager, clock: FakeClock) -> None:
        async with leases.held([A], purpose="block") as lease:
            await leases.add(lease, [B])
            assert leases.holders(A) == leases.holders(B) == [lease]
        assert leases.leases() == []
        with pytest.raises(KeyError):
            async with leases.held([A], purpose="block"):
                raise KeyError
        assert leases.leases() == []

    run(check)
