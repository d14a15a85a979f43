"""The images of the tests in the machine: in the data directory of its registry, and what they have to look like unpacked."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Final

from imgsvc.base.oci import KIB
from tests.snapshot.layers import Entry, directory, link, symlink, tar
from tests.snapshot.trees import as_seen, read_tree
from tests.support import images
from tests.support.registries import real_registry
from tests.vm.names import EXPECTED

_REGISTRY: Final = Path("var/lib/docker-registry")


def prepare(root: Path) -> None:
    """Write both below `root`, a tree that new_disk() copies onto the machine's disk."""
    (root / _REGISTRY).mkdir(parents=True)
    cut = cut_layers()
    with real_registry(root / _REGISTRY) as registry:
        registry.push(images.busybox(), "library/busybox")
        registry.push(images.image([images.layer(data) for data in cut]), "vm/cut")
    seen = as_seen(cut, root / "reference")
    unowned = frozenset(seen.unowned_times)
    (root / EXPECTED).parent.mkdir(parents=True)
    (root / EXPECTED).write_bytes(pickle.dumps((read_tree(seen.root, unowned_times=unowned), unowned)))


def cut_layers() -> list[bytes]:
    """Of CUT: a base, two with many files of all sizes, one on top that hides and replaces."""
    base = [
        directory("etc", 0o750, uid=5),
        Entry("etc/passwd", data=b"root", uid=7, mode=0o600),
        Entry("etc/gone", data=b"gone"),
        directory("cache"),
        Entry("cache/old", data=b"old"),
        Entry("bin/tool", data=_noise(300 * KIB, 1), mode=0o4755, xattrs={"user.note": b"kept"}),
        symlink("sh", "bin/tool"),
    ]
    top = [Entry("etc/.wh.gone"), Entry("cache/.wh..wh..opq"), Entry("cache/new", data=b"new"), link("bin/same", "bin/tool")]
    return [tar(base), tar(_many("lib", 2)), tar(_many("share", 3)), tar(top)]


def _many(name: str, seed: int) -> list[Entry]:
    """Three megabytes in 150 files, sizes from nothing to 300 KiB."""
    sizes = random.Random(seed)
    entries = [directory(name)]
    for number in range(150):
        size = sizes.choice([0, 10, 3 * KIB, 20 * KIB, 60 * KIB] if number else [300 * KIB])
        entries.append(Entry(f"{name}/{number}", data=_noise(size, seed * 1000 + number), uid=number, mode=0o600 + number % 8))
    return entries


def _noise(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count)
