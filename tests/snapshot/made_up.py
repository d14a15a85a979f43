"""Images made up from a seed: few names, so that layers meet each other in every way; many of them no engine takes."""

from __future__ import annotations

import random
from typing import Final

from tests.snapshot.layers import Entry, directory, link, symlink

_NAMES: Final = ("a", "b", "c")
_KINDS: Final = ("file", "file", "dir", "dir", "symlink", "link", "fifo", "char", "whiteout", "opaque", "root")
_TARGETS: Final = ("a", "b", "c", "../a", "a/b", "b/c", "nowhere", "/a", "/b/c", ".")


def image(seed: int) -> list[list[Entry]]:
    """One to four layers of one to eight entries, base first."""
    source = random.Random(seed)
    return [[_entry(source) for _ in range(source.randint(1, 8))] for _ in range(source.randint(1, 4))]


def _path(source: random.Random) -> str:
    return "/".join(source.choice(_NAMES) for _ in range(source.randint(1, 3)))


def _entry(source: random.Random) -> Entry:
    path = _path(source)
    parent, _, base = path.rpartition("/")
    above = parent + "/" if parent else ""
    match kind := source.choice(_KINDS):
        case "whiteout":
            return Entry(f"{above}.wh.{base}")
        case "opaque":
            return Entry(f"{above}.wh..wh..opq")
        case "symlink":
            return symlink(path, source.choice(_TARGETS))
        case "link":
            return link(path, _path(source))
        case "root":
            return directory("./", source.choice([0o755, 0o711]))
    return Entry(
        path,
        kind,
        b"d" * source.randint(0, 600) if kind == "file" else b"",
        mode=source.choice([0o644, 0o755, 0o600, 0o4755, 0o2711, 0o1777, 0o000]),
        uid=source.choice([0, 1, 1000]),
        gid=source.choice([0, 1, 1000]),
        mtime=source.choice([0.0, 1.5, 1.7e9]),
        xattrs=source.choice([{}, {}, {"user.x": b"1"}]) if kind in ("file", "dir") else {},
        device=(1, 3),
    )
