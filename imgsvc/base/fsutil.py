"""Durable files and safe paths: the only place that knows what survives a power cut.

A file is durable when its data is synced *and* the directory that names it is. Source: fsync(2), rename(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from imgsvc.base.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, from_os_error, printable

_libc = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE: Final = 1
_COPY: Final = 1024**2  # [bytes] per sendfile call


def sync_dir(path: Path | str) -> None:
    """Put a directory's entries on disk. Blocking."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600, sync: bool = True) -> None:
    """Replace a small file: readers see the old or the new bytes, also after a power cut (sync=True). Blocking."""
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if sync:
        sync_dir(path.parent)


def private_dir(path: Path, mode: int = 0o700) -> Path:
    """Create a directory that lets no other user in, and tighten one that does (CVE-2024-25621). Returns it.

    Raises: PermissionDenied and others of from_os_error, naming the directory.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
    except OSError as error:
        raise from_os_error(error, "making a private directory", where=str(path)) from error
    return path


def resolved(directory: str) -> Path:
    """The real path of a configured directory that may not exist yet: from here on, no path below it leads through a link.

    Raises: InvalidArgument when it is no directory, or its name is not UTF-8, as the JSON of an OCI specification must be.
    """
    path = Path(os.path.realpath(directory))
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument("the name of imgsvc's directory must be UTF-8", where=printable(str(path), 200)) from error
    if path == Path("/") or (path.exists() and not path.is_dir()):
        raise InvalidArgument("not a directory that imgsvc can own", where=str(path), hint="name another one")
    return path


def lock_exclusive(path: Path, what: str) -> int:
    """Lock a file of ours until the descriptor is closed or the process ends, however it ends. Returns the descriptor.

    Raises: FailedPrecondition naming the process that holds it. `what` names the thing protected, for the error.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        holder = printable(os.pread(fd, 20, 0).decode("ascii", "replace"))
        os.close(fd)
        raise FailedPrecondition(
            f"{what} is in use by another imgsvc (process {holder or 'unknown'})",
            where=str(path.parent),
            hint="stop that process, or choose another directory",
        ) from error
    except OSError as error:
        os.close(fd)
        raise from_os_error(error, f"locking {what}", where=str(path)) from error
    return fd


def boot_id() -> str:
    """Changes with every boot of the machine: what was not synced in an earlier boot may never have reached the disk."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def free_space(path: Path) -> int:
    """Space an ordinary user could still fill on the file system of `path` [bytes]. Raises: OSError."""
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def require_space(path: Path, need: int, *, reserve: int, doing: str) -> None:
    """Refuse work that would eat into the free-space reserve. Sizes in bytes.

    Raises: ResourceExhausted saying how much is needed and how much is there.
    """
    free = free_space(path)
    if need + reserve > free:
        raise ResourceExhausted(
            f"{doing} needs {need} bytes, {max(0, free - reserve)} are free beside the reserve of {reserve}",
            where=str(path),
            hint="free space there, then try again",
        )


def reserve_blocks(fd: int, size: int) -> bool:
    """Give a file the blocks for its first `size` bytes, without changing its length, so that writing them cannot hit a
    full disk. False where there is no space, or the file system cannot do it. Source: fallocate(2).
    """
    result: int = _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size))
    return result == 0


def copy_metadata(source: int, target: int, status: os.stat_result) -> None:
    """Give `target` owner, mode, xattrs and times of `source`, whose status is at hand. Both are descriptors. Raises: OSError.

    Not what the kernel or the host's policy keeps there for itself: overlayfs's own marks and SELinux labels.
    """
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(("trusted.", "user.overlay.", "security.selinux")):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_data(reading: int, writing: int, size: int) -> None:
    """The first `size` bytes of one file into another, empty one, holes staying holes; less when it is cut meanwhile. Blocking."""
    at = 0
    while at < size:
        try:
            start = os.lseek(reading, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            break
        end = min(os.lseek(reading, start, os.SEEK_HOLE), size)
        os.lseek(writing, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(writing, reading, start, min(_COPY, end - start))
            if not sent:
                return
            start += sent
        at = end
    os.ftruncate(writing, size)


def safe_component(text: str, what: str) -> str:
    """`text` if it can be one path component of ours. Raises: InvalidArgument."""
    if not text or text in (".", "..") or "/" in text or "\0" in text or len(text.encode()) > 255:
        raise InvalidArgument(f'{what} "{printable(text, 120)}" cannot be a file name')
    return text
