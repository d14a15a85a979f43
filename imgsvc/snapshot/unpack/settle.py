"""The part of unpacking a layer that needs its parents: done once they are complete, on what OverlayStyle recorded.

Afterwards the upper directory is what a sequential unpack on a mounted overlay would have left:
* a directory the layer only implies looks as it does in the lower layers;
* a hard link to a lower layer's file brings that file up, under all its visible names;
* opaque marks are set, whiteouts that hide nothing are gone (they would show up in directories that are not merged).

One thing cannot be repaired afterwards: an entry whose path leads through something of a lower layer that is no directory
has been put into a directory of that name. Through a symbolic link it was meant for elsewhere, through a file it was an
error, and the order of entries may tell otherwise. NeedsParents says so, and the layer is unpacked again on its mounted
parents.

Runs in a worker process with the journal of another, which is not trusted: every path is opened below the two roots.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from imgsvc.base import kernel
from imgsvc.base.errors import Aborted
from imgsvc.base.fsutil import copy_data, copy_metadata
from imgsvc.snapshot.unpack.laying import IMPLIED_MODE, IMPLIED_TIMES, Journal
from imgsvc.snapshot.unpack.tarheader import BadLayer
from imgsvc.snapshot.unpack.tree import MissingDirectory, Tree, rounded

# A path is not what the layer above and those below let expect, each by itself: then only the order of entries tells.
_OTHER_SHAPE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.EISDIR)
_TEMPORARY: Final = b".wh..imgsvc"  # no layer can have a file of this name


class NeedsParents(Aborted):
    """The layer can only be unpacked on top of its mounted parents. path: where that became clear."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        super().__init__(
            "an entry leads through something of a lower layer that is no directory", where=path[:200].decode("utf-8", "backslashreplace")
        )


