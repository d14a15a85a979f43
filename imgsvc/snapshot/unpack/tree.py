"""Directories below one root, reached by held descriptors and never by a remembered path.

Every look-up starts at the root's descriptor and stays below it: openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) where the
kernel has it, else one O_NOFOLLOW step per component; or it is the last such step alone, from a parent that is held.
Symbolic links on the way are resolved here, inside the root, as chroot(2) would. Descriptors are kept for directories that entries keep coming to; whenever a directory or a link in the
tree goes away, all of them are dropped, because a path may mean something else from then on (CVE-2025-47290).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from imgsvc.base import kernel
from imgsvc.base.removal import enter
from imgsvc.snapshot.unpack.tarheader import BadLayer

_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BENEATH: Final = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS
_MAX_HELD: Final = 200  # descriptors; layers come in directory order, more would hardly be hit
AUFS: Final = b".wh..wh."  # at the root: what AUFS keeps for itself
AUFS_LINKS: Final = b".wh..wh.plnk"  # among it, the files that hard links of the layer lead to
_MAX_LINKS: Final = 40  # symbolic links in one look-up, as the kernel has it


class MissingDirectory(Exception):
    """A directory is not there and was not to be created."""


class NoDirectory(BadLayer):
    """Something on the way is neither a directory nor a link to one."""

    def __init__(self, path: bytes) -> None:
        super().__init__("a path leads through something that is not a directory", path)


class Tree:
    """The directory `root_fd` and what is below it. Paths are bytes, normalised, relative, b"" for the root."""

    def __init__(self, root_fd: int, create: Callable[[int, bytes, bytes], None] | None = None, *, use_openat2: bool = True) -> None:
        """create(parent_fd, name, path): makes a directory that entries imply, replacing a whiteout; None: never create."""
        self.root_fd = root_fd
        self._create = create
        self._use_openat2 = use_openat2
        self.held: dict[bytes, tuple[int, bytes]] = {}  # answers of directory() that are still good, by normalised path
        self._retired: list[int] = []  # to be closed once no thread can still be using them

    def directory(self, path: bytes, *, create: bool = True) -> tuple[int, bytes]:
        """A descriptor of a directory, following links inside the root, and its canonical path.

        The descriptor belongs to the tree and stays valid until the next call only, also over forget().
        Raises: NoDirectory, BadLayer (too many links), MissingDirectory.
        """
        if not path:
            return self.root_fd, b""
        held = self.held.get(path)
        if held is not None:
            return held
        try:
            held = self._open_plain(path), path
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise
            held = self._walk(path, create)
        return self._hold(path, held)

    def _hold(self, path: bytes, held: tuple[int, bytes]) -> tuple[int, bytes]:
        """Keep what a look-up found, in place of the one that is kept longest."""
        while self._retired:
            os.close(self._retired.pop())
        if path in self.held:
            self._retired.append(self.held.pop(path)[0])
        elif len(self.held) >= _MAX_HELD:
            self._retired.append(self.held.pop(next(iter(self.held)))[0])
        self.held[path] = held
        return held

    def first_link(self, path: bytes) -> bytes:
        """Canonical path of the first symbolic link on the way to a directory; b"" for none."""
        parent, _, name = path.rpartition(b"/")
        if not name:
            return b""
        if above := self.first_link(parent):
            return above
        fd = self.open_exact(parent)
        try:
            return path if stat.S_ISLNK(os.lstat(name, dir_fd=fd).st_mode) else b""
        finally:
            os.close(fd)

    def forget(self) -> None:
        """Drop all held descriptors: something that may be part of a path was removed."""
        self._retired += [fd for fd, _ in self.held.values()]
        self.held.clear()

    def close(self) -> None:
        """Close what is held; the root's descriptor stays open."""
        self.forget()
        while self._retired:
            os.close(self._retired.pop())

    def exact(self, path: bytes) -> int:
        """A descriptor of the directory at exactly this path, no links followed; it is the tree's, as with directory().

        Raises: OSError.
        """
        if not path:
            return self.root_fd
        held = self.held.get(path)
        if held is None or held[1] != path:
            held = self._hold(path, (self._open_plain(path), path))
        return held[0]

    def open_exact(self, path: bytes) -> int:
        """A new descriptor of the directory at exactly this path, no links followed. Raises: OSError."""
        if not path:
            return os.open(b".", _OPEN_DIR, dir_fd=self.root_fd)
        return self._open_plain(path)

    def _open_plain(self, path: bytes) -> int:
        if b".." in path and b".." in path.split(b"/"):  # nothing plain; _walk knows what it means
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        parent, _, name = path.rpartition(b"/")
        held = self.held.get(parent) if parent else (self.root_fd, b"")
        if held is not None and held[1] == parent:
            return os.open(name, _OPEN_DIR, dir_fd=held[0])
        if self._use_openat2:
            try:
                return kernel.openat2(self.root_fd, path, _OPEN_DIR, _BENEATH)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EPERM):  # EPERM: a seccomp filter that does not know the call
                    raise
                self._use_openat2 = False
        fd = os.dup(self.root_fd)
        for part in path.split(b"/"):
            try:
                step = os.open(part, _OPEN_DIR, dir_fd=fd)
            finally:
                os.close(fd)
            fd = step
        return fd

    def _walk(self, path: bytes, create: bool) -> tuple[int, bytes]:
        """One component at a time: links resolved inside the root, missing directories created."""
        todo = path.split(b"/")[::-1]
        stack: list[tuple[int, bytes]] = [(os.dup(self.root_fd), b"")]
        links = 0
        try:
            while todo:
                part = todo.pop()
                if part in (b"", b"."):
                    continue
                if part == b"..":
                    if len(stack) > 1:
                        os.close(stack.pop()[0])
                    continue
                fd, here = stack[-1]
                there = here + b"/" + part if here else part
                try:
                    stack.append((self._step(fd, part, there, create), there))
                    continue
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                        raise
                try:
                    target = os.readlink(part, dir_fd=fd)
                except OSError as error:
                    raise NoDirectory(path) from error
                links += 1
                if links > _MAX_LINKS:
                    raise BadLayer("too many symbolic links on the way", path)
                if target.startswith(b"/"):
                    while len(stack) > 1:
                        os.close(stack.pop()[0])
                todo += target.split(b"/")[::-1]
            return stack.pop()
        finally:
            for fd, _ in stack:
                os.close(fd)

    def _step(self, fd: int, part: bytes, path: bytes, create: bool) -> int:
        try:
            return os.open(part, _OPEN_DIR, dir_fd=fd)
        except FileNotFoundError:
            if not create or self._create is None:
                raise MissingDirectory(path) from None
        except NotADirectoryError:
            if not is_whiteout(os.lstat(part, dir_fd=fd)):
                raise
            if not create or self._create is None:
                raise MissingDirectory(path) from None
        self._create(fd, part, path)
        return os.open(part, _OPEN_DIR, dir_fd=fd)


