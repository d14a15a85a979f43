"""A failing disk: the error says so, the space comes back, and the next write works (C-D3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.base import failpoints
from imgsvc.base.errors import DataLoss, ImgsvcError, ResourceExhausted
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import MIB, Digest
from imgsvc.content.local import LocalStore
from tests.support.faults import no_descriptors, tmpfs

DATA = os.urandom(100_000)
DIGEST = Digest.of(DATA)
POINTS = [name for name in failpoints.POINTS if name.startswith(("content.ingest", "content.write", "content.written", "content.commit"))]


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


def pull(store: LocalStore) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    try:
        writer.write(DATA[:50_000])
        writer.write(DATA[50_000:])
        writer.commit(len(DATA), DIGEST)
    finally:
        writer.close()


def files(root: Path) -> list[Path]:
    return [path for path in (root / "content").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO"])
@pytest.mark.parametrize("point", POINTS)
def test_c_d3_an_error_at_every_step_of_a_write(tmp_path: Path, point: str, name: str) -> None:
    db = MetaDB(tmp_path / "meta", sync=False)
    store = LocalStore(tmp_path, db, sync=True)
    failpoints.arm(f"{point}=error:{name}*1")
    with pytest.raises(DataLoss if name == "EIO" else ResourceExhausted):
        pull(store)
    if point == "content.commit.recorded":  # the blob is whole; what failed is cleaning up behind it
        assert store.info(DIGEST) is not None
    else:
        assert store.info(DIGEST) is None
        assert store.strays() == []
        assert sum(path.stat().st_size for path in files(tmp_path)) < 1000
    pull(store)
    assert store.check(DIGEST, deep=True) is None
    assert len(files(tmp_path)) == 1
    db.close()


def test_c_d3_a_record_that_cannot_be_written_takes_the_blob_back(tmp_path: Path) -> None:
    db = MetaDB(tmp_path / "meta", sync=False)
    store = LocalStore(tmp_path, db, sync=True)
    failpoints.arm("metadb.commit=error:ENOSPC*1")
    with pytest.raises(ResourceExhausted):
        pull(store)
    assert files(tmp_path) == []
    pull(store)
    db.close()


def test_c_d3_after_a_failed_write_the_writer_gives_the_space_back_at_once(tmp_path: Path) -> None:
    db = MetaDB(tmp_path / "meta", sync=False)
    store = LocalStore(tmp_path, db, sync=True)
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[:50_000])
    failpoints.arm("content.write=error:ENOSPC*1")
    with pytest.raises(ResourceExhausted):
        writer.write(DATA[50_000:])
    assert sum(path.stat().st_size for path in files(tmp_path) if path.name == "data") == 0
    with pytest.raises(ResourceExhausted):
        writer.write(b"x")
    with pytest.raises(ResourceExhausted):
        writer.commit(len(DATA), DIGEST)
    assert store.list_statuses() == []
    db.close()


def test_c_d3_without_descriptors(tmp_path: Path) -> None:
    db = MetaDB(tmp_path / "meta", sync=False)
    store = LocalStore(tmp_path, db, sync=True)
    with pytest.raises(ImgsvcError), no_descriptors():
        pull(store)
    pull(store)
    with pytest.raises(ResourceExhausted, match="open files"), no_descriptors():
        store.reader(DIGEST)
    db.close()


@pytest.mark.root
@pytest.mark.parametrize("options", ["size=2m", "size=8m,nr_inodes=14"])
def test_c_d3_a_disk_that_is_really_full(tmp_path: Path, options: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with tmpfs(root, options):
        db = MetaDB(tmp_path / "meta", sync=False)
        store = LocalStore(root, db, sync=True, reserve=0)
        used = os.statvfs(root).f_bavail
        with pytest.raises(ResourceExhausted):
            _fill(store)
        assert store.list_statuses() == []
        for info in store.walk():
            assert store.check(info.digest, deep=True) is None
            store.delete(info.digest)
        assert os.statvfs(root).f_bavail == used
        pull(store)
        db.close()


def _fill(store: LocalStore) -> None:
    for n in range(20):
        data = bytes([n]) * (MIB // 4)
        writer = store.writer(f"w{n}")
        try:
            writer.write(data)
            writer.commit(len(data), Digest.of(data))
        finally:
            writer.close()


@pytest.mark.root
def test_c_d3_what_cannot_fit_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with tmpfs(root, "size=4m"):
        db = MetaDB(tmp_path / "meta", sync=False)
        store = LocalStore(root, db, sync=False, reserve=MIB)
        with pytest.raises(ResourceExhausted, match="needs 3500000 bytes"):
            store.writer("x", total=3_500_000)
        store.writer("y", total=2_500_000).close()
        db.close()


@pytest.mark.parametrize("point", ["content.commit.synced", "content.commit.renamed", "content.commit.dirsynced", "metadb.commit"])
def test_c_d3_storing_again_and_failing_harms_no_blob_that_is_there(tmp_path: Path, point: str) -> None:
    db = MetaDB(tmp_path / "meta", sync=False)
    store = LocalStore(tmp_path, db, sync=True)
    pull(store)
    failpoints.arm(f"{point}=error:ENOSPC*1")
    with pytest.raises(ResourceExhausted):
        pull(store)
    assert store.check(DIGEST, deep=True) is None
    assert store.info(DIGEST) is not None
    db.close()
