"""EROFS images of what tar streams seldom have, and of what no stream has, against the files that other drivers lay down."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgsvc.base import kernel
from imgsvc.base.errors import DataLoss, InvalidArgument, NotFound
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import MIB
from imgsvc.base.removal import unmount_below
from imgsvc.snapshot.erofs.build import OpenLayer, build_image
from imgsvc.snapshot.erofs.driver import ErofsSnapshotter
from imgsvc.snapshot.erofs.image import write_image
from imgsvc.snapshot.erofs.index import Record
from imgsvc.snapshot.erofs.merge import FileTree
from imgsvc.snapshot.interfaces import Key, Name
from imgsvc.snapshot.unpack.tarheader import BadLayer
from tests.snapshot import fuzz, fuzz_erofs
from tests.snapshot.bench import Bench
from tests.snapshot.layers import END, Entry, directory, link, padded, pax_block, raw_header, record, tar

pytestmark = pytest.mark.root


@pytest.fixture(params=["file", "loop device"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where images lie: on a file system that EROFS mounts files of, and on one it needs loop devices for."""
    if request.param == "file":
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            yield Path(directory)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def same(layers: Sequence[bytes], place: Path) -> dict[str, object]:
    """What the kernel shows of layers, which is what the other drivers lay down."""
    assert not fuzz_erofs.write_image(layers, place, random.Random(0))
    found = fuzz_erofs.read_image(len(layers), place)
    assert found == fuzz_erofs.model(layers, place / "model")
    return found


def sparse(size: int, parts: Sequence[tuple[int, bytes]], name: bytes = b"sparse") -> bytes:
    """A sparse file in PAX format 1.0."""
    numbers = [len(parts), *(number for at, data in parts for number in (at, len(data)))]
    packed = padded(b"".join(b"%d\n" % number for number in numbers)) + b"".join(data for _, data in parts)
    facts = [(b"major", b"1"), (b"minor", b"0"), (b"name", name), (b"realsize", b"%d" % size)]
    records = b"".join(record(b"GNU.sparse." + key, value) for key, value in facts)
    return pax_block(records) + raw_header(b"x", len(packed)) + padded(packed)


def test_sparse_files(place: Path) -> None:
    some = [(1000, b"a" * 3000), (9000, b"b"), (3 * MIB - 5, b"c" * 5)]
    stream = sparse(3 * MIB, some, b"some") + sparse(5, [(0, b"whole")], b"whole") + sparse(70_000, [], b"none") + sparse(0, [], b"empty")
    found = same([tar([Entry("below", data=b"x" * 700)]), stream + raw_header(b"next", 3) + padded(b"abc") + END], place)
    assert found.keys() >= {"some", "whole", "none", "empty", "next"}


def test_a_huge_sparse_file(tmp_path: Path) -> None:
    assert not fuzz_erofs.write_image([sparse(1 << 43, [(0, b"start"), ((1 << 43) - 3, b"end")]) + END], tmp_path, random.Random(0))
    with fuzz_erofs.mounted(1, tmp_path) as root, (root / "sparse").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == 1 << 43
        assert file.read(5) == b"start"
        file.seek(-4096, os.SEEK_END)
        assert file.read() == bytes(4093) + b"end"
    assert (tmp_path / "image").stat().st_size < 40 * MIB


@pytest.mark.parametrize(
    "stream",
    [sparse(2**63 - 1, [(0, b"x")]), b"".join(sparse(1 << 43, [(i << 30, b"x") for i in range(99)], b"%d" % n) for n in range(99))],
    ids=["too large", "too scattered"],
)
def test_sparse_files_that_take_too_much_are_refused(stream: bytes, tmp_path: Path) -> None:
    assert "sparse" in fuzz_erofs.write_image([stream + END], tmp_path, random.Random(0))


@pytest.mark.parametrize("size", [1, 511, 513, 5000])
def test_a_stream_that_ends_within_a_block(place: Path, size: int) -> None:
    same([raw_header(b"first", 600) + padded(b"1" * 600) + raw_header(b"last", size) + b"l" * size, tar([Entry("above")])], place)