def is_whiteout(status: os.stat_result) -> bool:
    """Whether this is overlayfs's mark for "not here": a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def normalise(name: bytes) -> bytes:
    """An entry's name as a relative path without ".", ".." and empty parts; b"" for the root. Raises: BadLayer."""
    if b"\0" in name or len(name) > 4096:
        raise BadLayer("a name with a NUL byte or beyond 4096 bytes", name[:200])
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise BadLayer("a name that leads out of the layer", name)
            parts.pop()
        elif part not in (b"", b"."):
            if len(part) > 255:
                raise BadLayer("a path component beyond 255 bytes", name[:200])
            parts.append(part)
    return b"/".join(parts)


def measure(parent_fd: int, name: bytes, unit: int) -> tuple[int, int]:
    """Disk use of what is at `name`, as (bytes in whole units, inodes); hard links count once each time they are met."""
    status = os.lstat(name, dir_fd=parent_fd)
    size, inodes = rounded(status.st_size, unit), 1
    if stat.S_ISDIR(status.st_mode):
        fd = enter(parent_fd, name)
        try:
            for child in os.listdir(fd):
                more, count = measure(fd, os.fsencode(child), unit)
                size, inodes = size + more, inodes + count
        finally:
            os.close(fd)
    return size, inodes


def rounded(size: int, unit: int) -> int:
    """`size` in whole allocation units [bytes]."""
    return -(-size // unit) * unit
