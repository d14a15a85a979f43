"""System calls that Python 3.11 does not wrap, by ctypes: openat2, mount and its newer relatives, unshare, capset, prctl.

Each wrapper raises OSError like the functions of `os`. ctypes releases the interpreter lock during the call.

Source: the man pages of section 2 of the same names; linux/openat2.h, linux/mount.h, linux/capability.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_SYS_OPEN_TREE: Final = 428  # the numbers from 424 on are the same on every architecture
_SYS_MOVE_MOUNT: Final = 429
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
CLONE_NEWUSER: Final = 0x10000000
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
MNT_DETACH: Final = 2

_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_AT_EMPTY_PATH: Final = 0x1000
_MOUNT_ATTR_RDONLY: Final = 1
_MOUNT_ATTR_IDMAP: Final = 0x100000
_MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000

PR_SET_PDEATHSIG: Final = 1
PR_SET_NO_NEW_PRIVS: Final = 38
PR_SET_DUMPABLE: Final = 4

# linux/capability.h
CAP_CHOWN: Final = 0
CAP_DAC_OVERRIDE: Final = 1
CAP_FOWNER: Final = 3
CAP_FSETID: Final = 4
CAP_MKNOD: Final = 27
CAP_SYS_ADMIN: Final = 21
CAP_SETFCAP: Final = 31
_CAPABILITY_VERSION_3: Final = 0x20080522


def _check(result: int, path: object = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return result


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """Open `path` below `dir_fd` under the rules in `resolve`. Raises: OSError; ENOSYS before Linux 5.6."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    while True:
        fd = _syscall(_SYS_OPENAT2, dir_fd, ctypes.c_char_p(path), ctypes.byref(how), ctypes.c_size_t(24))
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        if code != 11:  # EAGAIN: a rename raced with the look-up of ".."
            raise OSError(code, os.strerror(code), path)


def unshare(flags: int) -> None:
    """Leave shared namespaces or attributes; affects the calling thread."""
    _check(_libc.unshare(flags))


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """Mount a file system; `data` is at most a page."""
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()), target)


def umount(target: str, flags: int = 0) -> None:
    """Wrap umount2(2)."""
    _check(_libc.umount2(target.encode(), flags), target)


def syncfs(fd: int) -> None:
    """Put everything of the file system behind `fd` on disk; reports errors since Linux 5.8."""
    _check(_libc.syncfs(fd))


def prctl(option: int, argument: int) -> None:
    """Set one attribute of this process or thread."""
    _check(_libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def effective_capabilities() -> int:
    """Bit mask of this thread's effective capabilities."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data))
    low, _, _, high, _, _ = struct.unpack("<6I", data.raw)
    return int(low | high << 32)


def keep_capabilities(keep: int) -> None:
    """Drop every effective, permitted and inheritable capability outside the bit mask `keep`."""
    kept = effective_capabilities() & keep
    low, high = kept & 0xFFFFFFFF, kept >> 32
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, struct.pack("<6I", low, low, 0, high, high, 0)))


def idmapped_mount(source: str, target: str, userns_fd: int) -> None:
    """Bind `source` read-only on `target` with owners shifted through a user namespace. Raises: OSError (unsupported)."""
    tree = _clone(source, _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY, userns_fd)
    try:
        empty, where = ctypes.c_char_p(b""), ctypes.c_char_p(target.encode())
        _check(_syscall(_SYS_MOVE_MOUNT, tree, empty, -100, where, _MOVE_MOUNT_F_EMPTY_PATH), target)
    finally:
        os.close(tree)


def without_links(directory: str) -> int:
    """A descriptor of `directory` through which no path follows a symbolic link: a mount of its own, gone when it is closed.

    Raises: OSError (not allowed; unsupported before Linux 5.14).
    """
    return _clone(directory, _MOUNT_ATTR_NOSYMFOLLOW, 0)


def _clone(source: str, attributes: int, userns_fd: int) -> int:
    """A bind mount of `source` that is nowhere yet, with some attributes set."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    tree = int(_check(_syscall(_SYS_OPEN_TREE, -100, ctypes.c_char_p(source.encode()), flags), source))
    try:
        packed = struct.pack("<4Q", attributes, 0, 0, userns_fd)
        _check(_syscall(_SYS_MOUNT_SETATTR, tree, ctypes.c_char_p(b""), _AT_EMPTY_PATH, packed, ctypes.c_size_t(32)), source)
    except BaseException:
        os.close(tree)
        raise
    return tree
