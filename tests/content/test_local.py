"""What is special about the local store: the layout, damaged files, parallel writers, resuming across boots."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import DataLoss, FailedPrecondition, ResourceExhausted
from imgsvc.base.metadb.database import LastEnd, MetaDB, WriteTxn
from imgsvc.base.oci import MIB, Digest
from imgsvc.content.interfaces import Fault, Writer
from imgsvc.content.local import LocalStore
from imgsvc.content.verify import DigestMismatch, SizeMismatch
from imgsvc.images.upkeep.fsck import ContentChecker, fsck, recover

DATA = os.urandom(300_000)
DIGEST = Digest.of(DATA)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[MetaDB]:
    opened = MetaDB(tmp_path / "meta", sync=False)
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path, db: MetaDB) -> LocalStore:
    return LocalStore(tmp_path, db, sync=True)


def put(store: LocalStore, data: bytes = DATA) -> Digest:
    digest = Digest.of(data)
    writer = store.writer(f"put-{digest}", total=len(data), expected=digest)
    writer.write(data)
    writer.commit(len(data), digest)
    return digest


def blob(root: Path, digest: Digest = DIGEST) -> Path:
    return root / "content" / "blobs" / digest.algorithm / digest.hex


def damage(path: Path, kind: str) -> None:
    path.chmod(0o600)
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        os.truncate(path, 0)
    elif kind == "short":
        os.truncate(path, 1000)
    elif kind == "flipped":
        with path.open("r+b") as stream:
            stream.seek(1234)
            byte = stream.read(1)[0]
            stream.seek(1234)
            stream.write(bytes([byte ^ 1]))
    elif kind == "symlink":
        path.rename(path.with_suffix(".moved"))
        path.symlink_to(path.with_suffix(".moved"))


DAMAGE = {"missing": Fault.MISSING, "empty": Fault.EMPTY, "short": Fault.SIZE, "flipped": Fault.ALTERED}


def test_the_layout_is_that_of_an_image_layout_and_closed_to_others(store: LocalStore, tmp_path: Path) -> None:
    put(store)
    assert blob(tmp_path).read_bytes() == DATA
    assert blob(tmp_path).stat().st_mode & 0o777 == 0o400
    assert list((tmp_path / "content" / "ingest").iterdir()) == []
    for directory in ("content", "content/blobs", "content/blobs/sha256", "content/blobs/sha512", "content/ingest"):
        assert (tmp_path / directory).stat().st_mode & 0o777 == 0o700


def test_a_directory_left_open_to_others_is_closed(db: MetaDB, tmp_path: Path) -> None:
    (tmp_path / "content" / "blobs").mkdir(parents=True)
    (tmp_path / "content" / "blobs").chmod(0o777)
    LocalStore(tmp_path, db, sync=False)
    assert (tmp_path / "content" / "blobs").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", DAMAGE)
def test_c_d4_a_damaged_blob_is_never_served_and_a_new_pull_heals_it(store: LocalStore, tmp_path: Path, kind: str) -> None:
    put(store)
    damage(blob(tmp_path), kind)
    assert store.info(DIGEST) is None
    with pytest.raises(DataLoss, match="pull the image again"):
        store.reader(DIGEST)
    assert store.check(DIGEST, deep=False) is DAMAGE[kind]
    put(store)
    assert store.info(DIGEST) is not None
    with store.reader(DIGEST) as reader:
        assert reader.read_at(0, len(DATA)) == DATA


def test_c_d4_a_symbolic_link_is_not_a_blob(store: LocalStore, tmp_path: Path) -> None:
    put(store)
    damage(blob(tmp_path), "symlink")
    assert store.info(DIGEST) is None


@pytest.mark.parametrize("kind", DAMAGE)
def test_c_d4_fsck_finds_and_repairs(store: LocalStore, tmp_path: Path, kind: str) -> None:
    put(store)
    other = put(store, b"sound")
    damage(blob(tmp_path), kind)
    token = CancelToken()
    (finding,) = fsck([ContentChecker(store)], deep=False, repair=False, cancel=token).findings
    assert (finding.kind, finding.id, finding.problem, finding.repaired) == ("blob", DIGEST, DAMAGE[kind], "")
    report = fsck([ContentChecker(store)], deep=True, repair=True, cancel=token)
    assert report.clean
    assert len(report.findings) == 1
    assert fsck([ContentChecker(store)], deep=True, repair=False, cancel=token).findings == ()
    assert [info.digest for info in store.walk()] == [other]
    assert not blob(tmp_path).exists()


def test_c_d4_only_a_deep_check_sees_what_the_disk_did(store: LocalStore, tmp_path: Path, db: MetaDB) -> None:
    """A disk that returns other bytes leaves no trace in the file's times; the record is made to match, as there."""
    put(store)
    damage(blob(tmp_path), "flipped")
    stat = blob(tmp_path).stat()
    with db.read() as txn:
        record = txn.get("content", DIGEST)
    assert record is not None
    db.write(lambda txn: txn.put("content", DIGEST, {**record, "stamp": [stat.st_mtime_ns, stat.st_ctime_ns]}))
    assert store.check(DIGEST, deep=False) is None
    assert store.check(DIGEST, deep=True) is Fault.ALTERED