class Settler:
    """Settles one upper directory. size, inodes: what that added [bytes, count]."""

    def __init__(self, upper: Tree, lower: Tree | None, journal: Journal, *, opaque_xattr: str) -> None:
        """lower: the merged view of all parents, None for a base layer. opaque_xattr: name as this kernel mounts overlays."""
        self.size = self.inodes = 0
        self._upper = upper
        self._lower = lower
        self._journal = journal
        self._opaque_xattr = opaque_xattr
        self._times: dict[bytes, tuple[int, int]] = {}
        self._unit = os.fstatvfs(upper.root_fd).f_frsize or 4096

    def run(self) -> None:
        """Raises: NeedsParents, BadLayer, OSError; then the upper directory must be discarded."""
        try:
            self._run()
        except OSError as error:
            if error.errno not in _OTHER_SHAPE:
                raise
            raise NeedsParents(os.fsencode(error.filename or b"")) from error

    def _run(self) -> None:
        journal = self._journal
        self._check_paths()  # first: nothing may be changed on the strength of a path that means something else
        self._make_links()
        # A whiteout that hides nothing would be visible as a device in a directory that is not merged.
        for path in sorted(journal.whiteouts):
            if self._lower_status(path) is None:
                self._touch(path.rpartition(b"/")[0])
                _unlink(self._upper, path)
                self.inodes -= 1
        self._drop_empty_implied()
        # Only where there is something to hide: an opaque mark on a new directory would be one more attribute without effect.
        for path in sorted(journal.fresh | journal.opaque):
            if not path:
                self._hide_root()
            elif self._lower_status(path, itself=False) is not None:
                self._mark_opaque(path)
        # Times last and deepest first, since every change above touched its parent directory.
        for path, times in sorted(self._times.items(), reverse=True):
            if path not in journal.implied:
                fd = self._upper.open_exact(path)
                os.utime(fd, ns=times)
                os.close(fd)
        for path in sorted(journal.implied, reverse=True):
            self._inherit(path)

    def _hidden(self, path: bytes, *, itself: bool = True) -> bool:
        """Whether this layer hides what lower layers have at `path`; itself: consider a fresh mark on `path` too."""
        if itself and path in self._journal.fresh:
            return True
        while path:
            path = path.rpartition(b"/")[0]
            if path in self._journal.fresh or path in self._journal.opaque:
                return True
        return False

    def _lower_status(self, path: bytes, *, itself: bool = True) -> os.stat_result | None:
        """The status of what lower layers show at `path` (links not followed), or None."""
        return None if self._hidden(path, itself=itself) else self._below(path)

    def _below(self, path: bytes) -> os.stat_result | None:
        """What lower layers have at exactly `path` (links not followed), or None."""
        if self._lower is None:
            return None
        parent, _, name = path.rpartition(b"/")
        try:
            fd = self._lower.open_exact(parent)
        except OSError:  # absent, or a link or file on the way: the lower layers show nothing at that path
            return None
        try:
            return os.lstat(name or b".", dir_fd=fd)
        except FileNotFoundError:
            return None
        finally:
            os.close(fd)

    def _check_paths(self) -> None:
        for path in sorted(self._journal.through):
            status = self._below(path)
            if status is not None and not stat.S_ISDIR(status.st_mode):
                raise NeedsParents(path)

    def _make_links(self) -> None:
        found: dict[bytes, tuple[bytes, os.stat_result]] = {}
        groups: dict[bytes, list[tuple[bytes, int]]] = {}
        for name, (target, inode) in self._journal.links.items():
            if target not in found:
                found[target] = self._find_target(target)
            groups.setdefault(found[target][0], []).append((name, inode))
        statuses = dict(found.values())
        for target in self._journal.targets - found.keys():
            self._find_target(target)
        for canonical, links in groups.items():
            self._bring_up(canonical, statuses[canonical], links)

    def _find_target(self, target: bytes) -> tuple[bytes, os.stat_result]:
        """Canonical path and status of a link's target in the lower layers. Raises: NeedsParents, BadLayer."""
        missing = BadLayer("a hard link to a file that does not exist", target)
        if self._lower is None:
            raise missing
        parent, _, name = target.rpartition(b"/")
        try:
            fd, where = self._lower.directory(parent)
            status = os.lstat(name, dir_fd=fd)
        except (MissingDirectory, FileNotFoundError):
            raise missing from None
        canonical = where + b"/" + name if where else name
        for path in (target, canonical):
            self._check_no_link_above(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadLayer("a hard link to a directory", target)
        return canonical, status

    def _check_no_link_above(self, path: bytes) -> None:
        """Raises: NeedsParents when this layer has something else than a directory on the way to `path`."""
        parent = path.rpartition(b"/")[0]
        try:
            self._upper.directory(parent, create=False)
        except MissingDirectory:
            return
        except BadLayer:
            raise NeedsParents(path) from None
        try:
            os.close(self._upper.open_exact(parent))
        except OSError:
            raise NeedsParents(path) from None

    def _bring_up(self, canonical: bytes, status: os.stat_result, links: list[tuple[bytes, int]]) -> None:
        """One lower file under the names it still has there, and as the links to it: (name, inode of its placeholder) each."""
        assert self._lower is not None
        self._touch(b"")
        root = self._upper.root_fd
        parent, _, name = canonical.rpartition(b"/")
        source = self._lower.open_exact(parent)
        try:
            _copy_up(source, name, status, root)
        finally:
            os.close(source)
        self.size += rounded(status.st_size, self._unit) if stat.S_ISREG(status.st_mode) else 0
        for path in self._lower_names(canonical, status):
            self._place(path, None)
        for path, inode in links:
            self._place(path, inode)
        os.unlink(_TEMPORARY, dir_fd=root)

    def _lower_names(self, canonical: bytes, status: os.stat_result) -> list[bytes]:
        """All names a lower file still has. Overlayfs would keep the others apart; a plain file system would not."""
        if status.st_nlink == 1:
            return [] if self._hidden(canonical) or self._whited_out(canonical) else [canonical]
        assert self._lower is not None
        names = []
        todo = [b""]
        while todo:
            path = todo.pop()
            fd = self._lower.open_exact(path)
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        there = path + b"/" + os.fsencode(entry.name) if path else os.fsencode(entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(there)
                        elif entry.inode() == status.st_ino and not self._hidden(there) and not self._whited_out(there):
                            names.append(there)
            finally:
                os.close(fd)
        return names

    def _whited_out(self, path: bytes) -> bool:
        """Whether this layer removes what lower layers have at `path`, after it has linked to it."""
        while path:
            if path in self._journal.whiteouts:
                return True
            path = path.rpartition(b"/")[0]
        return False

    def _place(self, path: bytes, inode: int | None) -> None:
        """Link the copy to `path`: over its placeholder `inode`, or (None) where this layer has nothing of its own."""
        parent, _, name = path.rpartition(b"/")
        fd = self._upper_directory(parent)
        try:
            try:
                present = os.lstat(name, dir_fd=fd).st_ino
            except FileNotFoundError:
                present = None
            if present != inode:
                return
            self._touch(parent)
            if present is not None:
                os.unlink(name, dir_fd=fd)
            os.link(_TEMPORARY, name, src_dir_fd=self._upper.root_fd, dst_dir_fd=fd, follow_symlinks=False)
        finally:
            os.close(fd)

    def _upper_directory(self, path: bytes) -> int:
        """Open a directory of the upper tree, bringing up what is missing of it."""
        try:
            return self._upper.open_exact(path)
        except FileNotFoundError:
            parent, _, name = path.rpartition(b"/")
            fd = self._upper_directory(parent)
            try:
                self._touch(parent)
                os.mkdir(name, IMPLIED_MODE, dir_fd=fd)
                self.inodes, self.size = self.inodes + 1, self.size + self._unit
                self._journal.implied.add(path)
                return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)

    def _touch(self, path: bytes) -> None:
        if path not in self._times:
            try:
                fd = self._upper.open_exact(path)
            except FileNotFoundError:
                return
            status = os.fstat(fd)
            os.close(fd)
            self._times[path] = (status.st_atime_ns, status.st_mtime_ns)

    def _hide_root(self) -> None:
        """Overlayfs always merges roots: an opaque one is spelled out, child by child."""
        if self._lower is None:
            return
        self._touch(b"")
        for name in map(os.fsencode, os.listdir(self._lower.root_fd)):
            try:
                os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=self._upper.root_fd)
                self.inodes += 1
            except FileExistsError:
                if stat.S_ISDIR(os.lstat(name, dir_fd=self._upper.root_fd).st_mode):
                    self._mark_opaque(name)

    def _mark_opaque(self, path: bytes) -> None:
        fd = self._upper.open_exact(path)
        try:
            os.setxattr(fd, self._opaque_xattr, b"y")
        finally:
            os.close(fd)

    def _drop_empty_implied(self) -> None:
        """Directories that only existed to hold whiteouts of nothing were never there in a sequential unpack."""
        for path in sorted(self._journal.implied, reverse=True):
            status = self._lower_status(path)
            if not path or (status is not None and stat.S_ISDIR(status.st_mode)):
                continue
            parent, _, name = path.rpartition(b"/")
            self._touch(parent)
            fd = self._upper.open_exact(parent)
            try:
                os.rmdir(name, dir_fd=fd)
            except OSError:
                continue  # not empty: real entries are inside
            else:
                self._forget(path, fd, name)
            finally:
                os.close(fd)

    def _forget(self, path: bytes, parent_fd: int, name: bytes) -> None:
        self.size -= self._unit
        self._times.pop(path, None)
        for paths in (self._journal.implied, self._journal.opaque):
            paths.discard(path)
        if path in self._journal.fresh:
            self._journal.fresh.discard(path)
            if self._lower_status(path) is not None:
                os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent_fd)
                return
        self.inodes -= 1

    def _inherit(self, path: bytes) -> None:
        """Owner, mode, xattrs and times of the lower layers' directory; where there is none, the times of implied ones."""
        status = self._lower_status(path)
        target = self._upper.open_exact(path)
        try:
            if status is None or self._lower is None:
                os.utime(target, ns=IMPLIED_TIMES)
                return
            source = self._lower.open_exact(path)
            try:
                copy_metadata(source, target, status)
            finally:
                os.close(source)
        finally:
            os.close(target)


def _unlink(tree: Tree, path: bytes) -> None:
    parent, _, name = path.rpartition(b"/")
    fd = tree.open_exact(parent)
    try:
        os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)


def _copy_up(source: int, name: bytes, status: os.stat_result, root: int) -> None:
    """Copy a file that is not a directory to _TEMPORARY below `root`, with all its metadata."""
    if stat.S_ISREG(status.st_mode):
        reading = kernel.openat2(source, name, os.O_RDONLY | os.O_NOFOLLOW, kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS)
        writing = os.open(_TEMPORARY, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=root)
        try:
            copy_data(reading, writing, status.st_size)
            copy_metadata(reading, writing, status)
        finally:
            os.close(reading)
            os.close(writing)
        return
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), _TEMPORARY, dir_fd=root)
    else:
        os.mknod(_TEMPORARY, status.st_mode, status.st_rdev, dir_fd=root)
    os.chown(_TEMPORARY, status.st_uid, status.st_gid, dir_fd=root, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(_TEMPORARY, stat.S_IMODE(status.st_mode), dir_fd=root)  # chown takes set-ID bits away
    os.utime(_TEMPORARY, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=root, follow_symlinks=False)
