"""Every advisory of needs.md C1 by its ID, through a whole PullImage from a real registry, with both snapshotters.

What must hold whatever a layer contains is checked around every test (`unharmed`): the daemon answers, its memory and
that of its workers is bounded, nothing outside the store changes, everything is given back, and the next pull works.
C-X4 (copies out of running containers) is no matter of images; its tests are the runtime's.
"""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import zstandard

from imgsvc.base.oci import GIB, MIB, Digest
from tests.e2e.attack import ENTRIES, SETTINGS, UNPACKED, Node, Outcome, layer, make_sentinel, resized
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.snapshot.layers import END, Entry, directory, gz, link, pax_block, raw_header, record, symlink, tar
from tests.snapshot.test_hostile import BOMBS, BROKEN, HEADER_BOMBS, LINK_ESCAPES, OUT, WHOLE, swappable
from tests.support import cri, images
from tests.support.daemon import Daemon, below, new_daemon
from tests.support.disk import Disk
from tests.support.images import Compression
from tests.support.registries import RealRegistry, ScriptedRegistry
from tests.support.swapper import Swapper
from tests.support.vigil import Vigil, at_rest, eventually, held, threads

pytestmark = pytest.mark.root

WAYS = ["overlayfs", "native"]
GROWTH = 256 * MIB  # how much more memory daemon and workers may take while something hostile comes in
MORE_THREADS = 8  # pools that fill up as they are needed
_serial = itertools.count()