def test_a_touched_but_sound_blob_is_hashed_once_and_served(store: LocalStore, tmp_path: Path, db: MetaDB) -> None:
    put(store)
    os.utime(blob(tmp_path))
    assert store.info(DIGEST) is not None
    db.write(lambda txn: None)  # the new stamp is written behind the answer
    with db.read() as txn:
        record = txn.get("content", DIGEST)
    assert record is not None
    assert record["stamp"] == [blob(tmp_path).stat().st_mtime_ns, blob(tmp_path).stat().st_ctime_ns]


def test_strays_are_adopted_when_sound_and_deleted_when_not(store: LocalStore, tmp_path: Path) -> None:
    blob(tmp_path).write_bytes(DATA)
    wrong = Digest.of(b"something else")
    blob(tmp_path, wrong).write_bytes(b"torn")
    (tmp_path / "content" / "blobs" / "sha256" / "README").write_bytes(b"not ours")
    assert sorted(store.strays()) == sorted([DIGEST, wrong])
    findings = recover(store, LastEnd.KILLED)
    assert sorted(finding.id for finding in findings) == sorted([DIGEST, wrong])
    assert all(finding.repaired for finding in findings)
    assert [info.digest for info in store.walk()] == [DIGEST]
    assert not blob(tmp_path, wrong).exists()


def test_c_d5_a_clean_end_needs_no_check(store: LocalStore, tmp_path: Path) -> None:
    blob(tmp_path).write_bytes(DATA)
    assert recover(store, LastEnd.CLEAN) == []
    assert store.strays() == [DIGEST]


def test_recovery_keeps_to_its_budget_and_says_so(store: LocalStore, tmp_path: Path) -> None:
    blob(tmp_path).write_bytes(DATA)
    findings = recover(store, LastEnd.POWER, budget=-1)
    assert "not everything was checked" in findings[-1].problem
    assert blob(tmp_path).exists()
    assert store.info(DIGEST) is None


def test_c_d5_an_ingest_from_an_earlier_boot_is_not_trusted(store: LocalStore, tmp_path: Path) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[:100_000])
    writer.close()
    (directory,) = (tmp_path / "content" / "ingest").iterdir()
    record = json.loads((directory / "record").read_text())
    (directory / "record").write_text(json.dumps({**record, "boot": "earlier"}))
    assert store.writer("x", total=len(DATA), expected=DIGEST).missing() == [(0, len(DATA))]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"ingest_ref": 1}', b'{"ingest_ref":"x","total":"y"}', b"\xff"])
def test_a_broken_ingest_record_is_cleaned_up(store: LocalStore, tmp_path: Path, content: bytes) -> None:
    store.writer("x").close()
    (directory,) = (tmp_path / "content" / "ingest").iterdir()
    (directory / "record").write_bytes(content)
    assert store.list_statuses() == []
    assert store.clean_ingests() == [directory.name]
    assert not directory.exists()


@pytest.mark.parametrize("tail", [b"\x01", b"\xff" * 16, b"\x00" * 15, (2**64 - 1).to_bytes(8, "little") * 2])
def test_a_torn_or_absurd_journal_claims_nothing_that_is_not_there(store: LocalStore, tmp_path: Path, tail: bytes) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[:1000])
    writer.close()
    (directory,) = (tmp_path / "content" / "ingest").iterdir()
    with (directory / "journal").open("ab") as stream:
        stream.write(tail)
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    assert writer.missing() == [(1000, len(DATA) - 1000)]
    writer.write(DATA[1000:2000])
    writer.close()
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    assert writer.missing() == [(2000, len(DATA) - 2000)]
    writer.close()


