"""Copies a directory of an image into a volume by descriptors, so that a change of the source meanwhile cannot lead outside it.

No name is looked up twice: what a descriptor was opened on is what is judged and copied (C-X4, CVE-2018-15664). No symbolic
link is followed, and nothing but directories and regular files is opened for reading.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.fsutil import copy_data

MAX_DEPTH: Final = 128  # directories in each other; each holds two descriptors while it is copied
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_XATTRS: Final = (errno.ENOTSUP, errno.EPERM, errno.ENODATA, errno.EINVAL, errno.EACCES)  # what a file system or host does not take


def copy_directory(source: int, target: Path) -> None:
    """Fill the empty directory `target`, which no other process uses, with the contents of `source`, and copy its attributes.

    Types, owners, modes, times, xattrs, holes and hard links are kept; what disappears meanwhile is left out. Blocking.

    Args:   source: a descriptor, O_PATH will do.
    Raises: InvalidArgument (nested beyond MAX_DEPTH), OSError.
    """
    root = os.open(target, _OPEN_DIR)
    try:
        _Copy(root).directory(source, root, b"", MAX_DEPTH)
    finally:
        os.close(root)


class _Copy:
    """names: (device, inode) of a file with several names → the name it has been copied to, below `root`."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._names: dict[tuple[int, int], bytes] = {}

    def directory(self, source: int, target: int, path: bytes, depth: int) -> None:
        if not depth:
            raise InvalidArgument(f"a volume of the image has directories nested deeper than {MAX_DEPTH}")
        reading = os.open(b".", _OPEN_DIR, dir_fd=source)
        try:
            for name in map(os.fsencode, os.listdir(reading)):
                found = _look(reading, name)
                if found < 0:
                    continue
                try:
                    self._entry(found, target, name, path + b"/" + name if path else name, depth)
                finally:
                    os.close(found)
            _finish(reading, target, os.fstat(reading))
        finally:
            os.close(reading)

    def _entry(self, found: int, target: int, name: bytes, path: bytes, depth: int) -> None:
        status = os.fstat(found)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            inner = os.open(name, _OPEN_DIR, dir_fd=target)
            try:
                self.directory(found, inner, path, depth - 1)
            finally:
                os.close(inner)
            return
        if status.st_nlink > 1:
            known = self._names.setdefault((status.st_dev, status.st_ino), path)
            if known != path:
                os.link(known, name, src_dir_fd=self._root, dst_dir_fd=target, follow_symlinks=False)
                return
        if stat.S_ISREG(status.st_mode):
            _copy_file(found, target, name, status)
        else:
            _make_node(found, target, name, status)


def _look(directory: int, name: bytes) -> int:
    """A descriptor of whatever is there, -1 when nothing is."""
    try:
        return os.open(name, _LOOK, dir_fd=directory)
    except FileNotFoundError:
        return -1


def _copy_file(found: int, target: int, name: bytes, status: os.stat_result) -> None:
    reading = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)  # the file itself, whatever its name means by now
    try:
        writing = os.open(name, _CREATE, 0o600, dir_fd=target)
        try:
            copy_data(reading, writing, status.st_size)
            _finish(reading, writing, status)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _make_node(found: int, target: int, name: bytes, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(b"", dir_fd=found), name, dir_fd=target)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)  # mknod's went through the umask, and chown took bits away
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def _finish(reading: int, writing: int, status: os.stat_result) -> None:
    """Owner, mode, xattrs and times of a file or directory, in this order: chown clears set-ID bits and capabilities."""
    os.fchown(writing, status.st_uid, status.st_gid)
    os.fchmod(writing, stat.S_IMODE(status.st_mode))
    try:
        names = os.listxattr(reading)
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
        names = []
    for name in names:
        try:
            os.setxattr(writing, name, os.getxattr(reading, name))
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise
    os.utime(writing, ns=(status.st_atime_ns, status.st_mtime_ns))
