"""System calls that Python 3.11 does not offer: mounts, namespaces, openat2, prctl. All of them release the GIL.

setns() and unshare() change one *thread*. Call them on threads that end afterwards (see in_fresh_thread), never on the
event loop or in a pool.

Source: mount(2), umount2(2), setns(2), unshare(2), openat2(2), open_tree(2), mount_setattr(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

T = TypeVar("T")

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

MOUNT_FLAGS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "ro": MS_RDONLY,
        "rw": 0,
        "nosuid": MS_NOSUID,
        "nodev": MS_NODEV,
        "noexec": MS_NOEXEC,
        "bind": MS_BIND,
        "rbind": MS_BIND | MS_REC,
        "relatime": 1 << 21,
        "noatime": 1024,
    }
)
_PAGE: Final = 4096  # mount(2) takes one page of option text

_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MOUNT_ATTR_RDONLY: Final = 1
_MOUNT_ATTR_IDMAP: Final = 0x100000
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_CAPBSET_READ: Final = 23

_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _syscall(number: int, *arguments: object, what: str = "") -> int:
    wrapped = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _call(int(_libc.syscall(ctypes.c_long(number), *wrapped)), what)


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Attach a file system or a directory at `target`. Raises: OSError naming the target. Source: the manual of mount."""
    result = _libc.mount(source.encode(), target.encode(), fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None)
    _call(int(result), target)


def mount_with_options(source: str, target: str, fstype: str, options: Sequence[str]) -> None:
    """Mount with options as in /etc/fstab; option text longer than a page goes through fsconfig(2) piece by piece."""
    flags, data = 0, []
    for option in options:
        if option in MOUNT_FLAGS:
            flags |= MOUNT_FLAGS[option]
        else:
            data.append(option)
    text = ",".join(data)
    if len(text) >= _PAGE and fstype == "overlay":
        _mount_long_overlay(target, data, flags)
        return
    mount(source, target, "" if flags & MS_BIND else fstype, flags, text)
    if flags & MS_BIND and flags & MS_RDONLY:  # a bind mount takes its flags in a second step only
        mount("", target, "", flags | MS_REMOUNT)


def _mount_long_overlay(target: str, data: Sequence[str], flags: int) -> None:
    context = _syscall(_SYS_FSOPEN, b"overlay", 1, what=target)
    try:
        for option in data:
            key, _, value = option.partition("=")
            value = value.strip('"')  # quotes belong to mount(2)'s one line of options
            for part in value.split(":") if key == "lowerdir" else (value,):
                name = "lowerdir+" if key == "lowerdir" else key
                _syscall(_SYS_FSCONFIG, context, 1, name.encode(), part.encode(), 0, what=target)
        _syscall(_SYS_FSCONFIG, context, 6, None, None, 0, what=target)
        tree = _syscall(_SYS_FSMOUNT, context, 1, flags & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC), what=target)
    finally:
        os.close(context)
    _attach(tree, target)


def umount(target: str | Path, flags: int = MNT_DETACH | UMOUNT_NOFOLLOW) -> bool:
    """Unmount the topmost mount at `target`; False when nothing is mounted there."""
    try:
        _call(int(_libc.umount2(os.fsencode(target), flags)), str(target))
    except OSError as error:
        if error.errno in (2, 22):  # ENOENT, EINVAL: not a mount point
            return False
        raise
    return True


def umount_all(target: str | Path) -> None:
    """Unmount everything stacked at `target`."""
    while umount(target):
        pass


def idmapped_clone(source: str, target: str, userns_fd: int, *, recursive: bool = False) -> None:
    """Mount `source` on `target` so that IDs are seen through the mapping of a user namespace (Linux 5.12).

    Raises: OSError; EINVAL when the file system cannot be mapped.
    """
    more = _AT_RECURSIVE if recursive else 0
    tree = _syscall(_SYS_OPEN_TREE, _AT_FDCWD, source.encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC | more, what=source)
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, userns_fd)
    try:
        _syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | more, attributes, len(attributes), what=source)
    except OSError:
        os.close(tree)
        raise
    _attach(tree, target)


def set_readonly_recursive(target: str) -> None:
    """Make a mount and all mounts below it read-only (Linux 5.12)."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    _syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, len(attributes), what=target)


def bind_fd(fd: int, target: str) -> None:
    """Bind-mount exactly the file or directory behind a descriptor, whatever its path means by now."""
    tree = _syscall(_SYS_OPEN_TREE, fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH, what=target)
    _attach(tree, target)


def _attach(tree: int, target: str) -> None:
    try:
        _syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH, what=target)
    finally:
        os.close(tree)


def open_in_root(root: str | Path, path: str, flags: int) -> int:
    """Open `path` as a process chrooted into `root` would see it: symlinks and `..` stay inside, magic links fail.

    Returns a descriptor the caller closes. Raises: OSError. Source: openat2(2) RESOLVE_IN_ROOT.
    """
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        return _syscall(_SYS_OPENAT2, base, path.encode() or b".", how, len(how), what=path)
    finally:
        os.close(base)


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into a namespace."""
    _call(int(_libc.setns(fd, kind)), "setns")


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces."""
    _call(int(_libc.unshare(flags)), "unshare")


def sethostname(name: str) -> None:
    """Set the host name of the calling thread's UTS namespace."""
    raw = name.encode()
    _call(int(_libc.sethostname(raw, len(raw))), "sethostname")


def become_subreaper() -> None:
    """Orphans of our children become our children, not process 1's: they are reaped at once, by us."""
    _call(int(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)), "prctl")


def bounding_set() -> frozenset[int]:
    """Capability numbers this process, and so any container of it, can ever have."""
    return frozenset(number for number in range(64) if _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1)


def in_fresh_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread of its own that ends afterwards, taking its namespaces with it. Blocking."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 -- carried over to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body, name="namespace")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
