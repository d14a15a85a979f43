"""Every advisory of needs.md C1 as a test by its ID, on real workers and both ways of laying layers down."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import zstandard

from imgsvc.base.errors import DataLoss, ImgsvcError, InvalidArgument, ResourceExhausted
from imgsvc.base.oci import MIB, Digest
from imgsvc.snapshot.copying import copy_tree
from imgsvc.snapshot.interfaces import LayerInput, Limits, Name, Snapshotter
from tests.snapshot.bench import Bench
from tests.snapshot.layers import END, Entry, directory, gz, link, pax_block, raw_header, record, symlink, tar
from tests.support.swapper import LAST, Swapper
from tests.support.vigil import children, workers

pytestmark = pytest.mark.root

LIMITS = Limits(unpacked_bytes=256 * MIB, entries=20_000, ratio=200)
SENTINEL = b"do not touch"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, LIMITS)
    yield made
    made.close()


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """A directory outside every root that must look the same afterwards."""
    place = tmp_path / "sentinel"
    place.mkdir(mode=0o750)
    (place / "f").write_bytes(SENTINEL)
    (place / "f").chmod(0o640)
    before = _facts(place)
    yield place
    assert _facts(place) == before


def _facts(place: Path) -> list[tuple[str, int, int, int, int, bytes]]:
    found = []
    for path in [place, *sorted(place.rglob("*"))]:
        s = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found.append((path.name, s.st_mode, s.st_uid, s.st_nlink if path.is_file() else 0, s.st_mtime_ns, content))
    return found


WAYS = ["beside", "overlayfs", "native", "erofs"]


def unpack(bench: Bench, way: str, *layers: bytes) -> dict[str, os.stat_result]:
    """Unpack and look: path → status. Raises: whatever the worker says."""
    snapshotter = {"native": bench.native, "erofs": bench.erofs}.get(way, bench.overlay)
    makers = {"beside": lambda: bench.beside(layers)[0], "erofs": lambda: bench.streamed(layers)}
    name: Name = makers.get(way, lambda: bench.in_order(snapshotter, layers))()
    with bench.shown(snapshotter, name) as root:
        found = {}
        for here, directories, files, fd in os.fwalk(root):
            for each in directories + files:
                found[os.path.relpath(os.path.join(here, each), root)] = os.lstat(each, dir_fd=fd)
        return found


def refused_or_inside(bench: Bench, way: str, *layers: Sequence[Entry]) -> dict[str, os.stat_result] | None:
    """What was unpacked, None when the layer was refused as malformed; the sentinel fixture sees whether it escaped."""
    try:
        return unpack(bench, way, *(tar(layer) for layer in layers))
    except InvalidArgument:
        return None


@pytest.mark.parametrize("way", WAYS)
def test_c_x1_hard_link_to_a_symlink_does_not_pass_modes_on(bench: Bench, sentinel: Path, way: str) -> None:
    target = str(sentinel / "f")
    found = refused_or_inside(bench, way, [symlink("s", target), link("h", "s"), Entry("h", mode=0o777, data=b"x")])
    assert found is not None
    assert stat.S_ISREG(found["h"].st_mode)
    assert stat.S_ISLNK(found["s"].st_mode)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("depth", [1, 64])
@pytest.mark.parametrize("between", [[], [Entry("a/.wh.x")], [Entry(".wh.a")]], ids=["nothing", "whiteout inside", "whiteout of it"])
def test_c_x2_a_directory_replaced_by_a_link_is_not_remembered(
    bench: Bench, sentinel: Path, way: str, depth: int, between: list[Entry]
) -> None:
    deep = "/".join(["a", *(["d"] * (depth - 1))])
    up = "../" * 30 + str(sentinel).lstrip("/")
    layer = [directory("a"), Entry(f"{deep}/x"), *between, symlink("a", str(sentinel)), Entry(f"{deep}/y"), Entry("a/y")]
    found = refused_or_inside(bench, way, layer)
    assert found is None or any(name.endswith("/y") for name in found)
    refused_or_inside(bench, way, [directory("a"), Entry("a/x"), symlink("a", up), Entry("a/y")])
    refused_or_inside(bench, way, [directory("a"), Entry("a/x")], [symlink("a", up), Entry("a/y")], [Entry("a/z")])


def swappable(number: int) -> list[Entry]:
    """A layer whose entries all go through a directory that Swapper exchanges. number: makes the layer one of its own."""
    below = [[directory(f"a/{i}", 0o777, uid=7), Entry(f"a/{i}/f", mode=0o666, uid=7, data=b"%d" % number)] for i in range(500)]
    below += [[Entry(f"a/implied-{i}/f", mode=0o666, uid=7), link(f"a/implied-{i}/h", "a/0/f")] for i in range(100)]
    return [directory("a"), *(entry for pair in below for entry in pair), directory("a", 0o777), Entry(LAST)]


def test_c_x3_nothing_outside_changes_while_components_are_swapped(bench: Bench, sentinel: Path) -> None:
    """A helper renames a link over a directory of the tree, as fast as it can, while layers are unpacked into it."""
    layer = tar(swappable(0))

    async def unpack(driver: Snapshotter) -> None:
        key = bench.key()
        with contextlib.suppress(ImgsvcError):  # the directory it was in has become a link
            _, settle = await bench.apply(layer, driver.prepare(key, None), rebase=driver is bench.overlay)
            await settle(driver.mounts(key))
        driver.remove(key)

    async def unpack_all() -> None:
        await asyncio.gather(*map(unpack, (bench.overlay, bench.overlay, bench.native)))

    with Swapper(f"{bench.root}/*/*/fs", sentinel) as swapper:
        swapper.race(lambda: bench.run(unpack_all), 100_000)


def test_c_x3_nothing_outside_changes_while_a_snapshot_is_copied(bench: Bench, sentinel: Path) -> None:
    """As for the native snapshotter's second layer, and with directories swapped in the source and in the copy."""
    source, copies = bench.root / "one" / "0" / "fs", bench.root / "one"
    for i in range(500):
        (source / "a" / str(i)).mkdir(parents=True)
        (source / "a" / str(i) / "f").write_bytes(b"x")
    numbers = itertools.count(1)

    def copy() -> None:
        place = copies / str(next(numbers))
        (place / "fs").mkdir(parents=True)
        with contextlib.suppress(ImgsvcError):
            copy_tree(source, place / "fs")
        place.rename(bench.root / f"old-{place.name}")

    copy()
    assert len(list((bench.root / "old-1" / "fs" / "a").iterdir())) == 500
    with Swapper(f"{copies}/*/fs", sentinel) as swapper:
        swapper.race(copy, 100_000)


