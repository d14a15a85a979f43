"""Removing trees: the only place that deletes a directory with what is in it.

Nothing is deleted through a symbolic link or on another mount than the one the removal began on, whatever is mounted where
and other processes that change the tree meanwhile. Each directory is opened from the descriptor of its parent by a call that refuses
to cross into a mount, bind mounts of the same file system included; what is unlinked is unlinked from such a descriptor.
Mounts of ours are unmounted first (unmount_below); one that stays is an error that names it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from imgsvc.base import kernel, procfs

log = logging.getLogger(__name__)

_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY


def remove_tree(path: Path | str | bytes) -> None:
    """Delete whatever is at `path`, a directory with all in it. Absent is a success. Blocking.

    Goes on over what cannot be removed. Raises: the OSError of the first such thing, EXDEV for a mount in the way.
    """
    parent, name = os.path.split(os.path.abspath(os.fsencode(path)))
    try:
        fd = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        remove_at(fd, name)
    except OSError as error:
        if error.filename is not None:  # it is relative to our descriptor
            error.filename = os.path.join(os.fsdecode(parent), os.fsdecode(error.filename))
        raise
    finally:
        os.close(fd)


def remove_at(parent_fd: int, name: bytes) -> None:
    """As remove_tree, for one name in an open directory. Errors carry a path relative to it."""
    try:
        os.unlink(name, dir_fd=parent_fd)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        _Walk().remove(parent_fd, name)


def discard(path: Path | str) -> None:
    """As remove_tree, for what is only litter when it stays: an error goes to the log. Blocking."""
    try:
        remove_tree(path)
    except OSError as error:
        log.warning("not removed: %s: %s", error.filename or path, error.strerror)


def unmount_below(directory: Path) -> None:
    """Detach everything mounted, for the calling thread, on a directory of ours or below it, in use or not. Blocking.

    What cannot be detached is logged, and stops a removal that comes to it. What is detached is taken out of its peer group first: a recursive bind of a shared tree would otherwise take the
    mounts below the tree it was made from with it.
    """
    top = os.fsencode(os.path.realpath(directory))
    before: set[int] = set()
    while True:
        found = [mount for mount in procfs.mounts("thread-self") if procfs.is_within(mount.point, top)]
        ids = {mount.id for mount in found}
        if not ids or ids == before:  # none, or none that can be detached
            return
        before = ids
        for mount in found:
            if mount.parent in ids:  # goes with that one, or is stacked on it
                continue
            with contextlib.suppress(OSError):  # not the topmost at its place any more
                kernel.make_private(mount.point)
            try:
                kernel.umount(mount.point)
            except OSError as error:
                log.error("not unmounted: %s: %s", os.fsdecode(mount.point), error.strerror)


@contextlib.contextmanager
def scratch_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A private directory for the block, removed with what is in it, and mounted in it, afterwards."""
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield made
    finally:
        unmount_below(made)
        discard(made)


class _Remove(Protocol):
    """os.unlink or os.rmdir."""

    def __call__(self, path: bytes, /, *, dir_fd: int) -> None: ...


class _Step(NamedTuple):
    """A directory on the way down: its name in the one above, what it is, and which directories in it are left to do."""

    name: bytes
    identity: tuple[int, int]
    children: list[bytes]


class _Walk:
    """Removes one directory.

    A hostile tree may be deeper than descriptors last: one is held, that goes down by name and up by "..". Up must lead
    back to where it came from; where the directory was moved meanwhile, the walk ends.
    """

    def __init__(self) -> None:
        self._fd = -1  # where the walk is
        self._way: list[_Step] = []
        self._problem: OSError | None = None

    def remove(self, parent_fd: int, name: bytes) -> None:
        """Raises: the first OSError, after everything was tried."""
        try:
            if self._enter(parent_fd, name):
                self._empty()
        finally:
            if self._fd >= 0:
                os.close(self._fd)
        self._attempt(os.rmdir, name, parent_fd)
        if self._problem is not None:
            raise self._problem

    def _empty(self) -> None:
        while True:
            if self._way[-1].children:
                self._enter(self._fd, self._way[-1].children.pop())
                continue
            done = self._way.pop()
            if not self._way:
                return
            self._hold(kernel.open_on_mount(self._fd, b"..", _OPEN_DIR))
            if _identity(self._fd) != self._way[-1].identity:
                raise OSError(errno.ESTALE, "the directory was moved while it was removed", self._path(done.name))
            self._attempt(os.rmdir, done.name, self._fd)

    def _hold(self, fd: int) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def _enter(self, parent_fd: int, name: bytes) -> bool:
        """Go down, and unlink everything there but directories, which are noted. False where there is nothing to enter."""
        try:
            self._hold(enter(parent_fd, name))
        except FileNotFoundError:
            return False
        except OSError as error:
            self._note(error, name)
            return False
        with os.scandir(self._fd) as entries:
            found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
        status = os.fstat(self._fd)
        if not status.st_mode & 0o200 and found:
            with contextlib.suppress(OSError):
                os.fchmod(self._fd, 0o700)  # as in enter
        self._way.append(_Step(name, (status.st_dev, status.st_ino), [child for child, is_dir in found if is_dir]))
        for child, is_dir in found:
            if not is_dir:
                self._attempt(os.unlink, child, self._fd)
        return True

    def _attempt(self, remove: _Remove, name: bytes, fd: int) -> None:
        try:
            remove(name, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._note(error, name)

    def _note(self, error: OSError, name: bytes) -> None:
        """Only the first: a directory that is not empty because something in it stayed is no problem of its own."""
        if self._problem is None:
            text = "a mount is in the way" if error.errno == errno.EXDEV else error.strerror
            self._problem = OSError(error.errno, text, self._path(name))

    def _path(self, name: bytes) -> str:
        return os.fsdecode(b"/".join([*(step.name for step in self._way), name]))


def enter(dir_fd: int, name: bytes) -> int:
    """A descriptor of a directory of ours on the same mount; without CAP_DAC_OVERRIDE its mode may keep us out, and is changed.

    Raises: OSError; EXDEV for a mount point.
    """
    try:
        return kernel.open_on_mount(dir_fd, name, _OPEN_DIR)
    except PermissionError:
        fd = kernel.open_on_mount(dir_fd, name, os.O_PATH | os.O_DIRECTORY)
        try:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
        finally:
            os.close(fd)
        return kernel.open_on_mount(dir_fd, name, _OPEN_DIR)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
