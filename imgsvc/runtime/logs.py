"""Log files of containers: made here, written by a monitor. A log cannot leave its directory (CVE-2025-0750)."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from imgsvc.base.errors import InvalidArgument


def check_log_directory(directory: str, log_path: str) -> None:
    """Every directory between the log directory and the log is one, not a symlink (CVE-2025-0750). Blocking."""
    path = Path(directory)
    for part in Path(log_path).parent.parts:
        path /= part
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise InvalidArgument("a log directory is not a directory", where=str(path))


def prepare_log(directory: str, log_path: str) -> None:
    """Make the log file, so that conmon opens just this. Blocking. Raises: as open_log."""
    os.close(open_log(directory, log_path))


def open_log(directory: str, log_path: str) -> int:
    """A descriptor to append to the log with, made when absent, with directories. Blocking.

    No symlink below the log directory is followed, also when a process that can write there swaps entries meanwhile.
    Raises: InvalidArgument.
    """
    base = Path(directory)
    base.mkdir(mode=0o755, parents=True, exist_ok=True)
    parent = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *directories, name = log_path.split("/")
        for part in directories:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=parent)
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            os.close(parent)
            parent = below
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, 0o640, dir_fd=parent)
    except OSError as error:
        raise InvalidArgument(f"the log cannot be opened: {error.strerror}", where=os.path.join(directory, log_path)) from error
    finally:
        os.close(parent)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidArgument("the log is not a regular file", where=os.path.join(directory, log_path))
    return fd