def test_an_empty_layer(place: Path) -> None:
    same([END, tar([Entry("file", data=b"x")]), END], place)


def test_links_into_what_aufs_kept_for_itself(place: Path) -> None:
    base = [directory(".wh..wh.plnk"), Entry(".wh..wh.plnk/1.2", data=b"x"), Entry(".wh..wh.plnk/3.4"), Entry(".wh..wh.aufs")]
    found = same([tar([*base, link("one", ".wh..wh.plnk/1.2"), link("two", ".wh..wh.plnk/1.2")]), tar([Entry("above")])], place)
    assert found[""] == [["one", "two"]]
    refused = fuzz_erofs.write_image([tar(base), tar([link("one", ".wh..wh.plnk/1.2")])], place, random.Random(0))
    assert "does not exist" in refused


def test_many_layers(place: Path) -> None:
    layers = [[Entry(f"file-{number}", data=b"%d" % number), Entry("all", data=b"%d" % number)] for number in range(150)]
    layers += [[Entry(f".wh.file-{number}")] for number in range(100, 130)]
    assert len(same([tar(layer) for layer in layers], place)) == 150 - 30 + 3


def test_names_and_times_at_their_limits(tmp_path: Path) -> None:
    times = [0.0, -(2.0**31), -1.5, 2.0**31, 2.0**33]
    entries = [directory("d"), *(Entry(f"d/{number:03}" + "n" * 252, mtime=times[number % 5]) for number in range(300))]
    same([tar([*entries, Entry("d/" + "/".join("p" * 200 for _ in range(15)), data=b"deep")])], tmp_path)


@pytest.mark.parametrize("facts", [{b"path": b"p" * 70_000}, {b"linkpath": b"l" * 70_000}, {b"path": b"n" * 256}])
def test_names_beyond_their_limits_are_refused(tmp_path: Path, facts: dict[bytes, bytes]) -> None:
    records = b"".join(record(key, value) for key, value in facts.items())
    stream = pax_block(records) + raw_header(b"x", 0, b"2", link=b"t") + END
    assert "beyond" in fuzz_erofs.write_image([stream], tmp_path, random.Random(0))


def test_an_xattr_whose_name_none_can_have_is_left_out(tmp_path: Path) -> None:
    stream = pax_block(record(b"SCHILY.xattr.user." + b"n" * 70_000, b"v")) + raw_header(b"x") + END
    same([stream], tmp_path)


def test_a_directory_of_very_many_files(tmp_path: Path) -> None:
    stream = b"".join(raw_header(b"large/%d" % number) for number in range(20_000)) + END
    assert not fuzz_erofs.write_image([stream], tmp_path, random.Random(0))
    with fuzz_erofs.mounted(1, tmp_path) as root:
        assert sorted(os.listdir(root / "large")) == sorted(map(str, range(20_000)))
        assert all((root / "large" / str(number)).is_file() for number in range(0, 20_000, 997))


def test_as_many_layers_as_hide_one_another(place: Path) -> None:
    source = random.Random(3)
    layers = []
    for _ in range(30):
        layer = [Entry(f"d{source.randrange(4)}/f{source.randrange(20)}", data=source.randbytes(source.randrange(900))) for _ in range(8)]
        layer += [Entry(source.choice([f"d{source.randrange(4)}/.wh.f{source.randrange(20)}", f".wh.d{source.randrange(4)}"]))]
        layers.append(tar([*layer, *([Entry("d1/.wh..wh..opq")] if source.random() < 0.2 else [])]))
    same(layers, place)


