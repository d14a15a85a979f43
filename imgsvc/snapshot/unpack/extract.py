"""Entries of a layer become files: the creation loop of the unpack worker, and what every kind of entry needs.

Everything happens relative to directory descriptors with O_NOFOLLOW and O_EXCL; nothing that exists is ever opened for
writing, nothing is changed by path once it is open. What a layer's special entries mean (whiteouts, links to files of
lower layers, directories it only implies) is up to a Style: laying.py has one that records them the way overlayfs wants
it, and one that applies them to a tree holding the lower layers already.

Directories get owner, mode, xattrs and times at the very end, children first: only then their times stay.

Source: OCI image-spec layer.md. tests/snapshot/test_hostile.py lists what must not work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from imgsvc.base.errors import FailedPrecondition, ImgsvcError, ResourceExhausted, from_os_error
from imgsvc.base.failpoints import armed, failpoint
from imgsvc.base.removal import remove_at
from imgsvc.snapshot.unpack import tarheader as tar
from imgsvc.snapshot.unpack.tarheader import BadLayer, Header
from imgsvc.snapshot.unpack.tarstream import TarStream
from imgsvc.snapshot.unpack.tree import AUFS, AUFS_LINKS, MissingDirectory, NoDirectory, Tree, is_whiteout, measure, normalise, rounded
from imgsvc.snapshot.xattrs import may_have

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DOT: Final = ord(".")
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_BAD_NAMES: Final = (errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTDIR, errno.EFBIG, errno.EMLINK)
_DEFAULT_ACL: Final = b"system.posix_acl_default"


@dataclass(slots=True)
class DirectoryFacts:
    """What a directory gets at the end. times: (atime, mtime) [ns]."""

    mode: int
    uid: int
    gid: int
    times: tuple[int, int]
    xattrs: dict[bytes, bytes] | None


class Style(Protocol):
    """How the special entries of a layer are laid down. Paths are canonical; directory descriptors are borrowed."""

    marks_missing: bool
    """Whether whiteouts in directories that are not there have to be recorded."""

    directories: int
    """Directories made without an entry, less those that became something else."""

    marks: int
    """Whiteouts made, in the same form."""

    fresh_tree: bool
    """Whether all directories are ours; else set-group-ID bits and default ACLs of others shape what we create."""

    def create_implied(self, parent_fd: int, name: bytes, path: bytes) -> None:
        """Make a directory that the layer implies, in place of a whiteout if there is one."""

    def touch(self, fd: int, path: bytes) -> None:
        """Something is about to change in this directory."""

    def created(self, path: bytes) -> None:
        """The layer made or took over what is at `path`."""

    def replaced(self, path: bytes, *, was_directory: bool, by_directory: bool) -> None:
        """What this tree had at `path` was removed to make room."""

    def made_link(self, path: bytes) -> bool:
        """Whether the symbolic link at `path` is this layer's."""

    def took_over(self, fd: int, path: bytes) -> None:
        """A directory that was there already got an entry of its own."""

    def whiteout(self, parent_fd: int, name: bytes, path: bytes) -> bool:
        """Hide what lower layers have at `path`; whether something was removed from this tree."""

    def opaque(self, fd: int, path: bytes) -> bool:
        """Hide what lower layers have in the directory `path`; whether something was removed from this tree."""

    def link_below(self, parent_fd: int, name: bytes, path: bytes, target: bytes) -> None:
        """Make `path` a hard link to `target`, which this tree does not have. Raises: BadLayer."""

    def placeholder_linked(self, path: bytes, target: bytes) -> None:
        """`path` was linked to `target`, in case that one is a placeholder."""

    def restored_times(self) -> Iterator[tuple[bytes, tuple[int, int]]]:
        """Directories whose times have to be put back, children first: (path, (atime, mtime) [ns])."""


def entry_reached() -> None:
    """The next entry of a layer, whether it is unpacked or recorded."""
    failpoint("unpack.entry")


