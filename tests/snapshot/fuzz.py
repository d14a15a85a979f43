"""Mutated layers through the whole parser and extractor, in this process.

    python -m tests.snapshot.fuzz SECONDS [SEED]

runs for as long as you like (an hour before a release); test_fuzz.py runs a bounded part of it.
Allowed outcomes: extracted, or one of our own errors. Anything else, an escape or a hang ends it with the input's seed.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.removal import remove_at
from imgsvc.snapshot.unpack.extract import Extractor
from imgsvc.snapshot.unpack.laying import InPlaceStyle, Journal, OverlayStyle
from imgsvc.snapshot.unpack.tarstream import TarStream
from imgsvc.snapshot.unpack.tree import Tree
from tests.snapshot.layers import END, Entry, directory, link, padded, pax_block, raw_header, record, symlink, tar, with_checksum

SLOWEST = 5.0  # [seconds] for one input, on a busy machine


def seeds() -> list[bytes]:
    """Layers with everything in them that has a parser."""
    entries = [
        directory("./"),
        directory("d"),
        Entry("d/file", data=b"x" * 1500, xattrs={"user.a": b"b", "trusted.overlay.opaque": b"y"}),
        symlink("s", "d"),
        symlink("up", "../../../sentinel"),
        Entry("s/through", data=b"y"),
        Entry("up/out", data=b"z"),
        link("h", "d/file"),
        link("hs", "up"),
        Entry("d/.wh.gone"),
        Entry("d/.wh..wh..opq"),
        Entry("p", "fifo"),
        Entry("c", "char", device=(1, 3)),
        Entry("l" * 180, data=b"long"),
        Entry("big-owner", uid=2**31, mtime=-5.25),
    ]
    sparse0 = record(b"GNU.sparse.size", b"5000") + record(b"GNU.sparse.numblocks", b"1")
    sparse0 += record(b"GNU.sparse.offset", b"1000") + record(b"GNU.sparse.numbytes", b"3")
    sparse1 = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")
    sparse1 += record(b"GNU.sparse.name", b"sp1") + record(b"GNU.sparse.realsize", b"9000")
    old = b"%011o\0%011o\0" % (512, 3) + bytes(72) + b"\0" + b"%011o\0" % 7000
    return [
        tar(entries),
        tar(entries, tarfile.GNU_FORMAT),
        pax_block(sparse0) + raw_header(b"sp0", 3) + padded(b"abc") + END,
        pax_block(sparse1) + raw_header(b"x", 515) + padded(b"1\n512\n3\n") + padded(b"abc") + END,
        raw_header(b"old", 3, b"S", sparse=old) + padded(b"abc") + END,
    ]


def mutate(data: bytes, source: random.Random) -> bytes:
    """Some bytes changed, blocks moved, cut or repeated; usually with checksums that fit again."""
    out = bytearray(data)
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(out) or 1) if out else 0
        block = at // 512 * 512
        choice = source.randrange(7)
        if choice == 0 and out:
            out[at] = source.randrange(256)
        elif choice == 1:
            out[at : at + source.randrange(12)] = source.choice([b"\x80", b"\xff" * 12, b"7" * 12, b"-1", b"../", b"/", b"\0", b".wh."])
        elif choice == 2:
            del out[block : block + 512]
        elif choice == 3:
            out[block:block] = out[block : block + 512]
        elif choice == 4:
            del out[at:]
        elif choice == 5:
            other = source.randrange(len(out) // 512 + 1) * 512
            out[block : block + 512], out[other : other + 512] = out[other : other + 512], out[block : block + 512]
        elif len(out) >= block + 512:
            out[block + 156] = source.choice(b"0123456789xgLKSDVMNX\0\xff")
    if source.random() < 0.9:
        for block in range(0, len(out) - 511, 512):
            if any(out[block + 148 : block + 156]):
                out[block : block + 512] = with_checksum(bytes(out[block : block + 512]))
    return bytes(out)


def extract(data: bytes, root: Path, *, in_place: bool, chunk: int, max_bytes: int = 1 << 20) -> None:
    """Extract in this process. Raises: ImgsvcError on what is not a layer."""
    style = InPlaceStyle() if in_place else OverlayStyle()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd, style.create_implied)
    at = 0

    def next_chunk() -> bytes:
        nonlocal at
        at += chunk
        return data[at - chunk : at]

    try:
        Extractor(tree, style, max_entries=1000, max_bytes=max_bytes).run(TarStream(next_chunk))
        if isinstance(style, OverlayStyle):
            assert Journal.load(style.journal.dump()) == style.journal
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPERM):
            raise
    finally:
        tree.close()
        os.close(fd)


def once(seed: int, scratch: Path, layers: list[bytes]) -> None:
    """One mutated layer. Raises: AssertionError on an escape or when it takes too long; whatever should not happen."""
    source = random.Random(seed)
    data = source.choice(layers)
    if source.random() < 0.98:
        data = mutate(data, source)
    sentinel = scratch / "sentinel"
    before = (sentinel.lstat(), sorted(os.listdir(sentinel)), sorted(os.listdir(scratch)))
    started = time.monotonic()
    root = scratch / "root"
    root.mkdir()
    try:
        extract(data, root, in_place=source.random() < 0.5, chunk=source.choice([100, 512, 700, 4096, 1 << 20]))
    except ImgsvcError:
        pass
    finally:
        parent = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        remove_at(parent, b"root")
        os.close(parent)
    after = (sentinel.lstat(), sorted(os.listdir(sentinel)), sorted(os.listdir(scratch)))
    assert before == after, "escaped"
    assert time.monotonic() - started < SLOWEST, "too slow"


def prepare(scratch: Path) -> None:
    """A place to extract into, and one that must not change."""
    (scratch / "sentinel").mkdir()
    (scratch / "sentinel/file").write_bytes(b"keep")


def main() -> int:
    """Run for argv[1] seconds; prints the seed of a failure."""
    until = time.monotonic() + float(sys.argv[1])
    seed = first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 48)
    layers = seeds()
    with tempfile.TemporaryDirectory(prefix="imgsvc-fuzz-") as scratch:
        prepare(Path(scratch))
        while time.monotonic() < until:
            try:
                once(seed, Path(scratch), layers)
            except BaseException:
                print(f"failed with seed {seed}", flush=True)
                raise
            seed += 1
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{seed - first} inputs from seed {first}, no crash, hang or escape; peak RSS {rss // 1024} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