LIES: dict[str, dict[str, object]] = {
    "data beyond the stream": {"data": 1 << 40},
    "size beyond the stream": {"size": 2**64 - 1},
    "sparse out of order": {"sparse": [(3, 1), (0, 1)]},
    "sparse beyond the end": {"sparse": [(0, 2**63)]},
    "sparse without data": {"sparse": [(2**62, 5)], "size": 2**63},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_is_not_believed(lie: str) -> None:
    """A worker that was taken over could write anything into it."""
    entry = Record(ord("0"), 0o644, 0, 0, 0, 0, 0, 5, 512, b"file", b"", None, None)
    for fact, value in LIES[lie].items():
        setattr(entry, fact, value)
    tree = FileTree()
    tree.apply([entry])
    with pytest.raises((DataLoss, BadLayer)):
        write_image(tree, [2048], lambda data: None, lambda layer, offset, size: bytes(size))


def test_made_up_images_show_what_files_show(tmp_path: Path) -> None:
    layers = fuzz.seeds()
    for seed in range(15):
        fuzz_erofs.once(seed, tmp_path, None, layers)


def overwritten(image: Path) -> None:
    """Another byte in the superblock."""
    with image.open("r+b") as stream:
        stream.seek(1050)
        stream.write(b"\xff")


@pytest.mark.parametrize("damage", [lambda image: image.write_bytes(b""), lambda image: os.truncate(image, 2048), overwritten, Path.unlink])
def test_an_image_that_is_lost_or_damaged_is_made_again(bench: Bench, damage: Callable[[Path], object]) -> None:
    name = bench.streamed([tar([Entry("below", data=b"x")]), tar([Entry("file", data=b"content")])])
    with bench.shown(bench.erofs, name):
        usage = bench.erofs.total_usage()
    (image,) = (bench.root / "erofs").glob("[0-9]*/layer.erofs")
    kernel.umount(image.parent / "mnt")
    damage(image)
    with bench.shown(bench.erofs, name) as root:
        assert (root / "file").read_bytes() == b"content"
    assert bench.erofs.total_usage() == usage


def test_a_failed_image_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(InvalidArgument):
        bench.streamed([tar([Entry("file")]), tar([link("name", "nowhere")])])
    assert not list((bench.root / "erofs").glob("[0-9]*/*.erofs"))


def test_images_are_made_side_by_side(tmp_path: Path) -> None:
    """One that takes long keeps nobody else waiting; two who want the same one make it once."""
    both, builds = threading.Barrier(2, timeout=20), []

    def build(layers: Sequence[OpenLayer], output: int) -> None:
        builds.append(output)
        both.wait()
        build_image(layers, output)

    db = MetaDB(tmp_path / "db", sync=False)
    driver = ErofsSnapshotter(tmp_path / "erofs", db, build=build)
    try:
        for name in ("one", "two"):
            key = Key(f"key-{name}")
            (mount,) = driver.prepare(key, None)
            (Path(mount.source) / name).touch()
            driver.commit(Name(name), key)
        with ThreadPoolExecutor() as threads:
            list(threads.map(driver.seal, map(Name, ["one", "two", "one", "two"])))
        assert len(builds) == 2
    finally:
        driver.close()
        unmount_below(tmp_path / "erofs")
        db.close()


def test_a_removed_layer_is_not_mounted_any_more(bench: Bench) -> None:
    names = [bench.streamed([tar([Entry(f"file-{number}", data=b"x" * 5000)])]) for number in range(20)]
    with ThreadPoolExecutor(8) as threads:
        keys = [bench.key() for _ in names[:10]]
        uses = [threads.submit(bench.erofs.view, key, name) for key, name in zip(keys, names[:10], strict=True)]
        gone = [threads.submit(bench.erofs.remove, name) for name in names[10:]]
        again = [threads.submit(bench.erofs.seal, name) for name in names[10:]]
        assert all(len(future.result()) == 1 for future in uses)
        assert not any(future.exception() for future in gone)
        assert all(future.exception() is None or isinstance(future.exception(), NotFound) for future in again)
    bench.erofs.close()
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if f"{bench.root}/erofs" in line]
    assert len(mounted) == 10
    assert not list((bench.root / "erofs/trash").iterdir())
