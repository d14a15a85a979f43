"""Damaged pages are found before LMDB meets them: it would abort the process. None of a sound file is taken for damaged."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from imgsvc.base.errors import DataLoss
from imgsvc.base.metadb.database import MetaDB, WriteTxn
from imgsvc.base.metadb.pagecheck import damage

PAGE = 4096
TABLES = ("images", "content", "snapshots")


def fill(txn: WriteTxn) -> None:
    for number in range(600):
        txn.put("images", f"{number:080}", {"x": "y" * 200})
    txn.put("content", "large", {"x": "y" * 20_000})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with branch pages, large values and a free list."""
    path = tmp_path_factory.mktemp("sound")
    db = MetaDB(path, sync=False)
    for _ in range(3):
        db.write(fill)
    db.write(lambda txn: [txn.delete("images", f"{n:080}") for n in range(100, 200)])
    db.close()
    return (path / "data.mdb").read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.mdb"


def pages(data: bytes) -> list[bytes]:
    return [data[at : at + PAGE] for at in range(0, len(data), PAGE)]


def test_a_sound_file_an_empty_one_and_none_are_sound(sound: bytes, path: Path) -> None:
    assert damage(path) == ""
    path.touch()
    assert damage(path) == ""
    path.write_bytes(sound)
    assert damage(path) == ""


@pytest.mark.parametrize("other", [bytes(PAGE), random.Random(1).randbytes(PAGE)], ids=["zeros", "noise"])
def test_c_d4_every_page_that_is_lost_is_missed_or_was_not_in_use(sound: bytes, path: Path, other: bytes) -> None:
    found = 0
    for number in range(len(pages(sound))):
        path.write_bytes(sound[: number * PAGE] + other + sound[(number + 1) * PAGE :])
        if damage(path):
            found += 1
            with pytest.raises(DataLoss, match="fsck --repair"):
                MetaDB(path.parent, sync=False)
            continue
        db = MetaDB(path.parent, sync=False)
        with db.read() as view:
            assert len(list(view.items("images"))) == 500
        db.close()
    assert found > 20


def test_c_d4_a_file_cut_at_any_page_is_found(sound: bytes, path: Path) -> None:
    for number in range(1, len(pages(sound))):
        path.write_bytes(sound[: number * PAGE])
        assert damage(path), number


def test_c_d4_pages_in_each_others_place_are_found(sound: bytes, path: Path) -> None:
    mixed = pages(sound)
    in_use = []
    for number in range(2, len(mixed)):
        path.write_bytes(b"".join([*mixed[:number], bytes(PAGE), *mixed[number + 1 :]]))
        if damage(path):
            in_use.append(number)
    mixed[in_use[0]], mixed[in_use[-1]] = mixed[in_use[-1]], mixed[in_use[0]]
    path.write_bytes(b"".join(mixed))
    assert "is not what it should be" in damage(path)


def test_c_d4_a_free_list_that_names_a_page_in_use_is_found(sound: bytes, path: Path) -> None:
    metas = [struct.unpack_from("<QQ", sound, at + 40 + 96) for at in (0, PAGE)]
    newest = PAGE if metas[1][1] > metas[0][1] else 0
    free, main = (struct.unpack_from("<Q", sound, newest + 40 + at + 40)[0] for at in (0, 48))
    data = bytearray(sound)
    node = free * PAGE + struct.unpack_from("<H", sound, free * PAGE + 16)[0]
    struct.pack_into("<Q", data, node + 8 + 8 + 8, main)  # its first page number, behind node header, key and count
    path.write_bytes(data)
    assert damage(path) == f"page {main} is used twice"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_written_is_sound(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    db = MetaDB(path.parent, sync=False)

    def change(txn: WriteTxn) -> None:
        table = chance.choice(TABLES)
        for key in chance.sample(range(300), chance.choice([1, 20, 200])):
            if chance.random() < 0.6:
                txn.put(table, str(key), {"x": "y" * chance.choice([10, 300, 3000, 30_000])})
            else:
                txn.delete(table, str(key))
        if chance.random() < 0.1:
            raise ValueError

    for _ in range(20):
        waiting = [db.submit(change) for _ in range(chance.choice([1, 4]))]
        for future in waiting:
            future.exception()
        assert damage(path) == ""
    db.close()