class Extractor:
    """Creates a layer's entries below a root directory and keeps count.

    Attributes: entries [count]; size [bytes allocated], inodes; warnings: what was left out, by reason [count].
    """

    def __init__(self, tree: Tree, style: Style, *, max_entries: int = 0, max_bytes: int = 0, privileged: bool = True) -> None:
        """max_entries, max_bytes (of one file): 0 for no bound. privileged: may chown and make devices."""
        self.entries = self.size = self.inodes = 0
        self.warnings: Counter[str] = Counter()
        self._tree = tree
        self._style = style
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._privileged = privileged
        self._unit = os.fstatvfs(tree.root_fd).f_frsize or 4096
        self._directories: dict[bytes, DirectoryFacts] = {}
        self._inherits = not style.fresh_tree  # owner or mode of new files may come from their directory
        self._aufs_links = -1  # descriptor of the directory, once there is one

    def run(self, stream: TarStream) -> None:
        """Extract all entries, then settle the directories. Raises: BadLayer, ResourceExhausted, DataLoss, and what from_os_error gives."""
        next_entry = stream.next_entry
        watched = armed("unpack.entry")
        while (entry := next_entry()) is not None:
            self.entries += 1
            if watched:
                entry_reached()
            if self._max_entries and self.entries > self._max_entries:
                raise ResourceExhausted(
                    f"the layer has more than {self._max_entries} entries", hint="raise the limit on entries if you trust it"
                )
            try:
                self._extract(entry, stream)
            except OSError as error:
                raise _explained(error, entry.name) from error
        if self._aufs_links >= 0:
            self._drop_aufs_links()
        self.size += self._style.directories * self._unit
        self.inodes += self._style.directories + self._style.marks
        for path, times in self._style.restored_times():
            self._settle_directory(path, None, times)
        for path in sorted(self._directories, reverse=True):
            facts = self._directories[path]
            self._settle_directory(path, facts, facts.times)

    def _extract(self, entry: Header, stream: TarStream) -> None:
        name = entry.name
        parent, _, base = (name[2:] if name.startswith(b"./") else name).rpartition(b"/")
        held = self._tree.held.get(parent)
        if held is not None and base and base[0] != _DOT and b"\0" not in base:  # as nearly all files: nothing to look up or check
            fd, where = held
        elif (place := self._place(entry)) is not None:
            fd, where, base = place
        else:
            return
        path = where + b"/" + base if where else base
        self._style.touch(fd, where)
        kind = entry.kind
        if kind == tar.REGULAR_ONE or kind == tar.GNU_SPARSE:
            self._file(entry, stream, fd, base, path)
        elif kind == tar.DIRECTORY or kind == tar.GNU_DUMP_DIR:
            self._directory(entry, fd, base, path)
            return
        elif kind == tar.LINK:
            self._link(entry, fd, base, path)
        elif kind == tar.SYMLINK:
            self._symlink(entry, fd, base, path)
        elif kind in (tar.CHAR, tar.BLOCK_DEVICE, tar.FIFO):
            self._node(entry, fd, base, path)
        else:
            self.warnings[f"entry of unknown type {chr(kind)!r}"] += 1
            return
        self._style.created(path)

    def _place(self, entry: Header) -> tuple[int, bytes, bytes] | None:
        """Where an entry goes: its directory's descriptor and canonical path, and its name there; None when that was all."""
        path = entry.name
        if path.startswith(b"./"):
            path = path[2:]
        if path.endswith(b"/"):
            path = path[:-1]
        if not path or b"/." in path or path[0] in b"./" or b"//" in path or b"\0" in path:
            path = normalise(entry.name)
        if not path:
            self._root(entry)
            return None
        parent, _, base = path.rpartition(b"/")
        if path.startswith(AUFS) and path != _OPAQUE:
            return self._aufs(entry, path, base)
        if _WHITEOUT in path and self._marker(path, parent, base):
            return None
        return *self._tree.directory(parent), base

    def _root(self, entry: Header) -> None:
        if entry.kind != tar.DIRECTORY:
            raise BadLayer("the root of a layer can only be a directory", entry.name)
        self._directories[b""] = _facts(entry)
        self._style.took_over(self._tree.root_fd, b"")

    def _aufs(self, entry: Header, path: bytes, base: bytes) -> tuple[int, bytes, bytes] | None:
        """Layers that Docker made on AUFS carry its book-keeping. Only the files that hard links lead to are needed, and only meanwhile.

        Source: Docker's pkg/archive (UnpackLayer); there each link is a copy of its own, here they stay one file.
        """
        if path != AUFS_LINKS + b"/" + base or entry.kind != tar.REGULAR_ONE:
            return None
        if self._aufs_links < 0:
            root = self._tree.root_fd
            self._style.touch(root, b"")
            self._make_room(root, AUFS_LINKS, AUFS_LINKS)
            os.mkdir(AUFS_LINKS, 0o700, dir_fd=root)
            self._aufs_links = os.open(AUFS_LINKS, _OPEN_DIR, dir_fd=root)
        return self._aufs_links, AUFS_LINKS, base

    def _drop_aufs_links(self) -> None:
        """What no hard link of the layer has taken goes; the rest has its own name by now."""
        fd = self._aufs_links
        unused = [status for name in os.listdir(fd) if (status := os.lstat(name, dir_fd=fd)).st_nlink == 1]
        os.close(fd)
        self.size -= sum(rounded(status.st_size, self._unit) for status in unused)
        self.inodes -= len(unused)
        remove_at(self._tree.root_fd, AUFS_LINKS)
        self._tree.forget()

    def _marker(self, path: bytes, parent: bytes, base: bytes) -> bool:
        """Handle whiteouts; False when the name only looks like one somewhere inside a component."""
        if any(part.startswith(_WHITEOUT) for part in parent.split(b"/")):
            raise BadLayer('a directory name that starts with ".wh."', path)
        if not base.startswith(_WHITEOUT):
            return False
        removed = False
        try:
            fd, where = self._tree.directory(parent, create=self._style.marks_missing)
        except (MissingDirectory, NoDirectory):
            return True  # there is nothing to hide; builders that put a file in place of a directory still say so of its contents
        if where != parent and self._style.made_link(self._tree.first_link(parent)):
            return True  # a link of this layer is where lower layers had a directory: it does not lead to what is hidden
        self._style.touch(fd, where)
        if base == _OPAQUE:
            removed = self._style.opaque(fd, where)
        elif not base.startswith(_WHITEOUT + _WHITEOUT):  # other .wh..wh. names are AUFS's own book-keeping
            name = base[len(_WHITEOUT) :]
            if name in (b"", b".", b".."):
                raise BadLayer("a whiteout of nothing", path)
            removed = self._style.whiteout(fd, name, where + b"/" + name if where else name)
        if removed:
            self._tree.forget()
        return True

    def _file(self, entry: Header, stream: TarStream, dir_fd: int, base: bytes, path: bytes) -> None:
        if self._max_bytes and entry.size > self._max_bytes:
            raise ResourceExhausted(f"the layer has a file of {entry.size} bytes", hint="raise the limit on unpacked bytes if you trust it")
        try:
            fd = os.open(base, _CREATE, entry.mode & 0o777, dir_fd=dir_fd)
        except FileExistsError:
            self._clear(dir_fd, base, path)
            fd = os.open(base, _CREATE, entry.mode & 0o777, dir_fd=dir_fd)
        try:
            if entry.sparse is None:
                left = entry.size
                while left:
                    data = stream.read_data()
                    left -= len(data)
                    written = os.write(fd, data)
                    while written < len(data):
                        written += os.write(fd, data[written:])
                self.size += -(-entry.size // self._unit) * self._unit
            else:
                self._write_sparse(entry, stream, fd)
            self._metadata(fd, entry)
        finally:
            os.close(fd)
        self.inodes += 1

    def _write_sparse(self, entry: Header, stream: TarStream, fd: int) -> None:
        pending: bytes | memoryview = b""
        for start, length in entry.sparse or ():
            at, end = start, start + length
            while at < end:
                pending = pending or stream.read_data()
                count = os.pwrite(fd, pending[: end - at], at)
                pending = pending[count:]
                at += count
        os.ftruncate(fd, entry.real_size)
        self.size += rounded(entry.size, self._unit)

    def _metadata(self, fd: int, entry: Header) -> None:
        """Owner, mode, xattrs and times of an open file, in this order: chown clears set-ID bits and capabilities."""
        if self._inherits:
            _drop_acls(fd)
        if entry.uid or entry.gid or self._inherits:
            self._chown(fd, entry.uid, entry.gid)
        if entry.mode & 0o7000 or self._inherits:
            os.fchmod(fd, entry.mode)
        if entry.xattrs:
            self._set_xattrs(fd, entry.xattrs)
        mtime = entry.mtime
        os.utime(fd, ns=(mtime if entry.atime is None else entry.atime, mtime))

    def _chown(self, target: int | bytes, uid: int, gid: int, dir_fd: int | None = None) -> None:
        if not self._privileged:
            self.warnings["owner of a file (not privileged)"] += 1
            return
        try:
            if isinstance(target, int):
                os.fchown(target, uid, gid)
            else:
                os.chown(target, uid, gid, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise FailedPrecondition(
                f"files of owner {uid}:{gid} cannot be created in this user namespace", hint="map at least 65536 IDs into it"
            ) from error

    def _set_xattrs(self, target: int | bytes, xattrs: dict[bytes, bytes]) -> None:
        for name, value in xattrs.items():
            shown = name[:64].decode("utf-8", "backslashreplace")
            if not may_have(name):
                self.warnings[f"xattr {shown} (not for images to set)"] += 1
                continue
            try:
                if isinstance(target, int):
                    os.setxattr(target, name, value)
                else:
                    os.setxattr(target, name, value, follow_symlinks=False)
            except OSError as error:
                if self._not_taken(target, error.errno):
                    self.warnings[f"xattr {shown} ({error.strerror})"] += 1
                    continue
                raise
            self._inherits = self._inherits or name == _DEFAULT_ACL

    def _not_taken(self, target: int | bytes, code: int | None) -> bool:
        """Whether it is this attribute that cannot be set there, which does not fail the layer; GNU tar goes on, too."""
        if code == errno.EPERM:
            return not self._privileged or not isinstance(target, int)  # links, FIFOs and devices have no user.* attributes
        if code == errno.ENOSPC:
            return os.fstatvfs(self._tree.root_fd).f_bavail > 0  # ext4 says so of one that does not fit into a block
        return code in (errno.ENOTSUP, errno.E2BIG, errno.ERANGE)

    def _symlink(self, entry: Header, dir_fd: int, base: bytes, path: bytes) -> None:
        if not entry.link or b"\0" in entry.link:
            raise BadLayer("a symbolic link without a proper target", entry.name)
        try:
            os.symlink(entry.link, base, dir_fd=dir_fd)
        except FileExistsError:
            self._clear(dir_fd, base, path)
            os.symlink(entry.link, base, dir_fd=dir_fd)
        self._metadata_at(entry, dir_fd, base)
        self.inodes += 1

    def _node(self, entry: Header, dir_fd: int, base: bytes, path: bytes) -> None:
        form = {tar.CHAR: stat.S_IFCHR, tar.BLOCK_DEVICE: stat.S_IFBLK}.get(entry.kind, stat.S_IFIFO)
        if form == stat.S_IFCHR and entry.major == entry.minor == 0:
            self.warnings["character device 0:0 (overlayfs's own mark)"] += 1
            return
        try:
            os.lstat(base, dir_fd=dir_fd)
            self._clear(dir_fd, base, path)
        except FileNotFoundError:
            pass
        try:
            os.mknod(base, entry.mode | form, os.makedev(entry.major, entry.minor), dir_fd=dir_fd)
        except PermissionError:
            if form == stat.S_IFIFO:
                raise
            self.warnings["device (not permitted in this user namespace)"] += 1  # runtimes bring their own /dev
            return
        self._metadata_at(entry, dir_fd, base)
        if entry.mode & 0o7000 or self._inherits:
            os.chmod(base, entry.mode, dir_fd=dir_fd)  # not a link: no other process changes this tree
        self.inodes += 1

    def _metadata_at(self, entry: Header, dir_fd: int, base: bytes) -> None:
        """As _metadata, for what must not be opened: links, devices, FIFOs. There are no calls for xattrs below a descriptor."""
        if self._inherits or entry.xattrs:
            os.fchdir(dir_fd)
        if self._inherits:
            _drop_acls(base)
        if entry.uid or entry.gid or self._inherits:
            self._chown(base, entry.uid, entry.gid, dir_fd)
        if entry.xattrs:
            self._set_xattrs(base, entry.xattrs)
        mtime = entry.mtime
        os.utime(base, ns=(mtime if entry.atime is None else entry.atime, mtime), dir_fd=dir_fd, follow_symlinks=False)

    def _link(self, entry: Header, dir_fd: int, base: bytes, path: bytes) -> None:
        target = normalise(entry.link)
        if not target:
            raise BadLayer("a hard link to nothing", entry.name)
        parent, _, name = target.rpartition(b"/")
        here = os.dup(dir_fd)  # looking the target up may retire the borrowed descriptor
        try:
            try:
                there, where = self._tree.directory(parent, create=False)
                status = os.lstat(name, dir_fd=there)
            except (MissingDirectory, FileNotFoundError):
                self._make_room(here, base, path)
                self._style.link_below(here, base, path, target)
                self.inodes += 1
                return
            if is_whiteout(status):
                raise BadLayer("a hard link to a file that the same layer deletes", entry.name)
            if stat.S_ISDIR(status.st_mode):
                raise BadLayer("a hard link to a directory", entry.name)
            try:
                os.link(name, base, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
            except FileExistsError:
                old = os.lstat(base, dir_fd=here)
                if (old.st_dev, old.st_ino) != (status.st_dev, status.st_ino):
                    self._clear(here, base, path)
                    os.link(name, base, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
            self._style.placeholder_linked(path, where + b"/" + name if where else name)
            if where == AUFS_LINKS:
                self._tree.forget()  # entries get into that directory by _aufs alone
        finally:
            os.close(here)

    def _make_room(self, dir_fd: int, base: bytes, path: bytes) -> None:
        try:
            os.lstat(base, dir_fd=dir_fd)
        except FileNotFoundError:
            return
        self._clear(dir_fd, base, path)

    def _directory(self, entry: Header, dir_fd: int, base: bytes, path: bytes) -> None:
        self._directories[path] = _facts(entry)
        try:
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(base, dir_fd=dir_fd).st_mode):
                self._style.took_over(dir_fd, path)
                return
            self._clear(dir_fd, base, path, by_directory=True)
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        self.inodes += 1
        self.size += self._unit
        self._style.created(path)

    def _clear(self, dir_fd: int, base: bytes, path: bytes, *, by_directory: bool = False) -> None:
        """Remove what is in an entry's way, and everything we remember about it."""
        status = os.lstat(base, dir_fd=dir_fd)
        directory = stat.S_ISDIR(status.st_mode)
        if directory:
            size, inodes = measure(dir_fd, base, self._unit)
            for known in [p for p in self._directories if p == path or p.startswith(path + b"/")]:
                del self._directories[known]
        elif status.st_nlink == 1:
            size, inodes = rounded(status.st_size, self._unit) if stat.S_ISREG(status.st_mode) else 0, 1
        else:
            size = inodes = 0
        remove_at(dir_fd, base)
        self.size, self.inodes = self.size - size, self.inodes - inodes
        self._tree.forget()
        self._style.replaced(path, was_directory=directory, by_directory=by_directory)

    def _settle_directory(self, path: bytes, facts: DirectoryFacts | None, times: tuple[int, int]) -> None:
        parent, _, name = path.rpartition(b"/")
        try:
            fd = os.open(name or b".", _OPEN_DIR, dir_fd=self._tree.exact(parent))
            try:
                if facts is not None:
                    self._finish_directory(fd, facts)
                os.utime(fd, ns=times)
            finally:
                os.close(fd)
        except OSError as error:
            if facts is None and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return  # it was deleted or replaced after it was touched
            raise _explained(error, path) from error

    def _finish_directory(self, fd: int, facts: DirectoryFacts) -> None:
        # Always: a directory that existed before may have another owner.
        if self._inherits:
            _drop_acls(fd)
        self._chown(fd, facts.uid, facts.gid)
        os.fchmod(fd, facts.mode)
        if facts.xattrs:
            self._set_xattrs(fd, facts.xattrs)


def _drop_acls(target: int | bytes) -> None:
    """Take away what a directory's default ACL has passed on to something new in it; nothing where there is nothing."""
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        with contextlib.suppress(OSError):
            if isinstance(target, int):
                os.removexattr(target, name)
            else:
                os.removexattr(target, name, follow_symlinks=False)


def _facts(entry: Header) -> DirectoryFacts:
    times = (entry.mtime if entry.atime is None else entry.atime, entry.mtime)
    return DirectoryFacts(entry.mode, entry.uid, entry.gid, times, entry.xattrs)


def _explained(error: OSError, entry: bytes) -> ImgsvcError:
    if error.errno in _BAD_NAMES:
        return BadLayer(f"an entry that cannot be created: {error.strerror}", entry)
    shown = entry[:200].decode("utf-8", "backslashreplace")
    return from_os_error(error, f'cannot create "{shown}"')
