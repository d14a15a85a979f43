"""Odd layers that other engines take, laid down in every way there is; what they come to depends on the image alone."""

from __future__ import annotations

from typing import Any, Final

import pytest
import zstandard

from imgsvc.base import kernel
from imgsvc.base.errors import DataLoss, InvalidArgument
from imgsvc.snapshot.mount import mount_all
from tests.snapshot.bench import PLAIN, Bench
from tests.snapshot.conftest import bench
from tests.snapshot.layers import END, Entry, directory, gz, link, padded, pax_block, raw_header, record, symlink, tar
from tests.snapshot.test_equality import WAYS, laid
from tests.snapshot.trees import read_tree

__all__ = ["bench"]
pytestmark = pytest.mark.root
IMPLIED: Final = (0, 0)


def everywhere(bench: Bench, *layers: bytes) -> dict[str, Any]:
    """The tree of some layers, times of all directories included; the same in all ways."""
    trees = {way: laid(bench, layers, way) for way in WAYS}
    first = trees[WAYS[0]]
    assert {way: tree for way, tree in trees.items() if tree != first} == {}
    return first


def unpacked(bench: Bench, blob: bytes, plain: bytes, media_type: str) -> dict[str, Any]:
    """The tree of one blob under a media type."""
    from imgsvc.base.oci import Digest
    from imgsvc.snapshot.interfaces import Name

    async def work() -> Name:
        key = bench.key()
        mounts = bench.native.prepare(key, None)
        try:
            applied, settle = await bench.apply(blob, mounts, rebase=False, diff_id=Digest.of(plain), media_type=media_type)
        except BaseException:
            bench.native.remove(key)
            raise
        assert applied.diff_id == Digest.of(plain)
        await settle([])
        bench.native.commit(Name(f"name-{key}"), key)
        return Name(f"name-{key}")

    with bench.shown(bench.native, bench.run(work)) as root:
        return read_tree(root)


FILE: Final = tar([Entry("file", data=b"text")])
BLOBS: Final = {"tar": FILE, "gzip": gz(FILE), "zstd": zstandard.ZstdCompressor().compress(FILE), "empty tar": END}


@pytest.mark.parametrize("suffix", ["", "+gzip", "+zstd", ".gzip"])
@pytest.mark.parametrize("kind", BLOBS)
def test_P14_the_bytes_say_how_a_layer_is_compressed(bench: Bench, kind: str, suffix: str) -> None:
    plain = END if kind == "empty tar" else FILE
    assert ("file" in unpacked(bench, BLOBS[kind], plain, PLAIN + suffix)) is (kind != "empty tar")


def test_P14_a_blob_without_a_byte_is_an_empty_layer(bench: Bench) -> None:
    assert unpacked(bench, b"", b"", PLAIN + "+gzip").keys() == {".", ""}


def test_P14_what_is_neither_compressed_nor_a_tar_is_refused_by_its_label(bench: Bench) -> None:
    for blob in (b"garbage" * 1000, b"x", FILE[:100]):
        with pytest.raises(DataLoss, match="neither"):
            unpacked(bench, blob, blob, PLAIN + "+gzip")


def test_P15_what_aufs_kept_for_itself_is_left_out_and_its_links_work(bench: Bench) -> None:
    aufs = [
        directory("./.wh..wh.plnk", 0o700),
        Entry("./.wh..wh.plnk/200.300", data=b"linked", mode=0o4755, uid=7),
        Entry(".wh..wh.plnk/201.300", data=b"not linked"),
        directory(".wh..wh.plnk/sub"),
        Entry(".wh..wh.plnk/sub/x"),
        symlink(".wh..wh.plnk/link", "/etc"),
        Entry(".wh..wh.aufs", mode=0o444),
        directory(".wh..wh.orph", 0o700),
        Entry(".wh..wh.orph/1"),
        directory("bin"),
        link("bin/one", ".wh..wh.plnk/200.300"),
        directory(".wh..wh.plnk/late"),
        link("bin/two", "./.wh..wh.plnk/200.300"),
        link("three", "/.wh..wh.plnk/200.300"),
    ]
    found = everywhere(bench, tar([Entry("below", data=b"1")]), tar(aufs))
    assert found.keys() == {".", "", "below", "bin", "bin/one", "bin/two", "three"}
    assert found[""] == [["bin/one", "bin/two", "three"]]
    mode, uid, *_ = found["three"]
    assert (mode, uid) == ("0o104755", 7)
    for way in WAYS:
        with pytest.raises(InvalidArgument):
            laid(bench, [tar([link("a", ".wh..wh.plnk/1.2")])], way)


def test_P15_nothing_of_it_is_counted(bench: Bench) -> None:
    plain = [Entry("a", data=b"a" * 5000), link("b", "a")]
    aufs = [
        Entry(".wh..wh.plnk/1", data=b"a" * 5000),
        Entry(".wh..wh.plnk/2", data=b"x" * 9000),
        link("a", ".wh..wh.plnk/1"),
        link("b", "a"),
    ]
    (wanted,), (found,) = bench.beside([tar(plain)])[1], bench.beside([tar(aufs)])[1]
    assert found == wanted


