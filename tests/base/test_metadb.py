"""The metadata database: group commit, isolation, failure, format and lock."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import lmdb
import pytest

from imgsvc.base import failpoints
from imgsvc.base.errors import DataLoss, FailedPrecondition, Internal, InvalidArgument, NotFound, ResourceExhausted
from imgsvc.base.metadb.database import MAX_KEY, LastEnd, MetaDB, Schema, WriteTxn, set_aside
from imgsvc.base.oci import MIB
from tests.support.faults import no_descriptors, tmpfs


@pytest.fixture
def db(tmp_path: Path) -> Iterator[MetaDB]:
    opened = MetaDB(tmp_path / "meta")
    yield opened
    failpoints.arm("")
    opened.close()


def put(table: str, key: str, record: dict[str, object]) -> Callable[[WriteTxn], None]:
    return lambda txn: txn.put(table, key, record)


def delete(table: str, key: str) -> Callable[[WriteTxn], bool]:
    return lambda txn: txn.delete(table, key)


def keys(db: MetaDB, prefix: str = "") -> list[str]:
    with db.read() as txn:
        return [key for key, _ in txn.items("images", prefix)]


def test_records_come_back_in_key_order(db: MetaDB) -> None:
    for key in ("b/2", "a/1", "b/1", "ü"):
        db.write(put("images", key, {"name": key}))
    assert keys(db) == ["a/1", "b/1", "b/2", "ü"]
    assert keys(db, "b/") == ["b/1", "b/2"]
    with db.read() as txn:
        assert [key for key, _ in txn.items("images", after="a/1")] == ["b/1", "b/2", "ü"]
        assert [key for key, _ in txn.items("images", "b/", after="a/1")] == ["b/1", "b/2"]
        assert [key for key, _ in txn.items("images", "b/", after="b/1")] == ["b/2"]
        assert txn.get("images", "a/1") == {"name": "a/1"}
        assert txn.get("images", "c") is None
        assert txn.count("images") == 4


def test_a_reader_sees_one_moment(db: MetaDB) -> None:
    with db.read() as before:
        db.write(lambda txn: txn.put("images", "x", {}))
        assert before.get("images", "x") is None
    assert keys(db) == ["x"]


def test_a_failing_change_leaves_nothing_and_reaches_its_caller(db: MetaDB) -> None:
    def change(txn: WriteTxn) -> None:
        txn.put("images", "half", {})
        raise NotFound("no")

    with pytest.raises(NotFound):
        db.write(change)
    assert keys(db) == []


def test_changes_share_a_commit_and_fail_alone(db: MetaDB) -> None:
    """While the writer is held up, others queue; they go in one batch, and the failing one takes nothing along."""
    gate = threading.Event()
    first = db.submit(lambda txn: gate.wait(10))

    def half(txn: WriteTxn) -> None:
        txn.put("images", "half", {})
        raise NotFound("no")

    futures = [db.submit(put("images", f"k{n}", {})) for n in range(20)]
    failing = db.submit(half)
    before = _last_transaction(db)
    gate.set()
    assert first.result(10)
    for future in futures:
        future.result(10)
    with pytest.raises(NotFound):
        failing.result(10)
    assert len(keys(db)) == 20
    assert _last_transaction(db) - before <= 2


def _last_transaction(db: MetaDB) -> int:
    return int(db._env.info()["last_txnid"])


def test_whatever_a_change_raises_the_writer_lives(db: MetaDB) -> None:
    def leave(txn: WriteTxn) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        db.submit(leave).result(10)
    db.write(lambda txn: txn.put("images", "x", {}))
    assert keys(db) == ["x"]


def test_a_change_cancelled_in_the_queue_never_runs(db: MetaDB) -> None:
    gate = threading.Event()
    held = db.submit(lambda txn: gate.wait(10))
    waiting = db.submit(lambda txn: txn.put("images", "cancelled", {}))
    assert waiting.cancel()
    gate.set()
    held.result(10)
    with pytest.raises(CancelledError):
        waiting.result(10)
    db.write(lambda txn: None)
    assert keys(db) == []


def test_awrite_from_the_event_loop(db: MetaDB) -> None:
    async def many() -> None:
        await asyncio.gather(*(db.awrite(put("images", f"{n:03}", {})) for n in range(100)))

    asyncio.run(many())
    assert len(keys(db)) == 100


@pytest.mark.parametrize("key", ["", "k" * (MAX_KEY + 1), "ü" * 256])
def test_impossible_keys_are_refused(db: MetaDB, key: str) -> None:
    with pytest.raises(InvalidArgument):
        db.write(lambda txn: txn.put("images", key, {}))
    with db.read() as txn, pytest.raises(InvalidArgument):
        txn.get("images", key)


def test_the_database_grows_far_beyond_one_batch_while_read(db: MetaDB) -> None:
    """128 MiB of records with a reader open: no restart, no remapping."""
    value: dict[str, object] = {"x": "y" * (1 << 20)}
    with db.read() as before:
        for n in range(128):
            db.write(put("images", str(n), value))
        assert before.count("images") == 0
    assert len(keys(db)) == 128
    assert db.size() > 128 << 20


def test_a_second_daemon_on_the_root_is_refused(db: MetaDB, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=f"process {os.getpid()}"):
        MetaDB(tmp_path / "meta")
    code = "import sys; from pathlib import Path; from imgsvc.base.metadb.database import MetaDB; MetaDB(Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "meta")], capture_output=True, text=True, timeout=30)
    assert "in use by another imgsvc" in other.stderr
    db.write(lambda txn: txn.put("images", "x", {}))


def test_a_closed_database_says_so_and_closes_once(tmp_path: Path) -> None:
    db = MetaDB(tmp_path / "meta")
    db.close()
    db.close()
    with pytest.raises(Internal):
        db.write(lambda txn: None)


def test_how_the_last_daemon_ended(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from imgsvc.base.metadb.database import MetaDB\n"
        "db = MetaDB(Path(sys.argv[1])); print(db.last_end, flush=True); os.kill(os.getpid(), 9)"
    )

    def killed() -> str:
        return subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30).stdout.strip()

    assert killed() == "clean"
    assert killed() == "killed"
    db = MetaDB(tmp_path)
    assert db.last_end is LastEnd.KILLED
    db.write(lambda txn: txn.put("meta", "session", {"boot": "another boot", "pid": 1}))
    _die(db)
    db = MetaDB(tmp_path)
    assert db.last_end is LastEnd.POWER
    db.close()
    db = MetaDB(tmp_path)
    assert db.last_end is LastEnd.CLEAN
    db.close()


def _die(db: MetaDB) -> None:
    """Leave the database as a killed process would, without ending this one."""
    db._stop_writer()
    db._env.close()
    os.close(db._lock_fd)


def test_a_failed_opening_gives_the_root_back(tmp_path: Path) -> None:
    MetaDB(tmp_path, schema=Schema(format=3)).close()
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="format 3"):
            MetaDB(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "metadb-writer"]
    MetaDB(tmp_path, schema=Schema(format=3)).close()


def test_migrations_run_in_order_and_once(tmp_path: Path) -> None:
    db = MetaDB(tmp_path)
    db.write(lambda txn: txn.put("images", "x", {"steps": []}))
    db.close()

    def step(name: str, txn: WriteTxn) -> None:
        for key, record in list(txn.items("images")):
            txn.put("images", key, {"steps": [*record["steps"], name]})

    schema = Schema(format=3, migrations={1: lambda txn: step("one", txn), 2: lambda txn: step("two", txn)})
    for _ in range(2):
        db = MetaDB(tmp_path, schema=schema)
        with db.read() as txn:
            assert txn.get("images", "x") == {"steps": ["one", "two"]}
        db.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    db = MetaDB(tmp_path)
    db.write(lambda txn: txn.put("images", "x", {}))
    db.close()

    def broken(txn: WriteTxn) -> None:
        txn.delete("images", "x")
        raise NotFound("migration")

    with pytest.raises(NotFound):
        MetaDB(tmp_path, schema=Schema(format=2, migrations={1: broken}))
    db = MetaDB(tmp_path)
    assert keys(db) == ["x"]
    db.close()


@pytest.mark.parametrize("damage", ["cut", "garbage", "header"])
def test_c_d4_an_unreadable_database_is_refused_and_can_be_set_aside(tmp_path: Path, damage: str) -> None:
    db = MetaDB(tmp_path)
    for n in range(200):
        db.write(put("images", str(n), {"x": "y" * 2000}))
    db.close()
    data = tmp_path / "data.mdb"
    if damage == "cut":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "garbage":
        data.write_bytes(b"not a database" * 1000)
    else:
        with data.open("r+b") as stream:
            stream.write(bytes(8192))
    with pytest.raises(DataLoss, match="fsck --repair"):
        MetaDB(tmp_path)
    assert set_aside(tmp_path).exists()
    db = MetaDB(tmp_path)
    assert keys(db) == []
    db.close()


def test_c_d4_a_record_that_cannot_be_parsed_is_named(db: MetaDB) -> None:
    def spoil(txn: WriteTxn) -> None:
        txn._txn.put(b"x", b"{broken", db=txn._tables["images"])
        txn._txn.put(b"y", b"[]", db=txn._tables["images"])

    db.write(spoil)
    with db.read() as txn:
        for key in ("x", "y"):
            with pytest.raises(DataLoss, match=f'record "{key}" of table images'):
                txn.get("images", key)


def test_c_d4_scrubbing_forgets_records_that_cannot_be_parsed(db: MetaDB) -> None:
    def spoil(txn: WriteTxn) -> None:
        txn._txn.put(b"x", b"{broken", db=txn._tables["images"])
        txn._txn.put(b"\xffy", b"{}", db=txn._tables["content"])
        txn.put("images", "z", {})

    db.write(spoil)
    for repair in (False, True):
        assert db.scrub(repair=repair) == ["images x", "content \ufffdy"]
    assert db.scrub(repair=False) == []
    assert keys(db) == ["z"]


def test_set_aside_is_refused_while_a_daemon_runs(db: MetaDB, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition):
        set_aside(tmp_path / "meta")


@pytest.mark.parametrize("name, category", [("ENOSPC", ResourceExhausted), ("EDQUOT", ResourceExhausted), ("EIO", DataLoss)])
def test_c_d3_a_failing_commit_is_told_and_the_next_one_works(db: MetaDB, name: str, category: type[Exception]) -> None:
    failpoints.arm(f"metadb.commit=error:{name}*1")
    with pytest.raises(category):
        db.write(lambda txn: txn.put("images", "x", {}))
    assert keys(db) == []
    db.write(lambda txn: txn.put("images", "x", {}))
    assert keys(db) == ["x"]


@pytest.mark.root
def test_c_d3_a_full_disk_is_told_and_survived(tmp_path: Path) -> None:
    with tmpfs(tmp_path, "size=4m"):
        db = MetaDB(tmp_path / "meta")
        db.write(lambda txn: txn.put("images", "first", {}))
        fill = [put("images", f"big{n}", {"x": "y" * 100_000}) for n in range(100)]
        with pytest.raises(ResourceExhausted, match="No space left"):  # noqa: PT012  # the write that fails is not known
            for change in fill:
                db.write(change)
        assert "first" in keys(db)
        stored = keys(db)
        db.close()
        db = MetaDB(tmp_path / "meta")
        assert keys(db) == stored
        for key in stored:  # LMDB gives freed pages out again two transactions later
            db.write(delete("images", key))
        db.write(lambda txn: txn.put("images", "after", {"x": "y" * 100_000}))
        db.close()


@pytest.mark.root
def test_c_d3_what_is_stored_can_be_removed_on_a_full_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path, "size=16m"):
        db = MetaDB(tmp_path / "meta")
        names = [f"image{n}" for n in range(500)]
        for name in names:
            db.write(put("images", name, {"x": "y" * 500}))
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "other").write_bytes(bytes(32 * MIB))
        for name in names:
            db.write(delete("images", name))
        assert keys(db) == []
        db.close()


def test_c_d3_without_descriptors_the_root_stays_usable(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="open files"), no_descriptors():
        MetaDB(tmp_path / "meta")
    MetaDB(tmp_path / "meta").close()


def test_a_limit_on_address_space_shrinks_the_map(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from imgsvc.base.metadb.database import MetaDB\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "db = MetaDB(Path(sys.argv[1])); db.write(lambda t: t.put('images', 'x', {})); db.close(); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert done.stdout == "ok\n", done.stderr


def test_the_file_is_plain_lmdb_for_other_tools(db: MetaDB, tmp_path: Path) -> None:
    db.write(lambda txn: txn.put("images", "x", {"a": 1}))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "meta", copy)
    with lmdb.open(str(copy), max_dbs=20, readonly=True) as env, env.begin(db=env.open_db(b"images", create=False)) as txn:
        assert txn.get(b"x") == b'{"a":1}'
    assert (tmp_path / "meta").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "meta" / "data.mdb").stat().st_mode & 0o777 == 0o600