@pytest.fixture(scope="module")
def node(registry: RealRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    daemon = new_daemon(network=False, settings=SETTINGS)
    try:
        daemon.map_host("docker.io", registry.address)
        daemon.start()
        made = Node(daemon, registry, make_sentinel(tmp_path_factory.mktemp("outside") / "sentinel"))
        made.pull_all({str(n): [_fresh()] for n in range(8)})  # pools fill up, the worker server starts,
        assert refused(made.pull_all({"": [raw_header(b"f", 512)]})) == {""}  # and the threads that remove
        yield made
    finally:
        daemon.close()


@pytest.fixture
def second(node: Node, make_daemon: Callable[..., Daemon]) -> Node:
    """A node of its own, for what reads the whole store or leaves something in it by right."""
    daemon = make_daemon(settings=SETTINGS)
    daemon.map_host("docker.io", node.registry.address)
    daemon.start()
    return Node(daemon, node.registry, node.sentinel)


@pytest.fixture(autouse=True)
def unharmed(node: Node) -> Iterator[Vigil]:
    """What holds whatever a layer contains; see the module."""
    daemon = node.daemon
    facts, holds, running, identity = node.facts(), at_rest(daemon), threads(daemon.pid), daemon.pid
    assert not holds["leases"]
    vigil = Vigil(daemon)
    vigil.look()
    before = vigil.peak
    with vigil:
        yield vigil
    assert node.facts() == facts
    assert daemon.pid == identity
    assert vigil.odd == []
    assert vigil.slowest < 1
    assert vigil.peak - before <= GROWTH
    eventually(lambda: held(daemon), holds)
    assert threads(daemon.pid) <= running + MORE_THREADS
    for way in WAYS:
        assert set(node.tree(node.pull(_fresh(), way=way))) == {"valid"}
    assert "internal error" not in daemon.log


def _fresh() -> list[Entry]:
    return [Entry("valid", data=b"%d" % next(_serial))]


def refused(outcomes: dict[tuple[str, str], Outcome]) -> set[str]:
    """Names of attacks that were refused in every way they were tried."""
    taken = {name for (name, _), outcome in outcomes.items() if not outcome.refused}
    return {name for name, _ in outcomes} - taken


def test_c_x1_hard_link_to_a_symlink_does_not_pass_modes_on(node: Node) -> None:
    target = str(node.sentinel / "f")
    attack = [symlink("s", target), link("h", "s"), Entry("h", mode=0o777, data=b"x")]
    for outcome in node.pull_all({"chmod": [attack]}).values():
        found = node.tree(outcome)
        assert stat.S_ISREG(found["h"].st_mode)
        assert stat.S_ISLNK(found["s"].st_mode)


def test_c_x2_a_directory_replaced_by_a_link_is_not_remembered(node: Node) -> None:
    up = "../" * 30 + str(node.sentinel).lstrip("/")
    attacks: dict[str, list[list[Entry]]] = {}
    for depth in (1, 64):
        deep = "/".join(["a", *(["d"] * (depth - 1))])
        for number, between in enumerate(([], [Entry("a/.wh.x")], [Entry(".wh.a")])):
            start = [directory("a"), Entry(f"{deep}/x"), *between]
            attacks[f"one layer {depth} {number}"] = [[*start, symlink("a", str(node.sentinel)), Entry(f"{deep}/y"), Entry("a/y")]]
            attacks[f"layers {depth} {number}"] = [start, [symlink("a", up), Entry("a/y")], [Entry(f"{deep}/z"), Entry("a/z")]]
    node.pull_all(attacks)


def test_c_x3_nothing_outside_changes_while_components_are_swapped(node: Node) -> None:
    """A helper exchanges a directory of each half-made snapshot with a link, as fast as it can, while two layers come in."""

    def pull(way: str) -> None:
        names = [node.push(swappable(next(_serial)), swappable(next(_serial))) for _ in range(2)]
        for call in [node.start(name, way) for name in names]:
            call.exception()

    for way in WAYS:
        with Swapper(f"{node.daemon.root}/snapshots/{way}/*/fs", node.sentinel) as swapper:
            swapper.race(lambda way=way: pull(way), 5_000)  # type: ignore[misc]


def test_c_x5_names_lead_nowhere_else(node: Node) -> None:
    attacks = {f"name {name}": [[Entry(name, data=b"x")]] for name in OUT}
    attacks |= {f"link {name}": [[symlink("l", name), Entry("l/y", data=b"x")]] for name in OUT}
    attacks |= {f"hard link {name}": [[link("h", name)]] for name in OUT}
    attacks |= {f"hard link above {name}": [[Entry("keep")], [link("h", name)]] for name in OUT}
    node.pull_all(attacks)


IMPOSSIBLE_NAMES = {
    "NUL": pax_block(record(b"path", b"a\0b")) + raw_header(b"n"),
    "4097 bytes": pax_block(record(b"path", b"n" * 4097)) + raw_header(b"n"),
    "4201 bytes deep": pax_block(record(b"path", b"d/" * 2100 + b"n")) + raw_header(b"n"),
    "NUL in a target": pax_block(record(b"linkpath", b"a\0b")) + raw_header(b"n", 0, b"2"),
    "link to nothing": raw_header(b"n", 0, b"2"),
    "hard link to nothing": raw_header(b"n", 0, b"1"),
    "component of 256": pax_block(record(b"path", b"d/" + b"n" * 256)) + raw_header(b"n"),
    "no name": raw_header(b"", 0),
}


def test_c_x5_names_that_cannot_be(node: Node) -> None:
    outcomes = node.pull_all({name: [block + END] for name, block in IMPOSSIBLE_NAMES.items()})
    assert refused(outcomes) == set(IMPOSSIBLE_NAMES)
    for outcome in outcomes.values():
        assert outcome.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "bad layer" in outcome.text


def test_c_x6_the_root_stays_a_directory(node: Node) -> None:
    names = [".", "./", "/", "a/.."]
    attacks = {
        f"{kind} {name}": [[Entry(name, kind, link=str(node.sentinel)), Entry("f", data=b"x")]]
        for name in names
        for kind in ("symlink", "file", "fifo")
    }
    # A file of V7's type whose name ends in a slash is how old tars write a directory, here the root itself.
    old = {f"old {name}": [raw_header(name.encode(), 0, b"\0") + tar([Entry("f", data=b"x")])] for name in ("./", "/", ".")}
    outcomes = node.pull_all({**attacks, **old})
    assert {*attacks, *old} - refused(outcomes) == {"old ./", "old /"}
    for outcome in outcomes.values():
        assert outcome.refused or set(node.tree(outcome)) == {"f"}


def test_c_x7_links_lead_nowhere_else(node: Node) -> None:
    attacks: dict[str, list[list[Entry]]] = {}
    for name, entries in LINK_ESCAPES.items():
        aimed = node.aim(entries)
        attacks[name] = [aimed]
        attacks[f"{name}, a layer each"] = [[entry] for entry in aimed]
    outcomes = node.pull_all(attacks)
    taken = set(attacks) - refused(outcomes)
    assert {"SymlinkAbsolute", "SymlinkEmptyFile", "DirectoryOverrideSymlink", "SymlinkOverrideDirectory"} & taken  # what images do
    for outcome in (outcomes[("SymlinkEmptyFile", way)] for way in WAYS):
        assert stat.S_ISREG(node.tree(outcome)["f"].st_mode)


NOTHING_TO_HIDE = [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh..", "d/.wh...", ".wh.d/x", "../.wh.x"]


def test_c_x8_whiteouts_of_nothing_are_refused(node: Node) -> None:
    attacks = {name: [[directory("d"), Entry("d/keep"), Entry(name)]] for name in NOTHING_TO_HIDE}
    assert refused(node.pull_all(attacks)) == set(NOTHING_TO_HIDE)


def test_c_x8_whiteouts_hide_what_is_below_and_nothing_else(node: Node) -> None:
    below = [directory("d"), Entry("d/old"), directory("d/sub"), Entry("d/sub/old"), Entry("keep")]
    above = [directory("d"), Entry("d/before"), Entry("d/.wh..wh..opq"), Entry("d/after"), Entry("d/sub/new"), Entry(".wh..wh.plnk")]
    any_type = [directory(".wh.d"), symlink(".wh.keep", str(node.sentinel))]
    outcomes = node.pull_all({"opaque": [below, above], "any type": [below, any_type]})
    for way in WAYS:
        assert set(node.tree(outcomes[("opaque", way)])) == {"d", "d/before", "d/after", "d/sub", "d/sub/new", "keep"}
        assert set(node.tree(outcomes[("any type", way)])) == set()


def test_c_x9_overlay_attributes_do_not_come_from_layers(node: Node) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    xattrs = {"trusted.overlay.redirect": b"/etc", "trusted.overlay.opaque": b"y", "trusted.overlay.metacopy": b"", "trusted.other": b"1"}
    xattrs |= {"user.overlay.opaque": b"y", "user.fine": b"1", "security.capability": capability, "security.selinux": b"x:y:z:s0"}
    layers = [[directory("d"), Entry("d/seen")], [directory("d", xattrs=xattrs), Entry("f", xattrs=xattrs, mode=0o755)]]
    device = [[Entry("f", data=b"below")], [Entry("f", "char", device=(0, 0))]]
    outcomes = node.pull_all({"xattrs": layers, "device": device})
    for way in WAYS:
        with node.shown(outcomes[("xattrs", way)]) as root:
            assert os.path.lexists(root / "d/seen")
            assert set(os.listxattr(root / "f")) == {"user.fine", "security.capability"}
            assert os.getxattr(root / "f", "security.capability") == capability
        assert set(node.tree(outcomes[("device", way)])) == {"f"}  # a device 0:0 would hide it
    disk = Disk(node.daemon.root)
    for part in disk.images()[outcomes[("xattrs", "overlayfs")].image]["layers"]:
        for path in disk.layer_directory(part["snapshot"]).iterdir():
            assert not [name for name in os.listxattr(path) if ".overlay." in name and name != "trusted.overlay.origin"]
    assert "left out" in node.daemon.log


@pytest.mark.parametrize("name", HEADER_BOMBS)
def test_c_x10_headers_that_promise_too_much(node: Node, name: str) -> None:
    attack = node.push(HEADER_BOMBS[name]())
    began = time.monotonic()
    assert node.outcome(node.start(attack), attack).refused
    assert time.monotonic() - began < 30


def test_c_x10_a_size_beyond_the_layer_is_an_error(node: Node) -> None:
    short, huge = raw_header(b"f", 100_000) + b"short" + bytes(507), raw_header(b"f", size=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7)
    outcomes = node.pull_all({"short": [short], "huge": [huge + b"short"]})
    assert refused(outcomes) == {"short", "huge"}
    assert outcomes[("short", "overlayfs")].code == grpc.StatusCode.DATA_LOSS


def test_c_x11_a_path_longer_than_path_max_through_links(node: Node) -> None:
    """Links whose expansion exceeds PATH_MAX made realpath() stop early and a filter believe it (CVE-2025-4517)."""
    component = "d" * 247
    entries: list[Entry] = []
    path = ""
    for step in "abcdefghijklmnop":
        entries += [directory(f"{path}{component}"), symlink(f"{path}{step}", component)]
        path += component + "/"
    chain = "/".join("abcdefghijklmnop")
    entries += [symlink(f"{chain}/{'l' * 254}", "../" * 16)]
    entries += [symlink("escape", f"{chain}/{'l' * 254}/../../../..{node.sentinel}")]
    entries += [link("flaglink", "escape/f"), Entry("flaglink", data=b"x"), Entry("escape/new", data=b"x")]
    half = len(entries) - 4
    node.pull_all({"one layer": [entries], "two": [entries[:half], entries[half:]]})


def test_c_x11_numbers_that_are_none(node: Node) -> None:
    values = [b"-0000000007\0", b"\xff" * 12, b"\x80\x7f" + b"\xff" * 10, b"7_7", b"9999999", b"0x77"]
    fields = itertools.product(("size", "uid", "mtime", "mode"), values)
    attacks = {f"{field} {value!r}": [raw_header(b"f", **{field: value}) + END] for field, value in fields}
    outcomes = node.pull_all(attacks, ["overlayfs"])
    (one,) = set(attacks) - refused(outcomes)
    assert one == f"mtime {values[1]!r}"  # a second before the epoch is a time
    assert node.tree(outcomes[(one, "overlayfs")])["f"].st_mtime == -1


def _repeated(chunk: bytes, times: int, head: bytes = b"") -> bytes:
    """A gzip stream of `head` and of a chunk very many times, whose making takes no time at all."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(chunk) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + first + again * times + packer.flush()


def _wide_zstd() -> bytes:
    """One raw block in a frame that asks for a window of 2 GiB. Source: RFC 8878 sections 3.1.1.1.2 and 3.1.1.2."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + (len(END) << 3 | 1).to_bytes(3, "little") + END


STOPPED: dict[str, tuple[Callable[[], bytes], str]] = {
    "10 GiB of zeros": (lambda: _repeated(bytes(16 * MIB), 10 * GIB // (16 * MIB), raw_header(b"f", UNPACKED - MIB)), "times its size"),
    "not so many at once": (
        lambda: _repeated(os.urandom(MIB) + bytes(63 * MIB), 8, raw_header(b"f", UNPACKED - MIB)),
        "unpacks to more than",
    ),
    "50 million empty files": (
        lambda: _repeated(raw_header(b"f") * 2**15, 1525, b"".join(raw_header(b"%d" % n) for n in range(2**15))),
        "entries",
    ),
    "zstd": BOMBS["zstd"],
    "one file": BOMBS["one file"],
}


@pytest.mark.parametrize("name", STOPPED)
def test_c_x12_bombs_stop_at_a_limit_that_the_error_names(node: Node, name: str) -> None:
    make, said = STOPPED[name]
    blob = make()
    compression: Compression = "zstd" if name == "zstd" else "plain" if name == "one file" else "gzip"
    outcomes = node.pull_all({name: [layer(blob, compression=compression)]})
    for outcome in outcomes.values():
        assert outcome.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert said in outcome.text
        assert "raise the limit" in outcome.text
        assert str(Digest.of(blob)) in outcome.text


def test_c_x12_what_is_within_the_limits_is_taken(node: Node) -> None:
    plain = b"".join(raw_header(b"%d" % n) for n in range(ENTRIES)) + END
    assert len(node.tree(node.pull(layer(gz(plain), Digest.of(plain))))) == ENTRIES


def test_c_x12_nested_gzip_and_wide_windows_are_refused(node: Node) -> None:
    nested = gz(gz(tar([Entry("f")])))
    attacks = {"nested": [layer(nested)], "window": [layer(_wide_zstd(), Digest.of(END), "zstd")]}
    outcomes = node.pull_all(attacks)
    assert refused(outcomes) == set(attacks)
    assert "zstd" in outcomes[("window", "overlayfs")].text


def test_c_x12_a_blob_is_never_inflated_for_its_content_encoding(second: Node) -> None:
    """Its bytes are those its digest names; a registry that encodes them once more gives others."""
    made = images.image([images.layer([images.Entry("f", b"x")])])
    digest = next(d for d in made.blobs if d != made.config_digest)

    def encoded(request: Request) -> Reply:
        reply = fake.honest(request)
        body = gz(reply.body) if "/twice/" in request.path else reply.body
        return Reply(200, {"Content-Encoding": "gzip", "ETag": '"1"'}, body)

    with FakeRegistry() as fake:
        for name in ("twice", "said"):
            fake.add(made, name)
        fake.rule(fake.on(f"/blobs/{digest}", encoded))
        second.daemon.map_host("odd.example", fake.address)
        error = second.start("odd.example/twice:latest").exception()
        assert isinstance(error, grpc.RpcError)
        assert error.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE), error
        said = second.start("odd.example/said:latest")
        if said.exception() is None:
            assert set(second.tree(Outcome("overlayfs", "odd.example/said:latest", grpc.StatusCode.OK, ""))) == {"f"}


def test_c_x12_all_space_is_returned(node: Node) -> None:
    """What a refused layer left is its blob, which the collector takes: nobody needs it."""
    daemon = node.daemon
    blob = images.layer(raw_header(b"f", 40 * MIB) + os.urandom(40 * MIB) + raw_header(b"g", UNPACKED * 2) + b"x").blob
    before = _disk_use(daemon.root)
    assert node.pull(layer(blob)).refused
    assert daemon.cli("gc").returncode == 0
    eventually(lambda: _disk_use(daemon.root) - before < 4 * MIB, True)


def _disk_use(root: Path) -> int:
    done = subprocess.run(["du", "-s", "-B1", str(root / "content"), str(root / "snapshots")], capture_output=True, text=True)
    return sum(int(line.split()[0]) for line in done.stdout.splitlines())


def test_c_x13_broken_streams_are_errors_and_the_next_layer_works(node: Node) -> None:
    attacks = {name: [layer(blob, Digest.of(WHOLE))] for name, blob in BROKEN.items()}
    began = time.monotonic()
    assert refused(node.pull_all(attacks)) == set(BROKEN)
    assert time.monotonic() - began < 10 * len(attacks)
    began = time.monotonic()
    assert node.pull(*attacks["truncated gzip"]).refused  # and again, from the stored blob
    assert time.monotonic() - began < 10
    assert set(node.tree(node.pull(layer(gz(WHOLE), Digest.of(WHOLE))))) == {"f"}


def test_c_x13_unusual_but_valid_streams_work(node: Node) -> None:
    without_end = WHOLE.rstrip(b"\0")
    without_end += bytes(-len(without_end) % 512)
    without_padding = tar([Entry("f", data=b"x" * 700)]).rstrip(b"\0")
    frames = [zstandard.ZstdCompressor().compress(part) for part in (WHOLE[:1000], WHOLE[1000:])]
    valid = {
        "without padding": [layer(gz(without_padding), Digest.of(without_padding))],
        "without end": [layer(without_end, Digest.of(without_end), "plain")],
        "without end, gzip": [layer(gz(without_end), Digest.of(without_end))],
        "padded": [layer(gz(WHOLE) + bytes(700), Digest.of(WHOLE))],
        "members": [layer(gz(WHOLE[:1000]) + gz(WHOLE[1000:]) + gz(b""), Digest.of(WHOLE))],
        "frames": [layer(frames[0] + b"\x50\x2a\x4d\x18\x04\0\0\0skip" + frames[1], Digest.of(WHOLE), "zstd")],
    }
    for outcome in node.pull_all(valid).values():
        assert set(node.tree(outcome)) == {"f"}


def test_c_x14_nothing_of_a_layer_is_executed_or_loaded(node: Node, unharmed: Vigil) -> None:
    """Neither libraries nor modules nor name services; the vigil looks at each worker's root and at what it has mapped."""
    names = ["lib/libnss_files.so.2", "lib/x86_64-linux-gnu/libc.so.6", "etc/ld.so.preload", "etc/nsswitch.conf", "etc/passwd"]
    names += ["usr/lib/python3/encodings/idna.py", "usr/lib/locale/locale-archive", "imgsvc/__init__.py", "sitecustomize.py"]
    hostile = [Entry(name, mode=0o6777, data=b"\x7fELF" + bytes(50_000)) for name in names]
    more = [Entry(f"more/{n}", data=b"x" * 100) for n in range(8000)]
    for outcome in node.pull_all({"files": [[*hostile, symlink("proc/self/exe", "/bin/sh"), *more]]}).values():
        assert set(names) <= set(node.tree(outcome))
    assert unharmed.workers
    for pid in (node.daemon.pid, *unharmed.workers):
        maps = Path(f"/proc/{pid}/maps")
        assert not maps.exists() or str(node.daemon.root / "snapshots") not in maps.read_text()


def test_c_x15_wrong_and_swapped_diff_ids_are_data_loss(node: Node) -> None:
    one, two = images.layer([images.Entry("one", os.urandom(9))]), images.layer([images.Entry("two", os.urandom(9))])
    other = Digest.of(b"other")
    attacks = {
        "wrong": [replace(one, diff_id=other)],
        "swapped": [replace(one, diff_id=two.diff_id), replace(two, diff_id=one.diff_id)],
        "above": [one, replace(two, diff_id=other)],
    }
    outcomes = node.pull_all(attacks)
    assert refused(outcomes) == set(attacks)
    assert {outcome.code for outcome in outcomes.values()} == {grpc.StatusCode.DATA_LOSS}
    for way in WAYS:
        text = outcomes[("wrong", way)].text
        assert other in text
        assert one.diff_id in text
        assert one.digest in text
    names = {name for name in held_snapshots(node) if name.partition("/")[2] in (other, two.diff_id)}
    assert names == set()
    assert set(node.tree(node.pull(one, two))) == {"one", "two"}


def held_snapshots(node: Node) -> set[str]:
    """driver/name of every snapshot that has a directory."""
    return set(Disk(node.daemon.root).records("snapshots"))


def test_c_x15_bytes_other_than_the_descriptor_says_are_data_loss(second: Node, scripted: ScriptedRegistry) -> None:
    second.daemon.map_host("lies.example", scripted.address)
    made = {name: images.image([images.layer([images.Entry(name, os.urandom(3000))])]) for name in ("other", "longer", "shorter", "half")}
    blobs = {name: next(d for d in document.blobs if d != document.config_digest) for name, document in made.items()}
    scripted.serve(made["other"], "other", instead={blobs["other"]: bytes(len(made["other"].blobs[blobs["other"]]))})
    scripted.serve(made["longer"], "longer", instead={blobs["longer"]: made["longer"].blobs[blobs["longer"]] + bytes(64 * MIB)})
    scripted.serve(made["shorter"], "shorter", instead={blobs["shorter"]: made["shorter"].blobs[blobs["shorter"]][:-1]})
    scripted.serve(made["half"], "half", instead={blobs["half"]: bytes(len(made["half"].blobs[blobs["half"]]) // 2)})
    for name, delta in (("size+1", 1), ("size-1", -1)):
        made[name] = resized(images.image([images.layer([images.Entry(name, os.urandom(3000))])]), delta)
        scripted.serve(made[name], name.replace("+1", "-more").replace("-1", "-less"))
    repositories = ["other", "longer", "shorter", "half", "size-more", "size-less"]
    calls = {name: second.start(f"lies.example/{name}:latest") for name in repositories}
    for name, call in calls.items():
        error = call.exception()
        assert isinstance(error, grpc.RpcError), name
        text = error.details() or ""
        assert error.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE), (name, error.code(), text)
        assert "\n" not in text
        assert scripted.address in text
        assert cri.image_status(second.daemon.images(), f"lies.example/{name}:latest") is None
    stored = {path.name for path in (second.daemon.root / "content" / "blobs" / "sha256").iterdir()}
    assert not stored & {digest.hex for digest in blobs.values()}
    for name in blobs:  # and nothing of the lies is in the way of the truth
        scripted.serve(made[name], name)
        assert second.outcome(second.start(f"lies.example/{name}:latest"), name).code == grpc.StatusCode.OK


def test_c_x16_nodes_are_created_and_never_opened(second: Node) -> None:
    first = [Entry("mem", "char", device=(1, 1), mode=0o640), Entry("pipe", "fifo"), Entry("suid", mode=0o4755, data=b"s" * 9)]
    outcomes = second.pull_all({"nodes": [first], "replaced": [first, [Entry("pipe", data=b"now a file"), Entry("mem", data=b"too")]]})
    for way in WAYS:
        kept = second.tree(outcomes[("nodes", way)])
        assert stat.S_ISCHR(kept["mem"].st_mode)
        assert kept["mem"].st_rdev == os.makedev(1, 1)
        assert stat.S_ISFIFO(kept["pipe"].st_mode)
        assert kept["suid"].st_mode & 0o7777 == 0o4755
        found = second.tree(outcomes[("replaced", way)])
        assert stat.S_ISREG(found["pipe"].st_mode)
        assert stat.S_ISREG(found["mem"].st_mode)
    # A path through a link of the layer below: overlayfs leaves notes of its own in the new one, which are no damage.
    assert not second.pull([directory("usr"), symlink("lib", "usr")], [Entry("lib/new", data=b"x")]).refused
    checked = second.daemon.cli("fsck", "--deep")  # reads layers again, and waits for nobody at the pipe
    assert checked.returncode == 0, checked.stdout


def test_c_x17_no_other_user_gets_below_root_and_state(second: Node) -> None:
    """Also after an upgrade from a version (or an umask) that let everybody in."""
    daemon = second.daemon
    daemon.directory.chmod(0o755)
    image = second.push([directory("bin", 0o777), Entry("bin/suid", mode=0o4755, data=Path("/bin/true").read_bytes())])
    for way in WAYS:
        assert not second.outcome(second.start(image, way), image, way).refused
    _assert_private(daemon)
    daemon.stop()
    for top in (daemon.root, daemon.state):
        for path in (top, *(p for p in below(top) if p.is_dir() and "fs" not in p.relative_to(top).parts)):
            path.chmod(0o755)
    daemon.start()
    _assert_private(daemon)


def _assert_private(daemon: Daemon) -> None:
    inside = [str(path) for top in (daemon.root, daemon.state) for path in below(top)]
    programs = [path for path in inside if path.endswith("/bin/suid")]
    assert len(programs) == len(WAYS)
    seen = subprocess.run(["stat", "-c", "%n", *inside], user=1000, group=1000, extra_groups=[], capture_output=True, text=True)
    assert seen.stdout == ""
    assert seen.stderr.count("Permission denied") == len(inside)
    listed = subprocess.run(
        ["ls", str(daemon.root), str(daemon.state)], user=1000, group=1000, extra_groups=[], capture_output=True, text=True
    )
    assert listed.stdout == ""
    for path in programs:
        with pytest.raises(PermissionError):
            subprocess.run([path], user=1000, group=1000, extra_groups=[], check=True)
    for place in ("content", "snapshots", "snapshots/overlayfs", "snapshots/native", "metadata"):
        assert (daemon.root / place).stat().st_mode & 0o077 == 0, place
