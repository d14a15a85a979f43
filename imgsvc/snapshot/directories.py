"""Numbered directories of a driver, and their removal in the background.

ROOT/snapshots/<driver>/<number>/fs (and work, for overlayfs). A directory that is to go is renamed into trash/ at once,
which makes it invisible, and deleted by one thread at its own pace; what is left there after a crash is deleted at start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from imgsvc.base import kernel
from imgsvc.base.errors import from_os_error
from imgsvc.base.failpoints import failpoint
from imgsvc.base.fsutil import private_dir
from imgsvc.base.removal import discard, remove_at
from imgsvc.snapshot.interfaces import Usage
from imgsvc.snapshot.unpack.laying import IMPLIED_MODE, IMPLIED_TIMES
from imgsvc.snapshot.unpack.tree import Tree

log = logging.getLogger(__name__)

_TRASH: Final = "trash"


class Directories:
    """The directories of one driver below `root`. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = private_dir(root)
        self._trash = private_dir(root / _TRASH)
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        for name in os.listdir(self._trash):
            self._delete_later(name)

    def path(self, number: int) -> Path:
        """Where directory `number` is."""
        return self.root / str(number)

    def make(self, number: int, names: Iterable[str]) -> Path:
        """Create directory `number` with subdirectories of mode 0755 and IMPLIED_TIMES, owned by root. Raises: by cause, as from_os_error."""
        path = self.path(number)
        try:
            failpoint("snapshot.recorded")
            path.mkdir(mode=0o700)
            for name in names:
                (path / name).mkdir(mode=IMPLIED_MODE)
                (path / name).chmod(IMPLIED_MODE)  # mkdir's mode went through the umask
                os.utime(path / name, ns=IMPLIED_TIMES)
        except OSError as error:
            raise from_os_error(error, "cannot create a snapshot directory", where=str(path)) from error
        return path

    def numbers(self) -> set[int]:
        """All directories that are there."""
        return {int(name) for name in os.listdir(self.root) if name.isdigit()}

    def discard(self, number: int) -> None:
        """Move a directory out of the way and delete it in the background. Absent is a success."""
        name = str(number)
        try:
            os.rename(self.root / name, self._trash / name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, "cannot move a snapshot away", where=str(self.root / name)) from error
        self._delete_later(name)

    def empty(self, number: int, names: Iterable[str]) -> None:
        """Delete these of a directory's subdirectories; what cannot be deleted is only litter. Blocking."""
        for name in names:
            discard(self.path(number) / name)

    def sync(self) -> None:
        """Put the file system below on disk."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            kernel.syncfs(fd)
        except OSError as error:
            raise from_os_error(error, "cannot sync the snapshots' file system", where=str(self.root)) from error
        finally:
            os.close(fd)

    def close(self) -> None:
        """Wait until everything discarded is deleted."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _delete_later(self, name: str) -> None:
        self._queue.put(name)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._delete, name="snapshot-removal", daemon=True)
                self._thread.start()

    def _delete(self) -> None:
        trash = os.open(self._trash, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while (name := self._queue.get()) is not None:
                try:
                    remove_at(trash, os.fsencode(name))
                except OSError as error:
                    log.warning("cannot delete %s/%s: %s; the next start tries again", self._trash, name, error)
        finally:
            os.close(trash)


def disk_usage(path: Path) -> Usage:
    """What a tree takes on disk now, also while a container changes it; files with several names count once."""
    size = inodes = 0
    seen: set[tuple[int, int]] = set()
    root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        tree = Tree(root)
        todo = [b""]
        while todo:
            here = todo.pop()
            for name, status in _entries(tree, here):
                if stat.S_ISDIR(status.st_mode) and name:
                    todo.append(here + b"/" + name if here else name)
                    continue  # counted when it is opened
                if status.st_nlink > 1 and name:
                    if (status.st_dev, status.st_ino) in seen:
                        continue
                    seen.add((status.st_dev, status.st_ino))
                size, inodes = size + status.st_blocks * 512, inodes + 1
    finally:
        os.close(root)
    return Usage(size, inodes)


def _entries(tree: Tree, path: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """A directory itself (as b"") and what is in it; nothing of what disappears meanwhile or is too deep for a path."""
    try:
        fd = tree.open_exact(path)
    except OSError:
        return
    try:
        yield b"", os.fstat(fd)
        for name in map(os.fsencode, os.listdir(fd)):
            with contextlib.suppress(FileNotFoundError):
                yield name, os.lstat(name, dir_fd=fd)
    finally:
        os.close(fd)
