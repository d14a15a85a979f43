"""Contract of content.interfaces.Store, on the local store and on the fake."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.base.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, OutOfRange, Unavailable
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import Digest
from imgsvc.content.interfaces import Store
from imgsvc.content.local import LocalStore
from tests.fakes.store import MemoryStore

DATA = bytes(range(256)) * 40
DIGEST = Digest.of(DATA)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    db = MetaDB(tmp_path / "meta", sync=False)
    yield LocalStore(tmp_path, db, sync=False)
    db.close()


def put(store: Store, data: bytes, **labels: str) -> Digest:
    digest = Digest.of(data)
    writer = store.writer(f"put-{digest}", total=len(data), expected=digest)
    writer.write(data)
    writer.commit(len(data), digest, labels)
    return digest


def test_absent_content_is_none_or_not_found(store: Store) -> None:
    assert store.info(DIGEST) is None
    with pytest.raises(NotFound):
        store.reader(DIGEST)
    with pytest.raises(NotFound):
        store.update(DIGEST, {"a": "b"})
    store.delete(DIGEST)
    assert list(store.walk()) == []


def test_what_was_written_can_be_read_at_any_offset(store: Store) -> None:
    put(store, DATA)
    with store.reader(DIGEST) as reader:
        assert reader.size == len(DATA)
        assert reader.read_at(100, 50) == DATA[100:150]
        assert reader.read_at(0, len(DATA) * 2) == DATA
        assert reader.read_at(len(DATA), 1) == b""
        assert os.pread(reader.fileno(), 7, 3) == DATA[3:10]
        with pytest.raises(OutOfRange):
            reader.read_at(len(DATA) + 1, 1)
        with pytest.raises(OutOfRange):
            reader.read_at(-1, 1)
    reader.close()


def test_an_empty_blob_is_a_blob(store: Store) -> None:
    digest = put(store, b"")
    info = store.info(digest)
    assert info is not None
    assert info.size == 0


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_both_algorithms(store: Store, algorithm: str) -> None:
    digest = Digest.of(DATA, algorithm)
    writer = store.writer("x", total=len(DATA), expected=digest)
    writer.write(DATA)
    assert writer.commit(len(DATA), digest).digest == digest
    with store.reader(digest) as reader:
        assert reader.read_at(0, len(DATA)) == DATA


def test_the_algorithm_may_be_known_at_the_end_only(store: Store) -> None:
    digest = Digest.of(DATA, "sha512")
    writer = store.writer("x")
    writer.write(DATA)
    assert writer.commit(None, digest).size == len(DATA)


def test_ranges_arrive_in_any_order(store: Store) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    cuts = [(7000, len(DATA)), (100, 3000), (0, 100), (3000, 7000)]
    for start, end in cuts:
        writer.write_at(start, memoryview(DATA)[start:end])
    assert writer.missing() == []
    assert writer.commit(None, DIGEST).size == len(DATA)


def test_missing_lists_the_gaps_in_order(store: Store) -> None:
    writer = store.writer("x", total=100)
    writer.write_at(60, b"x" * 20)
    writer.write_at(10, b"x" * 10)
    assert writer.missing() == [(0, 10), (20, 40), (80, 20)]
    assert writer.status().offset == 0
    writer.write(b"y" * 10)
    assert writer.status().offset == 20
    writer.close()


def test_missing_needs_a_total(store: Store) -> None:
    writer = store.writer("x")
    with pytest.raises(FailedPrecondition):
        writer.missing()
    writer.close()


def test_a_follower_reads_what_is_there(store: Store) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[:1000])
    assert os.pread(writer.fileno(), 1000, 0) == DATA[:1000]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(writer.fileno(), b"x", 0)
    writer.close()


def test_closing_keeps_the_bytes_for_a_resume(store: Store) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write_at(500, DATA[500:900])
    writer.close()
    writer.close()
    again = store.writer("x", total=len(DATA), expected=DIGEST)
    assert again.ingest_ref == "x"
    assert again.missing() == [(0, 500), (900, len(DATA) - 900)]
    for offset, length in again.missing():
        again.write_at(offset, DATA[offset : offset + length])
    again.commit(len(DATA), DIGEST)
    assert store.status("x") is None


def test_an_ingest_for_something_else_starts_over(store: Store) -> None:
    writer = store.writer("x", total=10)
    writer.write(b"12345")
    writer.close()
    other = store.writer("x", total=11)
    assert other.missing() == [(0, 11)]
    other.close()


def test_a_second_writer_is_refused_until_the_first_closes(store: Store) -> None:
    writer = store.writer("x")
    with pytest.raises(Unavailable):
        store.writer("x")
    with pytest.raises(Unavailable):
        store.abort("x")
    writer.close()
    store.writer("x").close()
    store.abort("x")
    assert store.status("x") is None


@pytest.mark.parametrize("offset, length", [(0, 101), (100, 1), (5000, 1)])
def test_one_byte_too_many_is_data_loss(store: Store, offset: int, length: int) -> None:
    writer = store.writer("x", total=100)
    with pytest.raises(DataLoss):
        writer.write_at(offset, b"x" * length)
    writer.close()


def test_a_negative_offset_is_refused(store: Store) -> None:
    writer = store.writer("x")
    with pytest.raises(OutOfRange):
        writer.write_at(-1, b"x")
    writer.close()


@pytest.mark.parametrize("total", [-1, -(2**63)])
def test_an_impossible_total_is_refused(store: Store, total: int) -> None:
    with pytest.raises(InvalidArgument):
        store.writer("x", total=total)
    assert store.list_statuses() == []


def test_an_empty_ingest_ref_is_refused(store: Store) -> None:
    with pytest.raises(InvalidArgument):
        store.writer("")


@pytest.mark.parametrize(
    "written, size, digest",
    [
        (DATA, len(DATA), Digest.of(b"other")),
        (DATA, len(DATA) - 1, DIGEST),
        (DATA[:-1], len(DATA), DIGEST),
        (DATA[:-1], None, DIGEST),
        (b"", len(DATA), DIGEST),
    ],
    ids=["digest", "too long", "too short", "no size", "nothing"],
)
def test_a_mismatch_is_data_loss_and_the_ingest_is_gone(store: Store, written: bytes, size: int | None, digest: Digest) -> None:
    writer = store.writer("x")
    writer.write(written)
    with pytest.raises(DataLoss):
        writer.commit(size, digest)
    assert store.list_statuses() == []
    assert store.info(digest) is None
    assert list(store.walk()) == []


def test_a_gap_is_never_committed(store: Store) -> None:
    data = bytes(1000)  # a hole would read as the right bytes
    writer = store.writer("x")
    writer.write_at(0, data[:400])
    writer.write_at(600, data[600:])
    with pytest.raises(DataLoss):
        writer.commit(1000, Digest.of(data))


def test_a_closed_writer_does_nothing(store: Store) -> None:
    writer = store.writer("x", total=10)
    writer.close()
    with pytest.raises(FailedPrecondition):
        writer.write(b"x")
    with pytest.raises(FailedPrecondition):
        writer.commit(10, DIGEST)


def test_bytes_written_again_count_as_written_last(store: Store) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write_at(0, bytes(5000))
    writer.write_at(0, DATA[:5000])
    writer.write_at(5000, DATA[5000:])
    assert writer.commit(None, DIGEST).digest == DIGEST


def test_truncate_forgets_the_end(store: Store) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[:2000] + bytes(1000))
    writer.truncate(2000)
    assert writer.missing() == [(2000, len(DATA) - 2000)]
    writer.close()
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    assert writer.status().offset == 2000
    writer.write(DATA[2000:])
    writer.commit(None, DIGEST)


def test_committing_what_exists_is_a_success_and_merges_labels(store: Store) -> None:
    put(store, DATA, a="1")
    first = store.info(DIGEST)
    writer = store.writer("second", total=len(DATA), expected=DIGEST)
    writer.write(DATA)
    info = writer.commit(len(DATA), DIGEST, {"b": "2"})
    assert first is not None
    assert info.labels == {"a": "1", "b": "2"}
    assert info.created_at == first.created_at
    assert [i.digest for i in store.walk()] == [DIGEST]


def test_labels_merge_and_none_removes(store: Store) -> None:
    put(store, DATA, a="1", b="2")
    assert store.update(DIGEST, {"a": None, "c": "3", "d": None}).labels == {"b": "2", "c": "3"}
    info = store.info(DIGEST)
    assert info is not None
    assert info.labels == {"b": "2", "c": "3"}


def test_statuses_show_what_is_unfinished(store: Store) -> None:
    writer = store.writer("x", total=len(DATA), expected=DIGEST)
    writer.write(DATA[:10])
    status = store.status("x")
    assert status is not None
    assert (status.ingest_ref, status.offset, status.total, status.expected) == ("x", 10, len(DATA), DIGEST)
    assert [s.ingest_ref for s in store.list_statuses()] == ["x"]
    assert status.started_at.tzinfo is not None
    writer.close()
    store.abort("x")
    store.abort("x")
    assert store.list_statuses() == []


def test_delete_leaves_open_readers_alone(store: Store) -> None:
    put(store, DATA)
    with store.reader(DIGEST) as reader:
        store.delete(DIGEST)
        assert store.info(DIGEST) is None
        assert reader.read_at(0, len(DATA)) == DATA
    store.delete(DIGEST)
    put(store, DATA)
    assert store.info(DIGEST) is not None


def test_walk_lists_every_blob_once(store: Store) -> None:
    digests = {put(store, bytes([n]) * n) for n in range(20)}
    assert sorted(info.digest for info in store.walk()) == sorted(digests)
