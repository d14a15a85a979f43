"""Two ways to lay a layer down: recorded for overlayfs without its parents, or applied to a tree that holds them.

OverlayStyle writes an upper directory: whiteouts as devices 0:0 at once, and a Journal of everything that only makes
sense once the parent is known (settle.py does that part): directories the layer implies, opaque marks, hard links to
files of lower layers. InPlaceStyle deletes for real; whiteouts concern lower layers only, wherever they stand in the
layer, so it remembers what the layer itself made.

Source: OCI image-spec layer.md, "Whiteouts"; Linux Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from imgsvc.base.errors import ResourceExhausted
from imgsvc.base.oci import MIB
from imgsvc.base.removal import remove_at
from imgsvc.snapshot.unpack.tarheader import BadLayer

MAX_JOURNAL: Final = 64 * MIB  # [bytes]; real ones stay below 1 MiB
IMPLIED_MODE: Final = 0o755
# Of directories that no layer has an entry for: the time must depend on the image alone, or no two nodes would have the same
# files. Nothing in the image tells one; the epoch is what reproducible builders write.
IMPLIED_TIMES: Final = (0, 0)  # (atime, mtime) [ns]
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Journal:
    """What is left to do once a layer's parent is there. Paths are canonical, relative to the layer's root.

    implied: directories without an entry. through: directories that the layer, up to some entry, only implied, and that nothing
    had hidden yet: where lower layers have a link there, that entry was meant for somewhere else, and where they
    have a file, it was an error. fresh: directories that replace whatever lower layers have there.
    opaque: directories that hide what lower layers have inside. links: name → (target below, inode of its placeholder).
    targets: of links that were replaced since; they have to be there all the same.
    """

    implied: set[bytes] = field(default_factory=set)
    through: set[bytes] = field(default_factory=set)
    fresh: set[bytes] = field(default_factory=set)
    opaque: set[bytes] = field(default_factory=set)
    whiteouts: set[bytes] = field(default_factory=set)
    links: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    targets: set[bytes] = field(default_factory=set)

    def dump(self) -> bytes:
        """As bytes for load(). Raises: ResourceExhausted beyond MAX_JOURNAL."""
        parts: list[bytes] = []
        for tag, paths in self._tables().items():
            parts += [tag + path for path in sorted(paths)]
        for name, (target, inode) in self.links.items():
            parts += [b"L" + name, target, b"%d" % inode]
        out = b"\0".join(parts)
        if len(out) > MAX_JOURNAL:
            raise ResourceExhausted(f"the layer implies too many changes to its parents (over {MAX_JOURNAL} bytes of names)")
        return out

    @classmethod
    def load(cls, data: bytes) -> Journal:
        """The journal that dump() wrote."""
        journal = cls()
        fields = iter(data.split(b"\0")) if data else iter(())
        tables = journal._tables()
        for item in fields:
            tag, path = item[:1], item[1:]
            if tag == b"L":
                journal.links[path] = (next(fields), int(next(fields)))
            else:
                tables[tag].add(path)
        return journal

    def _tables(self) -> dict[bytes, set[bytes]]:
        return {
            b"I": self.implied,
            b"T": self.through,
            b"F": self.fresh,
            b"O": self.opaque,
            b"W": self.whiteouts,
            b"R": self.targets,
        }


class OverlayStyle:
    """For an upper directory of overlayfs, parents unknown."""

    marks_missing = True
    fresh_tree = True

    def __init__(self) -> None:
        self.directories, self.marks = 1, 0  # the root is there from the start
        self.journal = Journal(implied={b""})  # the root, until it has an entry

    def create_implied(self, parent_fd: int, name: bytes, path: bytes) -> None:
        """Also where a whiteout was: then nothing of lower layers may shine through."""
        if not self._hides(path):
            self.journal.through.add(path)
        try:
            os.mkdir(name, IMPLIED_MODE, dir_fd=parent_fd)
        except FileExistsError:
            os.unlink(name, dir_fd=parent_fd)
            os.mkdir(name, IMPLIED_MODE, dir_fd=parent_fd)
            self.marks -= 1
            self.journal.whiteouts.discard(path)
            self.journal.fresh.add(path)
        self.directories += 1
        self.journal.implied.add(path)

    def touch(self, fd: int, path: bytes) -> None:
        """Nothing to remember: times of implied directories come from the parent."""

    def created(self, path: bytes) -> None:
        """The entry speaks for itself from here on."""
        self.journal.whiteouts.discard(path)

    def made_link(self, path: bytes) -> bool:
        """Others are not here."""
        return True

    def took_over(self, fd: int, path: bytes) -> None:
        """The directory has facts of its own now."""
        self.journal.implied.discard(path)

    def replaced(self, path: bytes, *, was_directory: bool, by_directory: bool) -> None:
        """Forget what was below; a directory in place of something else hides what lower layers have there."""
        journal = self.journal
        journal.whiteouts.discard(path)
        self._drop_link(path)
        if was_directory:
            below = path + b"/"
            for paths in (journal.implied, journal.fresh, journal.opaque, journal.whiteouts):
                paths -= {p for p in paths if p == path or p.startswith(below)}
            for name in [n for n in journal.links if n.startswith(below)]:
                self._drop_link(name)
        if by_directory:
            journal.fresh.add(path)

    def _drop_link(self, path: bytes) -> None:
        if (link := self.journal.links.pop(path, None)) is not None:
            self.journal.targets.add(link[0])

    def restored_times(self) -> Iterator[tuple[bytes, tuple[int, int]]]:
        """None: settle does that."""
        return iter(())

    def whiteout(self, parent_fd: int, name: bytes, path: bytes) -> bool:
        """What this layer itself has there stays: whiteouts concern lower layers, wherever in the layer they stand."""
        try:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent_fd)
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(name, dir_fd=parent_fd).st_mode):
                self.journal.fresh.add(path)
        else:
            self.marks += 1
            self.journal.whiteouts.add(path)
        return False

    def opaque(self, fd: int, path: bytes) -> bool:
        """The mark itself needs privileges the worker has given up; settle sets it."""
        self.journal.opaque.add(path)
        return False

    def link_below(self, parent_fd: int, name: bytes, path: bytes, target: bytes) -> None:
        """An empty file holds the place, so that later entries find what a sequential unpack would show them."""
        if self._hides(target):
            raise _missing(target, path)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0, dir_fd=parent_fd)
        inode = os.fstat(fd).st_ino
        os.close(fd)
        self.journal.links[path] = (target, inode)

    def _hides(self, path: bytes) -> bool:
        """Whether the layer has hidden what lower layers have at `path`, up to here."""
        journal = self.journal
        if path in journal.whiteouts or path in journal.fresh:
            return True
        while path:
            path = path.rpartition(b"/")[0]
            if path in journal.whiteouts or path in journal.fresh or path in journal.opaque:
                return True
        return False

    def placeholder_linked(self, path: bytes, target: bytes) -> None:
        """A hard link to a placeholder links the file that the placeholder replaces."""
        if target in self.journal.links:
            self.journal.links[path] = self.journal.links[target]


class InPlaceStyle:
    """For a tree that holds the lower layers: native snapshots, and overlay mounts where recording is not enough."""

    marks_missing = False
    fresh_tree = False

    def __init__(self) -> None:
        self.directories = self.marks = 0  # such trees are measured afterwards
        self._made: set[bytes] = set()
        self._above_made: set[bytes] = set()
        self._times: dict[bytes, tuple[int, int]] = {}

    def create_implied(self, parent_fd: int, name: bytes, path: bytes) -> None:
        """A plain directory, whatever group, mode or ACL the kernel passes on from its parent."""
        self.touch(parent_fd, path.rpartition(b"/")[0])
        self._times[path] = IMPLIED_TIMES
        os.mkdir(name, IMPLIED_MODE, dir_fd=parent_fd)
        fd = os.open(name, _OPEN_DIR, dir_fd=parent_fd)
        try:
            os.fchown(fd, 0, 0)
            _drop_xattrs(fd)
            os.fchmod(fd, IMPLIED_MODE)
        finally:
            os.close(fd)

    def touch(self, fd: int, path: bytes) -> None:
        """Changing what is inside a directory is not to change its times."""
        if path not in self._times:
            status = os.fstat(fd)
            self._times[path] = (status.st_atime_ns, status.st_mtime_ns)

    def created(self, path: bytes) -> None:
        """Whiteouts leave it alone from here on."""
        self._made.add(path)
        parent = path.rpartition(b"/")[0]
        while parent and parent not in self._above_made:
            self._above_made.add(parent)
            parent = parent.rpartition(b"/")[0]

    def made_link(self, path: bytes) -> bool:
        """Whether there was an entry for it."""
        return path in self._made

    def took_over(self, fd: int, path: bytes) -> None:
        """An entry describes a directory completely: xattrs it does not carry are gone, as on overlayfs."""
        if path in self._made:
            return
        inner = os.open(path.rpartition(b"/")[2] or b".", _OPEN_DIR, dir_fd=fd)
        try:
            _drop_xattrs(inner)
        finally:
            os.close(inner)
        self.created(path)

    def replaced(self, path: bytes, *, was_directory: bool, by_directory: bool) -> None:
        """What is there now is new: remembered times below it mean something else."""
        if was_directory:
            below = path + b"/"
            self._made -= {p for p in self._made if p.startswith(below)}
            self._above_made -= {p for p in self._above_made if p == path or p.startswith(below)}
            for known in [p for p in self._times if p == path or p.startswith(below)]:
                del self._times[known]

    def whiteout(self, parent_fd: int, name: bytes, path: bytes) -> bool:
        """Delete what the layer did not make itself."""
        if path not in self._made and path not in self._above_made:
            remove_at(parent_fd, name)
            return True
        try:
            fd = os.open(name, _OPEN_DIR, dir_fd=parent_fd)
        except NotADirectoryError:
            return False  # what lower layers had there is gone already
        try:
            self._clear_lower(fd, path)
            self._disown(fd, path)
        finally:
            os.close(fd)
        return True

    def opaque(self, fd: int, path: bytes) -> bool:
        """Delete everything inside that the layer did not make itself."""
        self._clear_lower(fd, path)
        return True

    def _clear_lower(self, fd: int, path: bytes) -> None:
        for child in map(os.fsencode, os.listdir(fd)):
            there = path + b"/" + child if path else child
            if there in self._above_made or there in self._made:
                try:
                    inner = os.open(child, _OPEN_DIR, dir_fd=fd)
                except NotADirectoryError:
                    continue
                try:
                    self._clear_lower(inner, there)
                    self._disown(inner, there)
                finally:
                    os.close(inner)
            else:
                remove_at(fd, child)

    def _disown(self, fd: int, path: bytes) -> None:
        """A directory the layer only implies is no longer the one that lower layers had."""
        if path not in self._made:
            os.fchown(fd, 0, 0)
            os.fchmod(fd, IMPLIED_MODE)
            _drop_xattrs(fd)
            self._times[path] = IMPLIED_TIMES

    def link_below(self, parent_fd: int, name: bytes, path: bytes, target: bytes) -> None:
        """All layers are here, so the target is nowhere."""
        raise _missing(target, path)

    def placeholder_linked(self, path: bytes, target: bytes) -> None:
        """There are no placeholders here."""

    def restored_times(self) -> Iterator[tuple[bytes, tuple[int, int]]]:
        """Directories whose times have to be put back, children first: (path, (atime, mtime) [ns])."""
        for path in sorted(self._times, reverse=True):
            if path not in self._made:
                yield path, self._times[path]


def _missing(target: bytes, path: bytes) -> BadLayer:
    return BadLayer(f'a hard link to "{target[:200].decode("utf-8", "backslashreplace")}", which does not exist', path)


def _drop_xattrs(fd: int) -> None:
    try:
        for name in os.listxattr(fd):
            if name.startswith(("user.", "security.capability", "system.posix_acl_")):
                os.removexattr(fd, name)
    except OSError:
        return  # a file system without xattrs has none to drop