def test_P21_directories_without_an_entry_have_the_same_time_everywhere(bench: Bench) -> None:
    layers = [
        tar([Entry("a/b/file"), directory("c"), Entry("c/file")]),
        tar([Entry("a/other"), Entry("a/new/x"), Entry(".wh.c"), Entry("c/again/y"), Entry("gone/.wh.nothing")]),
        tar([Entry("a/.wh..wh..opq"), Entry("a/b/z")]),
    ]
    found = everywhere(bench, *layers)
    times = {path: facts[3] for path, facts in found.items() if path and facts[0].startswith("0o4")}
    assert times == dict.fromkeys([".", "a", "a/b", "c", "c/again"], 0)
    assert everywhere(bench, tar([directory("./"), Entry("a/file")]), tar([Entry("a/more")]))["a"][3] == 0


def test_P21_a_container_sees_the_root_of_its_image(bench: Bench) -> None:
    """Also the one that it may write to: mode, owner, time and xattrs of the image's own root."""
    layer = tar([directory("./", 0o750, uid=5, gid=6, xattrs={"user.note": b"x"}), Entry("file")])
    roots = []
    for snapshotter in (bench.overlay, bench.native):
        name = bench.in_order(snapshotter, [layer, tar([Entry("other")])])
        key, place = bench.key(), bench.root / "container"
        place.mkdir()
        mount_all(snapshotter.prepare(key, name), str(place))
        try:
            roots.append(read_tree(place)["."])
        finally:
            kernel.umount(place)
            place.rmdir()
            snapshotter.remove(key)
    assert roots[0] == roots[1]
    assert roots[0][:3] == ("0o40750", 5, 6)
    assert roots[0][3] == 1_600_000_000_250_000_000


def test_P22_numbers_with_a_plus_sign_are_taken(bench: Bench) -> None:
    records = record(b"uid", b"+10") + record(b"gid", b"+020") + record(b"mtime", b"+1.5") + record(b"size", b"+4")
    found = everywhere(bench, pax_block(records) + raw_header(b"file", 4) + padded(b"text") + END)
    assert found["file"][1:5] == (10, 20, 1_500_000_000, 4)


@pytest.mark.parametrize("value", [b"-1", b"++1", b"+", b"+-1", b"1_0", b" 1", b"0x1"], ids=bytes.decode)
def test_P22_other_spellings_of_numbers_are_refused(bench: Bench, value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        laid(bench, [pax_block(record(b"uid", value)) + raw_header(b"file") + END], "native")


@pytest.mark.parametrize("rest", [END, b""], ids=["end", "nothing"])
def test_P22_a_header_about_an_entry_that_does_not_come_changes_nothing(bench: Bench, rest: bytes) -> None:
    layer = raw_header(b"file") + pax_block(record(b"path", b"never")) + rest
    assert everywhere(bench, layer).keys() == {".", "", "file"}


def test_P22_labels_of_the_hosts_policy_are_not_an_images_to_set(bench: Bench) -> None:
    layer = tar([Entry("file", xattrs={"security.selinux": b"system_u:object_r:shadow_t:s0\0", "user.kept": b"1"})])
    assert everywhere(bench, layer)["file"][6] == {"user.kept": b"1"}


@pytest.mark.parametrize("value", [b"0" * 30 + b"7", b"+0000007", b"7"], ids=bytes.decode)
def test_P22_zeros_in_front_of_numbers_change_nothing(bench: Bench, value: bytes) -> None:
    layer = pax_block(record(b"uid", value) + record(b"mtime", value)) + raw_header(b"file") + END
    assert laid(bench, [layer], "native")["file"][1:4] == (7, 0, 7_000_000_000)


@pytest.mark.parametrize("key, value", [(b"path", b"a\0b"), (b"linkpath", b"\0"), (b"SCHILY.xattr.user.a\0b", b"1")], ids=repr)
def test_P22_names_with_a_nul_byte_are_refused_and_values_may_have_one(bench: Bench, key: bytes, value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        laid(bench, [pax_block(record(key, value)) + raw_header(b"file") + END], "native")
    good = pax_block(record(b"SCHILY.xattr.user.a", b"a\0b")) + raw_header(b"file") + END
    assert laid(bench, [good], "native")["file"][6] == {"user.a": b"a\0b"}


def test_P22_nothing_is_left_out_after_a_lone_zero_block(bench: Bench) -> None:
    with pytest.raises(InvalidArgument, match="lone zero block"):
        laid(bench, [raw_header(b"one") + bytes(512) + raw_header(b"two") + END], "native")
    for end in (b"", bytes(512), bytes(1024), bytes(1024) + b"padding" * 200, bytes(700)):
        assert "one" in laid(bench, [raw_header(b"one") + end], "native")
