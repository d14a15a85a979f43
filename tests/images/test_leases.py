"""What is special about the durable leases: restarts, expiry by itself, a failing disk. The rest is in contracts/."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from imgsvc.base import failpoints
from imgsvc.base.errors import ImgsvcError, ResourceExhausted
from imgsvc.base.metadb.database import MetaDB
from imgsvc.images.leases import RESTART_GRACE, LeaseBook, Node
from tests.fakes.clock import FakeClock

A, B = Node("content", "a"), Node("snapshot", "overlayfs/b")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[MetaDB]:
    opened = MetaDB(tmp_path / "meta", sync=False)
    yield opened
    failpoints.arm("")
    opened.close()


def test_leases_survive_a_restart(db: MetaDB) -> None:
    clock = FakeClock()

    async def before() -> None:
        leases = LeaseBook(db, clock)
        await leases.hold([A, B], lease_id="container", permanent=True, purpose="container x")
        await leases.hold([A], lease_id="pull")
        await leases.hold([A], lease_id="short", expires_in=timedelta(minutes=1))
        await leases.hold([A], lease_id="long", expires_in=timedelta(days=1))

    asyncio.run(before())
    found = {lease.id: lease for lease in LeaseBook(db, clock).leases()}
    assert found["container"].expires_at is None
    assert found["container"].resources == {A, B}
    assert found["container"].purpose == "container x"
    assert found["pull"].expires_at == clock.now + RESTART_GRACE
    assert found["short"].expires_at == clock.now + timedelta(minutes=1)
    assert found["long"].expires_at == clock.now + RESTART_GRACE


def test_expiry_drops_what_is_due_for_good(db: MetaDB) -> None:
    clock = FakeClock()

    async def life() -> None:
        leases = LeaseBook(db, clock)
        first = await leases.hold([A], expires_in=timedelta(seconds=10))
        second = await leases.hold([A], expires_in=timedelta(seconds=20))
        assert await leases.expire() == []
        clock.advance(10)
        assert await leases.expire() == [first]
        assert leases.holders(A) == [second]
        assert [lease.id for lease in LeaseBook(db, clock).leases()] == [second]

    asyncio.run(life())


def test_expiry_fires_by_itself_also_for_a_lease_that_comes_later(db: MetaDB) -> None:
    async def life() -> None:
        leases = LeaseBook(db)
        fired = asyncio.Event()
        task = asyncio.create_task(leases.expire_forever(fired.set))
        await asyncio.sleep(0.01)  # it is waiting for the clock now
        await leases.hold([A], expires_in=timedelta(milliseconds=50))
        await asyncio.wait_for(fired.wait(), 5)
        assert leases.leases() == []
        task.cancel()

    asyncio.run(life())


def test_expiry_goes_on_after_the_disk_failed(db: MetaDB) -> None:
    async def life() -> None:
        leases = LeaseBook(db)
        fired = asyncio.Event()
        await leases.hold([A], expires_in=timedelta(milliseconds=1))
        failpoints.arm("lease.expire=error:EIO*1")
        task = asyncio.create_task(leases.expire_forever(fired.set))
        await asyncio.wait_for(fired.wait(), 5)
        assert leases.leases() == []
        task.cancel()

    asyncio.run(life())


def test_c_d3_a_lease_that_cannot_be_recorded_is_none(db: MetaDB) -> None:
    async def life() -> None:
        leases = LeaseBook(db)
        await leases.hold([A], lease_id="x")
        failpoints.arm("metadb.commit=error:ENOSPC*2")
        with pytest.raises(ResourceExhausted):
            await leases.hold([B], lease_id="y")
        with pytest.raises(ResourceExhausted):
            await leases.add("x", [B])
        assert leases.holders(B) == []
        assert leases.holders(A) == ["x"]

    asyncio.run(life())


def test_a_release_that_cannot_be_recorded_counts_and_can_be_repeated(db: MetaDB) -> None:
    async def life() -> None:
        leases = LeaseBook(db)
        await leases.hold([A], lease_id="x", permanent=True)
        failpoints.arm("metadb.commit=error:EIO*1")
        with pytest.raises(ImgsvcError):
            await leases.release("x")
        assert leases.holders(A) == []
        await leases.release("x")
        assert LeaseBook(db).leases() == []

    asyncio.run(life())


@pytest.mark.parametrize("late", [0.02, 0.0])
def test_a_caller_that_leaves_while_its_lease_is_written_leaves_no_record(db: MetaDB, late: float) -> None:
    async def life() -> None:
        leases = LeaseBook(db)
        await leases.hold([A], lease_id="old")
        failpoints.arm("metadb.commit=delay:100*2")
        leaving = [asyncio.create_task(leases.hold([B])), asyncio.create_task(leases.add("old", [B]))]
        await asyncio.sleep(late)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        assert all(task.cancelled() for task in leaving)
        await db.awrite(lambda txn: None)  # behind all that was begun
        for book in (leases, LeaseBook(db)):
            assert {lease.id: set(lease.resources) for lease in book.leases()} == {"old": {A}}

    asyncio.run(life())


def test_a_caller_that_leaves_while_waiting_holds_nothing(db: MetaDB) -> None:
    async def life() -> None:
        leases = LeaseBook(db)
        async with leases.removal([A]):
            waiting = asyncio.create_task(leases.hold([A, B]))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert leases.holders(B) == []
        assert leases.leases() == []

    asyncio.run(life())


def test_a_release_that_fails_replaces_neither_error_nor_success(db: MetaDB, caplog: pytest.LogCaptureFixture) -> None:
    async def life() -> None:
        leases = LeaseBook(db)
        failpoints.arm("lease.delete=error:ENOSPC")
        async with leases.held([A], purpose="fine"):
            pass
        with pytest.raises(KeyError):
            async with leases.held([A], purpose="failing"):
                raise KeyError

    asyncio.run(life())
    assert "lease for failing could not be dropped" in caplog.text
