"""Unpacked trees are what GNU tar makes of the same layers, applied in order with their whiteouts."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from imgsvc.base.errors import InvalidArgument
from tests.snapshot.bench import Bench
from tests.snapshot.layers import Entry, directory, link, symlink, tar
from tests.snapshot.trees import Reference, ReferenceFailed, read_tree

pytestmark = pytest.mark.root

# user::rwx, user:1000:rwx, group::r-x, mask::rwx, other::---  Source: linux/posix_acl_xattr.h
ACL = struct.pack("<I" + "HHI" * 5, 2, 1, 7, 2**32 - 1, 2, 7, 1000, 4, 5, 2**32 - 1, 16, 7, 2**32 - 1, 32, 0, 2**32 - 1)
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


WAYS = ("beside", "in order on overlayfs", "native", "erofs")


def compare(bench: Bench, layers: Sequence[bytes], ways: Sequence[str] = WAYS) -> None:
    """All ways of unpacking give the reference tree. Raises: ReferenceFailed."""
    with tempfile.TemporaryDirectory(dir=bench.root) as scratch:
        reference = Reference(Path(scratch) / "reference")
        for layer in layers:
            reference.apply(layer)
        unowned = frozenset(reference.unowned_times)
        expected = read_tree(reference.root, unowned_times=unowned)
        for way in ways:
            assert laid(bench, layers, way, unowned) == expected, way


def laid(bench: Bench, layers: Sequence[bytes], way: str, unowned_times: Container[str] = frozenset()) -> dict[str, Any]:
    """The tree that comes of layers in one of the WAYS."""
    snapshotter = {"native": bench.native, "erofs": bench.erofs}.get(way, bench.overlay)
    name = {"beside": lambda: bench.beside(layers)[0], "erofs": lambda: bench.streamed(layers)}.get(
        way, lambda: bench.in_order(snapshotter, layers)
    )()
    with bench.shown(snapshotter, name) as root:
        return read_tree(root, unowned_times=unowned_times)


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


EVERYTHING = _Everything()  # all directories' times


def case(*layers: Sequence[Entry]) -> list[bytes]:
    return [tar(layer) for layer in layers]


BASE = (
    directory("bin"),
    Entry("bin/sh", data=b"#!", mode=0o755),
    directory("etc", 0o750, uid=5, gid=6),
    Entry("etc/passwd", data=b"root", uid=7),
    directory("usr"),
    directory("usr/lib"),
    Entry("usr/lib/libc", data=b"c" * 5000),
    symlink("lib", "usr/lib"),
    symlink("abs", "/usr/lib"),
    directory("var"),
    directory("var/cache", 0o1777),
    Entry("var/cache/a", data=b"a"),
    Entry("var/cache/b", data=b"b"),
)

CASES = {
    "one layer": case(BASE),
    "every type": case(
        [
            directory("./"),
            Entry("suid", mode=0o4755, uid=3),
            Entry("cap", mode=0o755, uid=1, xattrs={"security.capability": CAPABILITY, "user.note": b"x"}),
            Entry("null", "char", device=(1, 3), mode=0o666, xattrs={"user.note": b"x"}),
            Entry("noted", "symlink", link="pipe", mode=0o777, xattrs={"user.note": b"x"}),
            Entry("disk", "block", device=(8, 1), mode=0o660, gid=6),
            Entry("pipe", "fifo", mode=0o2600, uid=9, xattrs={"user.note": b"x"}),
            symlink("dangling", "nowhere/at/all"),
            Entry("big", data=b"x" * 300_000),
            link("big2", "big"),
            Entry("too-large", xattrs={"user.large": b"x" * 70_000, "user." + "n" * 300: b"x", "user.fine": b"x"}),
            Entry("huge-owner", uid=3_000_000_000, gid=2_200_000),
            Entry("n" * 200, data=b"long"),
            Entry("d" * 150 + "/" + "e" * 150, data=b"longer"),
            Entry("x" * 99 + "/" + "cut", data=b"whose first 100 bytes look like a directory's name"),
            Entry("früh/ä", data=b"utf8"),
            Entry("old", mtime=-86400.5),
            directory("sticky", 0o1777, xattrs={"user.d": b"1"}),
        ]
    ),
    "implied directories keep their parents' metadata": case(BASE, [Entry("etc/group"), Entry("var/cache/c")]),
    "whiteouts": case(BASE, [Entry("etc/.wh.passwd"), Entry(".wh.bin"), Entry(".wh.nothing"), Entry("none/.wh.nothing")]),
    "opaque": case(BASE, [directory("var/cache"), Entry("var/cache/.wh..wh..opq"), Entry("var/cache/new")]),
    "opaque without an entry": case(BASE, [Entry("var/cache/new"), Entry("var/cache/.wh..wh..opq")]),
    "opaque root": case(BASE, [Entry(".wh..wh..opq"), Entry("only")]),
    "whiteout and again": case(BASE, [Entry("var/.wh.cache"), Entry("var/cache/new")]),
    "again and whiteout": case(BASE, [directory("var/cache"), Entry("var/cache/new"), Entry("var/.wh.cache")]),
    "directory becomes file": case(BASE, [Entry("var", data=b"file")]),
    "directory becomes file becomes directory": case(BASE, [Entry("var", data=b"file")], [directory("var"), Entry("var/x")]),
    "file becomes directory": case(BASE, [directory("bin/sh"), Entry("bin/sh/x")]),
    "link becomes directory": case(BASE, [directory("lib"), Entry("lib/own")]),
    "directory becomes link": case(BASE, [symlink("bin", "usr/lib")], [Entry("bin/through")]),
    "through a link below": case(BASE, [Entry("lib/new"), Entry("usr/lib/other"), Entry("etc/x")]),
    "whiteout through a link below": case(BASE, [Entry("lib/.wh.libc")]),
    "whiteouts below what took a directory's place": case(
        BASE,
        [Entry("var", data=b"file"), Entry("var/.wh.cache"), Entry("var/cache/.wh.a"), Entry("var/.wh..wh..opq")],
        [Entry("var/.wh.cache"), Entry("bin/sh/x/.wh.y"), Entry("bin/sh/.wh..wh..opq")],
    ),
    "whiteouts below a link that took a directory's place": case(
        [*BASE, Entry("bin/libc"), Entry("usr/lib/sh")],
        [symlink("bin", "usr/lib"), Entry("bin/.wh.sh"), Entry("bin/.wh.libc"), Entry("bin/none/.wh.x"), Entry("usr/lib/new")],
    ),
    "through a link of the same layer": case(BASE, [symlink("l", "var/cache"), Entry("l/new"), Entry("l/sub/new")]),
    "hard link into a lower layer": case(BASE, [link("etc/libc", "usr/lib/libc"), link("etc/libc2", "etc/libc")]),
    "hard link to a lower link": case(BASE, [link("lib2", "lib")]),
    "hard link to a group below": case([*BASE, link("bin/sh2", "bin/sh"), link("etc/sh3", "bin/sh")], [link("sh4", "bin/sh2")]),
    "hard link, then its target changes": case(BASE, [link("sh", "bin/sh"), Entry("bin/sh", data=b"new")]),
    "hard links to the same file below": case(
        [*BASE, link("var/sh", "bin/sh")],
        [link("one", "bin/sh"), link("two", "./bin/sh"), link("var/sh", "bin/sh"), link("four", "lib/libc")],
    ),
    "hard link to a FIFO with set-ID bits": case([Entry("pipe", "fifo", mode=0o6755, uid=7)], [link("too", "pipe")]),
    "hard link replaced": case(BASE, [link("sh", "bin/sh")], [Entry("sh", data=b"other")]),
    "hard link through a link below": case(BASE, [link("libc2", "lib/libc")]),
    "hard link two layers down": case(BASE, [Entry("x")], [link("sh", "bin/sh"), Entry("etc/.wh.passwd")]),
    "set-group-ID directory": case([directory("d", 0o2775, gid=50)], [Entry("d/file", gid=0, mode=0o640), Entry("d/pipe", "fifo")]),
    "metadata of a directory only": case(BASE, [directory("etc", 0o700, uid=1)], [directory("./", 0o711)]),
    "whiteout of a whole tree and a new file": case(BASE, [Entry(".wh.usr"), Entry(".wh.lib")], [Entry("usr/lib/x")]),
}


# What depends on the order of entries, which GNU tar is not told of whiteouts in.
ORDERED = {
    "hard link, then its target goes": case(
        [*BASE, link("var/sh", "bin/sh")], [link("sh", "bin/sh"), link("libc", "usr/lib/libc"), Entry(".wh.bin"), Entry("usr/.wh.lib")]
    ),
    "hard link, then everything else goes": case(BASE, [link("sh", "bin/sh"), Entry(".wh..wh..opq")]),
    "default ACL of a directory below": case(
        [directory("var"), directory("var/d", 0o750, xattrs={"system.posix_acl_default": ACL})],
        [
            Entry("var/sh", mode=0o777),
            Entry("var/d/f", mode=0o777),
            directory("var/d/e", 0o711),
            Entry("var/d/i/f"),
            Entry("var/d/p", "fifo"),
        ],
    ),
    "through a link below that becomes a directory": case(BASE, [Entry("lib/sh"), directory("lib"), link("sh", "bin/sh")]),
    "a link in the way of another link's target": case(
        [directory("b/c"), Entry("b/c/g", data=b"g"), directory("a")],
        [Entry("var/sh"), Entry("b/x"), symlink("b", "a"), link("a/f", "var/sh")],
        [Entry("b/y")],
    ),
    "through a link below that goes": case(BASE, [Entry("lib/sh"), Entry(".wh.lib"), Entry("abs/x/sh"), Entry("abs")]),
    "hard link, then a directory takes its target's place": case(BASE, [link("var/sh", "bin/sh"), directory("bin/sh"), Entry("bin/sh/x")]),
}


@pytest.mark.parametrize("name", ORDERED)
def test_both_drivers_lay_down_the_same(bench: Bench, name: str) -> None:
    found, other, image = (laid(bench, ORDERED[name], way, EVERYTHING) for way in ("beside", "native", "erofs"))
    assert found == other
    assert image == other
    assert found.keys() & {"sh", "var/sh", "usr/lib/sh"}


@pytest.mark.parametrize("target", ["bin/sh", "etc/passwd", "var/cache/a"])
@pytest.mark.parametrize("way", WAYS)
def test_a_hard_link_to_what_the_layer_has_hidden_is_refused(bench: Bench, target: str, way: str) -> None:
    hidden = [Entry(".wh.bin"), Entry("etc/.wh.passwd"), Entry("var/cache/.wh..wh..opq")]
    with pytest.raises(InvalidArgument):
        laid(bench, case(BASE, [*hidden, link("link", target)]), way)


@pytest.mark.parametrize("name", CASES)
def test_trees_equal_gnu_tar(bench: Bench, name: str) -> None:
    # Overlayfs gives a file of a lower layer a new inode for each name that is written to; settle() keeps them together.
    compare(bench, CASES[name], ("beside", "native", "erofs") if name in GROUPS else WAYS)


GROUPS = ("hard link to a group below", "hard links to the same file below")
NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
MODES = st.sampled_from([0o644, 0o755, 0o600, 0o4755, 0o2711, 0o1777, 0o000])
OWNERS = st.sampled_from([0, 1, 1000, 70000, 3_000_000])


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """One entry, whiteouts included, over few names so that layers meet each other."""
    path = draw(PATHS)
    parent, _, base = path.rpartition("/")
    prefix = parent + "/" if parent else ""
    kind = draw(st.sampled_from(["file", "file", "dir", "dir", "symlink", "link", "fifo", "whiteout", "opaque"]))
    if kind == "whiteout":
        return Entry(f"{prefix}.wh.{base}")
    if kind == "opaque":
        return Entry(f"{prefix}.wh..wh..opq")
    if kind == "symlink":
        return symlink(path, draw(st.sampled_from(["a", "b", "c", "../a", "a/b", "b/c", "nowhere"])))
    if kind == "link":
        return link(path, draw(PATHS.filter(lambda target: target != path)))
    mode, uid, gid = draw(MODES), draw(OWNERS), draw(OWNERS)
    mtime = draw(st.sampled_from([0.0, 1.5, 1_700_000_000.123456]))
    xattrs = draw(st.sampled_from([{}, {}, {"user.x": b"1"}])) if kind != "fifo" else {}
    data = draw(st.binary(max_size=600)) if kind == "file" else b""
    if kind == "dir":
        mode &= ~0o2000  # tar lets directories inherit it, against their entries; see "set-group-ID directory"
    return Entry(path, kind, data, mode=mode, uid=uid, gid=gid, mtime=mtime, xattrs=xattrs)


def unique(layer: list[Entry]) -> list[Entry]:
    """No path twice: tar's own handling of duplicates differs from an engine's in its remains."""
    seen: set[str] = set()
    return [e for e in layer if not (e.name in seen or seen.add(e.name))]  # type: ignore[func-returns-value]


IMAGES = st.lists(st.lists(entries(), min_size=1, max_size=8).map(unique), min_size=1, max_size=4)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(image=IMAGES)
def test_made_up_trees_equal_gnu_tar(bench: Bench, image: list[list[Entry]]) -> None:
    if any(entry.kind == "symlink" for layer in image for entry in layer):
        # Where a marker stands matters only for entries that come earlier and lead through a link which it hides.
        image = [sorted(layer, key=lambda entry: ".wh." not in entry.name) for layer in image]
    try:
        compare(bench, [tar(layer) for layer in image])
    except ReferenceFailed:
        event("not for GNU tar either")
        assume(False)
    except InvalidArgument:
        # A path through a lower layer's file is an error even if an entry further on hides or replaces that file.
        event("leads through a file")
        assume(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "paths", [("/etc", "/usr/sbin", "/usr/share/perl"), (sysconfig.get_path("purelib"),)], ids=["system", "site-packages"]
)
def test_real_trees_equal_gnu_tar(bench: Bench, paths: tuple[str, ...]) -> None:
    """A part of this machine's system and this interpreter's packages, then a layer that replaces and deletes in them."""
    present = [path for path in paths if os.path.isdir(path)]
    command = ["tar", "-c", "--xattrs", "--format=posix", "--pax-option=delete=atime,delete=ctime", *present]
    base = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(base)) as archive:
        names = [m.name for m in archive if m.isfile()][::50]
    changed = [Entry(name, data=b"changed") for name in names[::2]]
    deleted = [Entry(os.path.join(os.path.dirname(name), ".wh." + os.path.basename(name))) for name in names[1::2]]
    compare(bench, [base, tar(changed + deleted)], ("beside", "native"))
