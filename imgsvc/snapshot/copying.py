"""Copies of whole trees, and owners shifted into a user namespace: what remains where mounts cannot do it."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from imgsvc.base.errors import Internal, InvalidArgument, ResourceExhausted, printable
from imgsvc.base.kernel import open_on_mount, without_links
from imgsvc.snapshot.interfaces import IDMapping

_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(source: Path, target: Path) -> None:
    """Fill the directory `target` with everything in `source`, metadata and hard links included. Blocking: a process.

    Shares blocks where the file system can. As root, a directory that is replaced with a link meanwhile is not followed.
    Raises: ResourceExhausted (disk full), InvalidArgument (paths beyond PATH_MAX), Internal.
    """
    with contextlib.ExitStack() as opened:
        fds = [_without_links(place, opened) for place in (source, target)]
        places = [f"/proc/self/fd/{fd}" for fd in fds]
        command = ["cp", "-a", "--reflink=auto", "--", *(f"{place}/." for place in places)]
        env = {"LC_ALL": "C"} | _path()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=env, pass_fds=fds, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        text = printable(said)
        if "No space left" in said or "quota exceeded" in said:
            raise ResourceExhausted(f"cannot copy a snapshot: {text}", where=str(target), hint="free space there, then try again")
        if "File name too long" in said:  # directories nested beyond PATH_MAX, which only descriptors reach
            raise InvalidArgument("the image has paths too long to be copied", where=str(target), hint='use the snapshotter "overlayfs"')
        raise Internal(f"cannot copy a snapshot: {text}", where=str(target))


def _without_links(place: Path, opened: contextlib.ExitStack) -> int:
    try:
        fd = without_links(str(place))
    except OSError:  # not root, or an older kernel; other users cannot enter our directories
        fd = os.open(place, _OPEN_DIR)
    opened.callback(os.close, fd)
    return fd


def _path() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath)}


def shift(rows: Sequence[tuple[int, int, int]], number: int) -> int:
    """A user or group inside the namespace as the host's. Raises: InvalidArgument when the mapping does not cover it."""
    for inside, outside, count in rows:
        if inside <= number < inside + count:
            return outside + number - inside
    raise InvalidArgument(f"the user namespace has no ID for owner {number}", hint="map at least 65536 IDs")


def shift_tree(root: Path, mapping: IDMapping) -> None:
    """Give everything below `root`, itself included, to the mapped owners; set-ID bits and capabilities stay. Raises: OSError, EXDEV for a mount in it."""
    done: set[tuple[int, int]] = set()
    fd = os.open(root, _OPEN_DIR)
    try:
        _shift_directory(fd, mapping, done)
    finally:
        os.close(fd)


def _shift_directory(fd: int, mapping: IDMapping, done: set[tuple[int, int]]) -> None:
    for name in os.listdir(fd):
        status = os.lstat(name, dir_fd=fd)
        if stat.S_ISDIR(status.st_mode):
            inner = open_on_mount(fd, os.fsencode(name), os.O_RDONLY)
            try:
                _shift_directory(inner, mapping, done)
            finally:
                os.close(inner)
        elif status.st_nlink == 1 or (status.st_dev, status.st_ino) not in done:
            done.add((status.st_dev, status.st_ino))
            _shift_file(fd, name, status, mapping)
    status = os.fstat(fd)
    os.fchown(fd, shift(mapping.uids, status.st_uid), shift(mapping.gids, status.st_gid))
    os.fchmod(fd, stat.S_IMODE(status.st_mode))


def _shift_file(dir_fd: int, name: str, status: os.stat_result, mapping: IDMapping) -> None:
    regular = stat.S_ISREG(status.st_mode)
    fd = os.open(name, (os.O_RDONLY if regular else os.O_PATH) | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        capability = os.getxattr(fd, "security.capability") if regular and "security.capability" in os.listxattr(fd) else b""
        os.chown(name, shift(mapping.uids, status.st_uid), shift(mapping.gids, status.st_gid), dir_fd=dir_fd, follow_symlinks=False)
        if status.st_mode & 0o7000 and not stat.S_ISLNK(status.st_mode):
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(status.st_mode))
        if capability:
            os.setxattr(fd, "security.capability", capability)
    finally:
        os.close(fd)