def test_c_x3_open_files_are_changed_by_descriptor_only(bench: Bench, tmp_path: Path) -> None:
    """No call of the worker changes owner, mode, times or attributes through a path of more than one component."""
    layer = tmp_path / "layer.tar"
    layer.write_bytes(tar([directory("a/b", xattrs={"user.a": b"1"}), Entry("a/b/c", mode=0o4755, uid=3), symlink("a/l", "b")]))
    root = tmp_path / "root"
    root.mkdir()
    program = f"""
import os
from pathlib import Path
from tests.snapshot.fuzz import extract
extract(Path({str(layer)!r}).read_bytes(), Path({str(root)!r}), in_place=False, chunk=512)
"""
    command = [
        "strace",
        "-f",
        "-o",
        str(tmp_path / "trace"),
        "-e",
        "trace=chmod,chown,lchown,utime,utimes,setxattr,lsetxattr,fchownat,fchmodat",
    ]
    try:
        done = subprocess.run([*command, sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=60)
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    assert done.returncode == 0
    trace = [line for line in (tmp_path / "trace").read_text().splitlines() if "(" in line]
    assert any("fchownat" in line for line in trace) or trace == []
    for line in trace:
        call, _, rest = line.partition("(")
        path = rest.partition('"')[2].partition('"')[0]
        assert call.split()[-1] == "fchownat", line
        assert "/" not in path, line


OUT = ["../../x", "/abs/x", "a/../../x", "./../x", "..", "a/..//../x", "//x", "x/../../../../../../etc/x"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OUT)
def test_c_x5_names_lead_nowhere_else(bench: Bench, sentinel: Path, way: str, name: str) -> None:
    refused_or_inside(bench, way, [Entry(name, data=b"x")])
    refused_or_inside(bench, way, [symlink("l", name), Entry("l/y", data=b"x")])
    refused_or_inside(bench, way, [link("h", name)])
    assert not os.path.lexists("/abs/x")
    assert not os.path.lexists("/etc/x")


@pytest.mark.parametrize(
    "block",
    [
        pax_block(record(b"path", b"a\0b")) + raw_header(b"n"),
        pax_block(record(b"path", b"n" * 4097)) + raw_header(b"n"),
        pax_block(record(b"path", b"d/" * 2100 + b"n")) + raw_header(b"n"),
        pax_block(record(b"linkpath", b"a\0b")) + raw_header(b"n", 0, b"2"),
        raw_header(b"n", 0, b"2"),
        raw_header(b"n", 0, b"1"),
        pax_block(record(b"path", b"d/" + b"n" * 256)) + raw_header(b"n"),
        raw_header(b"", 0),
    ],
    ids=["NUL", "4097", "4201 deep", "NUL in a target", "link to nothing", "hard link to nothing", "component of 256", "no name"],
)
def test_c_x5_names_that_cannot_be(bench: Bench, block: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        unpack(bench, "beside", block + END)
    assert "bad layer" in caught.value.what


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [".", "./", "/", "a/.."])
def test_c_x6_the_root_stays_a_directory(bench: Bench, sentinel: Path, way: str, name: str) -> None:
    for kind in ("symlink", "file", "fifo"):
        entries = [Entry(name, kind, link=str(sentinel)), Entry("f", data=b"x")]
        found = refused_or_inside(bench, way, entries)
        # A "file" whose name ends in a slash is how old tars write a directory, here the root itself.
        assert found is None or (kind == "file" and name.endswith("/") and set(found) == {"f"})


LINK_ESCAPES = {
    "SymlinkAbsolute": [symlink("l", "/sentinel"), Entry("l/out", data=b"x")],
    "SymlinkUpAndOut": [symlink("l", "../../../../sentinel"), Entry("l/out", data=b"x")],
    "SymlinkMultipleAbsolute": [symlink("l1", "/l2"), symlink("l2", "/sentinel"), Entry("l1/out", data=b"x")],
    "SymlinkMultipleRelative": [symlink("l1", "l2"), symlink("l2", "../../sentinel"), Entry("l1/out", data=b"x")],
    "SymlinkEmptyFile": [symlink("f", "/sentinel/f"), Entry("f", data=b"")],
    "SymlinkParentDirectory": [directory("d"), symlink("d/l", ".."), Entry("d/l/l/../../out", data=b"x")],
    "HardlinkRelative": [directory("d"), link("d/h", "../sentinel/f"), Entry("d/h", data=b"x")],
    "HardlinkDownAndOut": [directory("d"), link("d/h", "d/../../sentinel/f")],
    "HardlinkAbsolute": [link("h", "/sentinel/f"), Entry("h", mode=0o777)],
    "HardlinkRelativeLong": [link("h", "../" * 200 + "sentinel/f")],
    "HardlinkUpAndOut": [link("h", "../../../sentinel/f")],
    "HardlinkSymlinkRelative": [symlink("d", "../../sentinel"), link("h", "d/f"), Entry("h", data=b"x")],
    "HardlinkSymlinkAbsolute": [symlink("d", "/sentinel"), link("h", "d/f"), Entry("h", data=b"x")],
    "HardlinkSymlinkChmod": [symlink("s", "/sentinel/f"), link("h", "s"), link("h2", "h"), Entry("h2", mode=0o777)],
    "HardlinkSymlinkBeforeCreateTarget": [symlink("s", "/sentinel/new"), link("h", "s"), Entry("h", data=b"x")],
    "SymlinkCurrentDirectory": [symlink("c", "."), Entry("c/out", data=b"x")],
    "SymlinkLoop": [symlink("a", "b"), symlink("b", "a"), Entry("a/x", data=b"x")],
    "DirectoryOverrideSymlink": [symlink("l", "/sentinel"), directory("l"), Entry("l/out", data=b"x")],
    "DirectoryOverrideRelativeSymlink": [directory("d"), symlink("d/l", "../../sentinel"), directory("d/l"), Entry("d/l/out")],
    "SymlinkOverrideDirectory": [directory("d"), Entry("d/f"), symlink("d", "/sentinel"), Entry("d/out", data=b"x")],
    "FileSymlinkParent": [directory("d"), symlink("d/l", "/sentinel"), directory("d/l/sub"), Entry("d/l/sub/out")],
    "WhiteoutSymlink": [symlink("l", "/sentinel"), Entry(".wh.l")],
    "WhiteoutSymlinkPath": [symlink("l", "/sentinel"), Entry("l/.wh.f")],
    "WhiteoutDeadSymlinkParent": [symlink("l", "nowhere"), Entry("l/.wh.f")],
    "WhiteoutRelativePath": [directory("d"), symlink("d/l", "../../sentinel"), Entry("d/l/.wh.f")],
    "OpaqueThroughSymlink": [symlink("l", "/sentinel"), Entry("l/.wh..wh..opq")],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LINK_ESCAPES)
def test_c_x7_links_lead_nowhere_else(bench: Bench, sentinel: Path, way: str, name: str) -> None:
    entries = [_aimed(entry, sentinel) for entry in LINK_ESCAPES[name]]
    refused_or_inside(bench, way, entries)
    refused_or_inside(bench, way, *([entry] for entry in entries))  # the same, one layer each


def _aimed(entry: Entry, sentinel: Path) -> Entry:
    if entry.link.startswith("/sentinel"):
        entry = Entry(**{**vars(entry), "link": str(sentinel) + entry.link.removeprefix("/sentinel")})
    return entry


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh..", "d/.wh...", ".wh.d/x", "../.wh.x"])
def test_c_x8_whiteouts_of_nothing_are_refused(bench: Bench, way: str, name: str) -> None:
    assert refused_or_inside(bench, way, [directory("d"), Entry("d/keep"), Entry(name)]) is None


@pytest.mark.parametrize("way", WAYS)
def test_c_x8_opaque_hides_what_is_below_and_not_what_is_beside(bench: Bench, way: str) -> None:
    below = [directory("d"), Entry("d/old"), directory("d/sub"), Entry("d/sub/old"), Entry("keep")]
    above = [directory("d"), Entry("d/before"), Entry("d/.wh..wh..opq"), Entry("d/after"), Entry("d/sub/new"), Entry(".wh..wh.plnk")]
    found = refused_or_inside(bench, way, below, above)
    assert found is not None
    assert set(found) == {"d", "d/before", "d/after", "d/sub", "d/sub/new", "keep"}


@pytest.mark.parametrize("way", WAYS)
def test_c_x8_a_whiteout_can_be_any_type_of_entry(bench: Bench, way: str) -> None:
    below = [Entry("a"), Entry("b"), directory("c"), Entry("c/x")]
    found = refused_or_inside(bench, way, below, [directory(".wh.a"), symlink(".wh.b", "/etc"), Entry(".wh.c", "char", device=(1, 3))])
    assert found == {}


@pytest.mark.parametrize("way", WAYS)
def test_c_x9_overlay_attributes_do_not_come_from_layers(bench: Bench, way: str) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    xattrs = {"trusted.overlay.redirect": b"/etc", "trusted.overlay.opaque": b"y", "trusted.overlay.metacopy": b"", "trusted.other": b"1"}
    xattrs |= {"user.overlay.opaque": b"y", "user.fine": b"1", "security.capability": capability, "security.selinux": b"x:y:z:s0"}
    layers = [tar([directory("d"), Entry("d/seen")]), tar([directory("d", xattrs=xattrs), Entry("f", xattrs=xattrs, mode=0o755)])]
    snapshotter = bench.native if way == "native" else bench.overlay
    name = bench.beside(layers)[0] if way == "beside" else bench.in_order(snapshotter, layers)
    with bench.shown(snapshotter, name) as root:
        assert os.path.lexists(root / "d/seen")
        assert set(os.listxattr(root / "f")) == {"user.fine", "security.capability"}
        assert os.getxattr(root / "f", "security.capability") == capability
    for upper in bench.root.glob(f"{snapshotter.name}/*/fs/[df]"):
        assert not [n for n in os.listxattr(upper) if ".overlay." in n and n != "trusted.overlay.origin"]


def test_c_x9_a_device_that_means_whiteout_is_left_out(bench: Bench) -> None:
    layers = [tar([Entry("f", data=b"below")]), tar([Entry("f", "char", device=(0, 0))])]
    assert set(unpack(bench, "beside", *layers)) == {"f"}


def _sparse_bomb() -> bytes:
    records = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0") + record(b"GNU.sparse.realsize", b"9")
    return pax_block(records) + raw_header(b"s", 8 * MIB) + b"1000000000\n" + b"1\n" * (4 * MIB - 6)


HEADER_BOMBS: dict[str, Callable[[], bytes]] = {
    "sparse map of 10^9 entries": _sparse_bomb,
    "PAX header of 8 GiB": lambda: raw_header(b"pax", 8 * 1024**3 - 1, b"x") + bytes(64 * 1024),
    "10^6 PAX keys": lambda: pax_block(b"".join(record(b"k%d" % i, b"") for i in range(60_000))) + raw_header(b"f"),
    "10^6 PAX headers": lambda: pax_block(record(b"a", b"b")) * 1000 + raw_header(b"f"),
    "long name of 8 GiB": lambda: raw_header(b"long", 8 * 1024**3 - 1, b"L") + bytes(64 * 1024),
    "old sparse without end": lambda: raw_header(b"s", 0, b"S", sparse=bytes(96) + b"\x01" + b"%011o\0" % 9) + (_extension() * 9000),
}


def _extension() -> bytes:
    return (b"%011o\0%011o\0" % (0, 0)) * 21 + b"\x01" + bytes(7)


@pytest.mark.parametrize("name", HEADER_BOMBS)
def test_c_x10_headers_that_promise_too_much(bench: Bench, name: str) -> None:
    layer = HEADER_BOMBS[name]()
    started = time.monotonic()
    with pytest.raises((InvalidArgument, ResourceExhausted)):
        unpack(bench, "beside", layer)
    assert time.monotonic() - started < 30


def test_c_x10_a_size_beyond_the_layer_is_an_error(bench: Bench) -> None:
    with pytest.raises(DataLoss):
        unpack(bench, "beside", raw_header(b"f", 100_000) + b"short" + bytes(507))
    with pytest.raises(ResourceExhausted):
        unpack(bench, "beside", raw_header(b"f", size=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7) + b"short")


def test_c_x11_a_path_longer_than_path_max_through_links(bench: Bench, sentinel: Path) -> None:
    """Links whose expansion exceeds PATH_MAX made realpath() stop early and a filter believe it (CVE-2025-4517)."""
    component = "d" * 247
    entries: list[Entry] = []
    path = ""
    for step in "abcdefghijklmnop":
        entries += [directory(f"{path}{component}"), symlink(f"{path}{step}", component)]
        path += component + "/"
    chain = "/".join("abcdefghijklmnop")
    entries += [symlink(f"{chain}/{'l' * 254}", "../" * 16), symlink("escape", f"{chain}/{'l' * 254}/../../../.." + str(sentinel))]
    entries += [link("flaglink", "escape/f"), Entry("flaglink", data=b"x"), Entry("escape/new", data=b"x")]
    for way in WAYS:
        refused_or_inside(bench, way, entries)


@pytest.mark.parametrize("field", ["size", "uid", "mtime", "mode"])
@pytest.mark.parametrize("value", [b"-0000000007\0", b"\xff" * 12, b"\x80\x7f" + b"\xff" * 10, b"7_7", b"9999999", b"0x77"])
def test_c_x11_numbers_that_are_none(bench: Bench, field: str, value: bytes) -> None:
    block = raw_header(b"f", **{field: value})
    started = time.monotonic()
    if field == "mtime" and value == b"\xff" * 12:
        assert unpack(bench, "beside", block + END)["f"].st_mtime == -1  # a second before the epoch is a time
        return
    with pytest.raises((InvalidArgument, ResourceExhausted)):
        unpack(bench, "beside", block + END)
    assert time.monotonic() - started < 30


def _zeros(size: int) -> bytes:
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    out = [packer.compress(bytes(MIB)) for _ in range(size // MIB)]
    return b"".join(out) + packer.flush()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip": (lambda: gz(raw_header(b"f", 255 * MIB) + bytes(255 * MIB)), "times its size"),
    "zstd": (lambda: _zeros(300 * MIB), "times its size"),
    "large": (lambda: raw_header(b"f", 250 * MIB) + bytes(300 * MIB), "unpacks to more than"),
    "entries": (lambda: gz(raw_header(b"f") * 21_000), "entries"),
    "one file": (lambda: raw_header(b"f", 300 * MIB), "a file of"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_c_x12_bombs_stop_at_a_limit_that_the_error_names(bench: Bench, name: str) -> None:
    make, said = BOMBS[name]
    with pytest.raises(ResourceExhausted) as caught:
        unpack(bench, "beside", make())
    assert said in caught.value.what
    assert "limit" in caught.value.hint


def test_c_x12_nested_gzip_and_wide_windows_are_refused(bench: Bench) -> None:
    with pytest.raises((InvalidArgument, DataLoss)):
        unpack(bench, "beside", gz(gz(tar([Entry("f")]))))
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, strategy=1)
    ).compressobj()
    data = wide.compress(os.urandom(MIB)) + wide.flush()
    with pytest.raises(DataLoss) as caught:
        unpack(bench, "beside", data)
    assert "zstd" in caught.value.what


WHOLE = tar([Entry("f", data=os.urandom(50_000))])
BROKEN = {
    "truncated gzip": gz(WHOLE)[:-3000],
    "gzip without trailer": gz(WHOLE)[:-8],
    "wrong CRC": gz(WHOLE)[:-8] + bytes(4) + gz(WHOLE)[-4:],
    "garbage after gzip": gz(WHOLE) + b"garbage!" * 100,
    "truncated zstd": zstandard.ZstdCompressor().compress(WHOLE)[:-3000],
    "truncated tar": WHOLE[:20_000],
    "not compressed as said": b"garbage!" * 1000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_c_x13_broken_streams_are_errors_and_the_next_layer_works(bench: Bench, name: str) -> None:
    layer = BROKEN[name]
    started = time.monotonic()
    with pytest.raises((DataLoss, InvalidArgument)):
        bench.run(
            lambda: bench.apply(
                layer, bench.overlay.prepare(bench.key(), None), rebase=True, media_type="x.tar+gzip", diff_id=Digest.of(WHOLE)
            )
        )
    assert time.monotonic() - started < 30
    assert set(unpack(bench, "beside", WHOLE)) == {"f"}


def test_c_x13_unusual_but_valid_streams_work(bench: Bench) -> None:
    without_end = WHOLE[: -len(WHOLE) % 10240 or None].rstrip(b"\0")
    without_end += bytes(-len(without_end) % 512)
    without_padding = tar([Entry("f", data=b"x" * 700)]).rstrip(b"\0")  # as `umoci insert` writes them
    padded_gzip = gz(WHOLE) + bytes(700)
    members = gz(WHOLE[:1000]) + gz(WHOLE[1000:]) + gz(b"")
    frames = (
        zstandard.ZstdCompressor().compress(WHOLE[:1000])
        + b"\x50\x2a\x4d\x18\x04\0\0\0skip"
        + zstandard.ZstdCompressor().compress(WHOLE[1000:])
    )

    async def one(blob: bytes, plain: bytes) -> None:
        applied, _ = await bench.apply(blob, bench.overlay.prepare(bench.key(), None), rebase=True, diff_id=Digest.of(plain))
        assert applied.entries == 1

    for blob, plain in (
        (without_end, without_end),
        (without_padding, without_padding),
        (padded_gzip, WHOLE),
        (members, WHOLE),
        (frames, WHOLE),
    ):
        bench.run(lambda blob=blob, plain=plain: one(blob, plain))  # type: ignore[misc]


def test_c_x14_nothing_of_a_layer_is_executed_or_loaded(bench: Bench) -> None:
    """The worker never changes its root, so libraries, modules and name services of a layer stay data."""
    hostile = ["lib/libnss_files.so.2", "etc/ld.so.preload", "etc/nsswitch.conf", "usr/lib/python3/encodings/idna.py"]
    bench.run(
        lambda: bench.apply(tar([Entry(name, data=b"\x7fELF") for name in hostile]), bench.overlay.prepare(bench.key(), None), rebase=True)
    )
    key = bench.key()
    with _held_job(bench, tar([Entry("f")]), key) as pid:
        assert os.readlink(f"/proc/{pid}/root") == "/"
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert str(bench.root) not in maps


def test_c_x15_a_wrong_diff_id_is_data_loss(bench: Bench) -> None:
    other = Digest.of(b"other")
    with pytest.raises(DataLoss) as caught:
        bench.run(lambda: bench.apply(WHOLE, bench.overlay.prepare(bench.key(), None), rebase=True, diff_id=other))
    assert str(other) in caught.value.what
    assert str(Digest.of(WHOLE)) in caught.value.where


def test_c_x15_a_blob_shorter_than_its_descriptor_is_data_loss_and_a_longer_one_is_not_read(bench: Bench, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(WHOLE + b"more")

    async def work(size: int, diff_id: Digest) -> int:
        fd = os.open(blob, os.O_RDONLY)
        try:
            layer = LayerInput("x.tar", Digest.of(WHOLE), diff_id, fd, size)
            job = await bench.unpacker.start(layer, bench.overlay.prepare(bench.key(), None), rebase=True)
            try:
                job.advance(size)
                return (await job.finish()).unpacked
            finally:
                await job.abort()
        finally:
            os.close(fd)

    assert bench.run(lambda: work(len(WHOLE), Digest.of(WHOLE))) == len(WHOLE)
    with pytest.raises(DataLoss):
        bench.run(lambda: work(len(WHOLE) + 100, Digest.of(WHOLE)))


@pytest.mark.parametrize("way", WAYS)
def test_c_x16_nodes_are_created_and_never_opened(bench: Bench, way: str) -> None:
    first = [Entry("mem", "char", device=(1, 1), mode=0o640), Entry("pipe", "fifo"), Entry("suid", mode=0o4755, data=b"s" * 9)]
    found = refused_or_inside(bench, way, first, [Entry("pipe", data=b"now a file"), Entry("mem", data=b"too")])
    assert found is not None
    assert stat.S_ISREG(found["pipe"].st_mode)
    assert stat.S_ISREG(found["mem"].st_mode)
    assert found["suid"].st_mode & 0o7777 == 0o4755
    kept = refused_or_inside(bench, way, first)
    assert kept is not None
    assert stat.S_ISCHR(kept["mem"].st_mode)
    assert kept["mem"].st_rdev == os.makedev(1, 1)


def test_c_x17_no_other_user_gets_below_the_store(bench: Bench) -> None:
    unpack(bench, "beside", tar([Entry("suid", mode=0o4755)]))
    for driver in ("overlayfs", "native"):
        root = bench.root / driver
        assert root.stat().st_mode & 0o777 == 0o700
        for inside in root.iterdir():
            assert inside.stat().st_mode & 0o077 == 0, inside


class _held_job:  # noqa: N801  # used as a context manager only
    """A worker that is waiting for its layer's bytes; gives its process ID."""

    def __init__(self, bench: Bench, layer: bytes, key: str) -> None:
        self._bench = bench
        self._layer = layer
        self._key = key

    def __enter__(self) -> int:
        return self._bench.run(self._start)

    async def _start(self) -> int:
        before = set(workers(os.getpid()))
        fd = os.memfd_create("layer")
        os.write(fd, self._layer)
        layer = LayerInput("x.tar", Digest.of(self._layer), Digest.of(self._layer), fd, len(self._layer))
        self._job = await self._bench.unpacker.start(layer, self._bench.overlay.prepare(self._key, None), rebase=True)  # type: ignore[arg-type]
        os.close(fd)
        (pid,) = set(workers(os.getpid())) - before
        while "skb" not in Path(f"/proc/{pid}/wchan").read_text():  # noqa: ASYNC110  # another process, it waits for its bytes then
            await asyncio.sleep(0.01)
        return pid

    def __exit__(self, *_: object) -> None:
        self._bench.run(self._job.abort)


def test_workers_drop_what_they_do_not_need(bench: Bench) -> None:
    with _held_job(bench, tar([Entry("f")]), bench.key()) as pid:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31
        assert status["NoNewPrivs"] == "1"
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        assert Path(f"/proc/{pid}/environ").read_bytes() == b""
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= 500
        assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        files = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert not os.path.samefile(f"/proc/{pid}/root", "/")
        files.discard("/")  # a mount of its snapshot that is nowhere
        assert not [
            f for f in files if f.startswith("/") and not f.startswith(("/dev/null", "/memfd:", str(bench.root), "/tmp", "/dev/pts"))
        ]


def test_a_killed_worker_is_an_error_and_leaves_nothing_running(bench: Bench) -> None:
    with _held_job(bench, tar([Entry("f")]), bench.key()) as pid:
        os.kill(pid, 9)
    assert not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text()
    assert set(unpack(bench, "beside", WHOLE)) == {"f"}


def test_a_killed_server_is_started_again(bench: Bench) -> None:
    assert set(unpack(bench, "beside", WHOLE)) == {"f"}
    for server in children(os.getpid()):
        if b"unpack_worker" in Path(f"/proc/{server}/cmdline").read_bytes():
            os.kill(server, 9)
            while "zombie" not in Path(f"/proc/{server}/status").read_text():
                time.sleep(0.01)
    assert set(unpack(bench, "beside", WHOLE)) == {"f"}


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=True)
    try:
        bench = Bench(small, LIMITS)
        key = bench.key()
        with pytest.raises(ResourceExhausted) as caught:
            bench.run(
                lambda: bench.apply(gzip.compress(tar([Entry("f", data=b"x" * 4 * MIB)]), 1), bench.overlay.prepare(key, None), rebase=True)
            )
        assert "No space left" in str(caught.value)
        bench.overlay.remove(key)
        bench.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