def test_a_journal_that_lies_is_found_by_the_digest(store: LocalStore, tmp_path: Path) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[:1000])
    writer.close()
    (directory,) = (tmp_path / "content" / "ingest").iterdir()
    with (directory / "data").open("r+b") as stream:
        stream.write(b"lost pages")
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[1000:])
    with pytest.raises(DigestMismatch) as caught:
        writer.commit(len(DATA), DIGEST)
    assert caught.value.expected == DIGEST
    assert store.list_statuses() == []


def test_mismatches_carry_their_fields(store: LocalStore) -> None:
    writer = store.writer("x", total=10)
    with pytest.raises(SizeMismatch) as caught:
        writer.write(b"x" * 11)
    assert (caught.value.expected, caught.value.actual) == (10, 11)
    writer.close()


def test_parallel_ranges_of_one_blob(store: LocalStore) -> None:
    data = os.urandom(8 * MIB)
    digest = Digest.of(data)
    writer = store.writer("x", total=len(data), expected=digest)

    def fetch(start: int) -> None:
        for offset in range(start, start + 2 * MIB, 64 * 1024):
            writer.write_at(offset, data[offset : offset + 64 * 1024])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(0, len(data), 2 * MIB)))
    assert writer.commit(None, digest).size == len(data)


def test_parallel_commits_of_one_digest_all_succeed(store: LocalStore, tmp_path: Path) -> None:
    def pull(n: int) -> None:
        writer = store.writer(f"pull-{n}", total=len(DATA), expected=DIGEST)
        writer.write(DATA)
        writer.commit(len(DATA), DIGEST, {str(n): "x"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pull, range(8)))
    info = store.info(DIGEST)
    assert info is not None
    assert sorted(info.labels) == [str(n) for n in range(8)]
    assert list((tmp_path / "content" / "ingest").iterdir()) == []


def test_storing_and_deleting_side_by_side_never_leaves_a_record_without_a_file(store: LocalStore) -> None:
    def cycle(n: int) -> None:
        for _ in range(10):
            put_again(n)
            store.delete(DIGEST)

    def put_again(n: int) -> None:
        writer = store.writer(f"w-{n}", total=len(DATA), expected=DIGEST)
        writer.write(DATA)
        writer.commit(len(DATA), DIGEST)
        assert store.check(DIGEST, deep=False) is None

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(cycle, range(4)))
    assert store.strays() == []
    assert list(store.walk()) == []


def test_closing_waits_for_writes_on_other_threads(store: LocalStore, tmp_path: Path) -> None:
    """A closed descriptor's number may be another file's a moment later; no write may land there."""
    for _ in range(30):
        writer = store.writer("x", total=4 * MIB)
        thread = threading.Thread(target=_write_until_closed, args=[writer])
        thread.start()
        while not writer.status().offset:
            pass
        writer.close()
        victim = tmp_path / "victim"
        with victim.open("wb"):
            thread.join()
        assert victim.stat().st_size == 0
        store.abort("x")


def _write_until_closed(writer: Writer) -> None:
    with contextlib.suppress(FailedPrecondition):
        for offset in range(0, 4 * MIB, MIB):
            writer.write_at(offset, bytes(MIB))


def test_no_descriptor_is_left_behind(store: LocalStore) -> None:
    def cycle(n: int) -> None:
        put(store, os.urandom(100))
        writer = store.writer("bad", total=3)
        writer.write(b"abc")
        with pytest.raises(DataLoss):
            writer.commit(3, DIGEST)
        store.writer("left").close()

    cycle(0)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        cycle(n)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_free_space_reserve_is_kept(db: MetaDB, tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    store = LocalStore(tmp_path, db, sync=False, reserve=free)
    with pytest.raises(ResourceExhausted, match="beside the reserve"):
        store.writer("x", total=MIB)
    assert store.list_statuses() == []
    store.writer("y").close()


def test_walking_more_than_a_page_sees_every_blob_once(store: LocalStore, db: MetaDB) -> None:
    blob_record = {"size": 0, "created": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:00:00+00:00", "labels": {}, "stamp": [0, 0]}
    digests = [Digest.of(str(n).encode()) for n in range(1025)]

    def put_all(txn: WriteTxn) -> None:
        for digest in digests:
            txn.put("content", digest, blob_record)

    for count in (511, 512, 513, 1025):
        digests[:] = [Digest.of(str(n).encode()) for n in range(count)]
        db.write(put_all)
        assert [info.digest for info in store.walk()] == sorted(digests)
