"""Two trees compared by everything a layer determines: names, types, modes, owners, sizes, contents, links, xattrs, times.

Times of directories and whiteouts are left out: earlier versions gave those without an entry the time of unpacking.
What is read is never run, followed or mounted.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import printable
from imgsvc.base.oci import MIB
from imgsvc.snapshot.unpack.tree import is_whiteout

_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
# What overlayfs writes for itself into a directory it is mounted on; other values every time, and nothing of the layer.
_OF_A_MOUNT: Final = tuple(f"{space}.overlay.{name}" for space in ("trusted", "user") for name in ("uuid", "origin", "impure", "nlink"))


def difference(one: Path, other: Path, cancel: CancelToken) -> str:
    """The first thing that differs, in words; "" when nothing does. Blocking: reads both trees. Raises: Cancelled, OSError."""
    return _Comparison(cancel).run(one, other)


class _Comparison:
    """links: inode here → inode there, of files with several names, so that the same names belong together in both."""

    def __init__(self, cancel: CancelToken) -> None:
        self._cancel = cancel
        self._links: dict[int, int] = {}

    def run(self, one: Path, other: Path) -> str:
        todo = [(os.open(one, _OPEN_DIR), os.open(other, _OPEN_DIR), "/")]
        if found := _attributes(os.fstat(todo[0][0]), os.fstat(todo[0][1])):
            _close(todo)
            return f"/: {found}"
        try:
            while todo:
                here, there, path = todo.pop()
                try:
                    found = self._directory(here, there, path, todo)
                finally:
                    os.close(here)
                    os.close(there)
                if found:
                    return found
        finally:
            _close(todo)
        return ""

    def _directory(self, here: int, there: int, path: str, todo: list[tuple[int, int, str]]) -> str:
        names, others = set(os.listdir(here)), set(os.listdir(there))
        if names != others:
            name = min(names ^ others)
            return f"{path}{printable(name, 200)}: " + ("is not in the layer" if name in names else "is missing")
        if _xattrs(here) != _xattrs(there):
            return f"{path}: other extended attributes"
        for name in sorted(names):
            self._cancel.check()
            if found := self._entry(here, there, name):
                return f"{path}{printable(name, 200)}: {found}"
            if stat.S_ISDIR(os.lstat(name, dir_fd=here).st_mode):
                todo.append(
                    (os.open(name, _OPEN_DIR, dir_fd=here), os.open(name, _OPEN_DIR, dir_fd=there), f"{path}{printable(name, 200)}/")
                )
        return ""

    def _entry(self, here: int, there: int, name: str) -> str:
        mine, theirs = os.lstat(name, dir_fd=here), os.lstat(name, dir_fd=there)
        if found := _attributes(mine, theirs):
            return found
        if stat.S_ISDIR(mine.st_mode):
            return ""
        if mine.st_nlink != theirs.st_nlink:
            return "other hard links"
        if mine.st_nlink > 1:
            known = self._links.setdefault(mine.st_ino, theirs.st_ino)
            if known != theirs.st_ino:
                return "other hard links"
        if stat.S_ISLNK(mine.st_mode):
            return "" if os.readlink(name, dir_fd=here) == os.readlink(name, dir_fd=there) else "another target"
        if stat.S_ISREG(mine.st_mode):
            return self._files(os.open(name, _OPEN_FILE, dir_fd=here), os.open(name, _OPEN_FILE, dir_fd=there))
        return ""

    def _files(self, here: int, there: int) -> str:
        try:
            if _xattrs(here) != _xattrs(there):
                return "other extended attributes"
            while data := os.read(here, MIB):
                self._cancel.check()
                if data != os.read(there, MIB):
                    return "other contents"
            return ""
        finally:
            os.close(here)
            os.close(there)


def _attributes(mine: os.stat_result, theirs: os.stat_result) -> str:
    """What differs in two inodes' own facts."""
    facts = {
        "another type or mode": (mine.st_mode, theirs.st_mode),
        "another owner": ((mine.st_uid, mine.st_gid), (theirs.st_uid, theirs.st_gid)),
        "another device": (mine.st_rdev, theirs.st_rdev),
    }
    if not stat.S_ISDIR(mine.st_mode) and not is_whiteout(mine):
        facts["another size"] = (mine.st_size, theirs.st_size)
        facts["another time"] = (mine.st_mtime_ns, theirs.st_mtime_ns)
    return next((what for what, (a, b) in facts.items() if a != b), "")


def _xattrs(fd: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd) if name not in _OF_A_MOUNT}
    except OSError:
        return {}  # a file system without them


def _close(pairs: list[tuple[int, int, str]]) -> None:
    for here, there, _ in pairs:
        os.close(here)
        os.close(there)
