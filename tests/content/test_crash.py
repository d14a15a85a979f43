"""SIGKILL at every failpoint of the store, then reopen: nothing acknowledged is lost, nothing broken is shown (C-D1, C-D8)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imgsvc.base import failpoints
from imgsvc.base.errors import FailedPrecondition
from imgsvc.base.metadb.database import LastEnd, MetaDB
from imgsvc.content.local import LocalStore
from imgsvc.images.upkeep.fsck import recover
from tests.content.crash_scenario import BLOBS, DIGESTS, NEXT

PREFIXES = ("content.", "metadb.", "lease.", "gc.")
POINTS = [name for name in failpoints.POINTS if name.startswith(PREFIXES)]
NEEDS_A_STRAY = {"content.recover", "content.adopt"}
NEEDS_MIGRATION = {"metadb.migrate"}


def live(root: Path, armed: str = "", *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.content.crash_scenario", str(root), *arguments]
    environment = {**os.environ, failpoints.ENV: armed}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


def check_store(root: Path, acknowledged: list[str]) -> None:
    """What the next daemon finds after its recovery."""
    db = MetaDB(root / "meta")
    try:
        store = LocalStore(root, db, sync=True)
        recover(store, db.last_end)
        assert store.strays() == []
        here = {info.digest for info in store.walk()}
        for digest in here:
            assert store.check(digest, deep=True) is None
        for name, digest in DIGESTS.items():
            if f"stored {name}" in acknowledged and name in ("kept", "labelled"):
                assert digest in here
            if f"deleted {name}" in acknowledged:
                assert digest not in here
        if "labelled" in acknowledged:
            info = store.info(DIGESTS["labelled"])
            assert info is not None
            assert info.labels == {"name": "labelled", "extra": "label"}
        for status in store.list_statuses():
            store.writer(status.ingest_ref, total=status.total, expected=status.expected).close()
    finally:
        db.close()


def check_disk(root: Path) -> None:
    """After a whole life: exactly the two blobs, and nothing unfinished."""
    files = sorted(path.name for path in (root / "content" / "blobs" / "sha256").iterdir())
    assert files == sorted(DIGESTS[name].hex for name in ("kept", "labelled"))
    assert list((root / "content" / "ingest").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("hit", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_c_d1_killed_at_a_failpoint(tmp_path: Path, point: str, hit: int) -> None:
    if point in NEEDS_A_STRAY:
        assert live(tmp_path, "content.commit.dirsynced=kill@2").returncode == -signal.SIGKILL
    arguments = ["migrate"] if point in NEEDS_MIGRATION else []
    if arguments:
        assert live(tmp_path).returncode == 0
    killed = live(tmp_path, f"{point}=kill@{hit}", *arguments)
    if hit == 1:
        assert killed.returncode == -signal.SIGKILL, f"{point} is never reached: {killed.stderr}"
    else:
        assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
    if point not in NEEDS_MIGRATION:
        check_store(tmp_path, killed.stdout.splitlines())
    again = live(tmp_path, "", *arguments)
    assert again.returncode == 0, again.stderr
    check_disk(tmp_path)


def test_c_d1_without_failpoints_the_life_is_whole(tmp_path: Path) -> None:
    whole = live(tmp_path)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.splitlines()[-1] == "closed"
    check_store(tmp_path, whole.stdout.splitlines())
    check_disk(tmp_path)


def test_c_d1_killed_at_sixty_percent_resumes_there(tmp_path: Path) -> None:
    """Chunk 6 of 10 is in the file when the process dies: at most 42 % may be fetched again (issue 4)."""
    data = BLOBS["kept"]
    code = (
        "import os, sys; from pathlib import Path; from imgsvc.base import failpoints\n"
        "from imgsvc.content.local import LocalStore; from imgsvc.base.metadb.database import MetaDB\n"
        "from tests.content.crash_scenario import *\n"
        "root = Path(sys.argv[1]); failpoints.arm(os.environ[failpoints.ENV])\n"
        "store = LocalStore(root, MetaDB(root / 'meta'), sync=True)\n"
        "writer = store.writer('x', total=len(BLOBS['kept']), expected=DIGESTS['kept'])\n"
        "for n in range(10): writer.write(BLOBS['kept'][n * CHUNK:(n + 1) * CHUNK])\n"
    )
    armed = {**os.environ, failpoints.ENV: "content.journaled=kill@6"}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=armed, timeout=180).returncode == -signal.SIGKILL
    db = MetaDB(tmp_path / "meta")
    store = LocalStore(tmp_path, db, sync=True)
    assert db.last_end is LastEnd.KILLED
    recover(store, db.last_end)
    writer = store.writer("x", total=len(data), expected=DIGESTS["kept"])
    missing = sum(length for _, length in writer.missing())
    assert missing <= 0.42 * len(data)
    for offset, length in writer.missing():
        writer.write_at(offset, data[offset : offset + length])
    writer.commit(len(data), DIGESTS["kept"])
    db.close()


def test_c_d8_the_next_format_opens_this_one_and_this_one_refuses_the_next(tmp_path: Path) -> None:
    assert live(tmp_path).returncode == 0
    newer = MetaDB(tmp_path / "meta", schema=NEXT)
    with newer.read() as txn:
        assert [record["migrated"] for _, record in txn.items("content")] == [True, True]
    newer.close()
    with pytest.raises(FailedPrecondition, match="format 2, this imgsvc knows up to 1"):
        MetaDB(tmp_path / "meta")
    MetaDB(tmp_path / "meta", schema=NEXT).close()


def test_c_d8_killed_inside_a_migration_nothing_of_it_stays(tmp_path: Path) -> None:
    assert live(tmp_path).returncode == 0
    assert live(tmp_path, "metadb.migrate=kill", "migrate").returncode == -signal.SIGKILL
    db = MetaDB(tmp_path / "meta")
    with db.read() as txn:
        assert txn.get("meta", "format") == {"version": 1}
        assert not any("migrated" in record for _, record in txn.items("content"))
    db.close()
