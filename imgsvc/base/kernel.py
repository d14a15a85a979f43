"""System calls that Python 3.11 does not offer, by ctypes: mounts, namespaces, openat2, capabilities, prctl.

Each wrapper raises OSError like the functions of `os`. ctypes releases the interpreter lock during the call.

unshare() and setns() change one *thread*. Call them on threads that end afterwards (in_fresh_thread) or in processes that
have no other, never on the event loop or in a pool.

Source: the man pages of section 2 of the same names; linux/openat2.h, linux/mount.h, linux/capability.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

from imgsvc.base import procfs

T = TypeVar("T")

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
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
_MS_NOATIME: Final = 1024
_MS_RELATIME: Final = 1 << 21
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_PR_CAPBSET_READ: Final = 23
_PR_SET_CHILD_SUBREAPER: Final = 36

# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_KEPT: Final = 32 * 1024**2  # [bytes]; the largest threshold that glibc takes
_GROWTH: Final = 2 * 1024**2  # [bytes] taken from the kernel at a time

_SECCOMP_MODE_FILTER: Final = 2

_HELPER_NICE: Final = 10
_HELPER_OOM_SCORE: Final = 500

# linux/capability.h
CAP_CHOWN: Final = 0
CAP_DAC_OVERRIDE: Final = 1
CAP_DAC_READ_SEARCH: Final = 2
CAP_FOWNER: Final = 3
CAP_FSETID: Final = 4
CAP_SYS_ADMIN: Final = 21
CAP_MKNOD: Final = 27
CAP_SETFCAP: Final = 31
_CAPABILITY_VERSION_3: Final = 0x20080522

_MOUNT_FLAGS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "ro": MS_RDONLY,
        "rw": 0,
        "nosuid": MS_NOSUID,
        "nodev": MS_NODEV,
        "noexec": MS_NOEXEC,
        "bind": MS_BIND,
        "rbind": MS_BIND | MS_REC,
        "relatime": _MS_RELATIME,
        "noatime": _MS_NOATIME,
    }
)
_PAGE: Final = 4095  # [bytes] of option text that mount(2) takes

_SYS_OPEN_TREE: Final = 428  # the numbers from 424 on are the same on every architecture
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MOUNT_ATTR_RDONLY: Final = 1
_MOUNT_ATTR_NOSUID: Final = 2
_MOUNT_ATTR_NODEV: Final = 4
_MOUNT_ATTR_NOEXEC: Final = 8
_MOUNT_ATTR_IDMAP: Final = 0x100000
_MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _check(result: int, path: object = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int(result)


def syscall(number: int, *arguments: object, missing: int | None = None) -> int:
    """A system call by its number. missing: what to answer when this kernel does not have it, or has it turned off. Raises: OSError."""
    result = int(_syscall(number, *arguments))
    if result < 0 and missing is not None and ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return missing
    return _check(result)


# Opening


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
        if code != errno.EAGAIN:  # a rename raced with the look-up of ".."
            raise OSError(code, os.strerror(code), path)


def open_in_root(root: str | Path, path: str, flags: int) -> int:
    """Open `path` as a process chrooted into `root` would see it: symlinks and `..` stay inside, magic links fail.

    Returns a descriptor the caller closes. Raises: OSError.
    """
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return openat2(base, os.fsencode(path) or b".", flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    finally:
        os.close(base)


def open_on_mount(dir_fd: int, name: bytes, flags: int) -> int:
    """Open the directory `name` (or "..") of an open directory, on the same mount as that one. Not a link, not a mount point.

    Before Linux 5.6, and where a seccomp filter does not know openat2, the mount IDs of the two descriptors are compared.
    Raises: OSError; EXDEV for a mount point, ENOTSUP where the kernel tells no mount IDs (before 3.15).
    """
    flags |= os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return openat2(dir_fd, name, flags, RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
    fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        if procfs.mount_id(fd) != procfs.mount_id(dir_fd):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    except BaseException:
        os.close(fd)
        raise
    return fd


# Mounting


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Attach a file system or a directory at `target`; `data` is at most a page. Raises: OSError naming the target."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), os.fsencode(kind) or None, ctypes.c_ulong(flags), os.fsencode(data) or None
    )
    _check(result, target)


def mount_with_options(source: str, target: str, kind: str, options: Sequence[str]) -> None:
    """Mount with options as in /etc/fstab; kind "bind" for a bind mount, and overlays of as many layers as there are.

    Raises: OSError naming the target.
    """
    flags, data = 0, []
    for option in options:
        if option in _MOUNT_FLAGS:
            flags |= _MOUNT_FLAGS[option]
        else:
            data.append(option)
    if kind == "bind" or flags & MS_BIND:
        mount(source, target, "", flags | MS_BIND)
        if extra := flags & ~(MS_BIND | MS_REC):  # a bind takes them on the second call only
            mount("", target, "", MS_REMOUNT | MS_BIND | extra)
    elif len(os.fsencode(",".join(data))) <= _PAGE:
        mount(source, target, kind, flags, ",".join(data))
    else:
        _mount_relative(source, os.path.abspath(target), kind, flags, data)


def _mount_relative(source: str, target: str, kind: str, flags: int, data: Sequence[str]) -> None:
    """Lower directories relative to the one they share, from a thread with a working directory of its own: a page holds about 500."""
    lowers = next(option for option in data if option.startswith("lowerdir=")).removeprefix("lowerdir=").split(":")
    base = os.path.commonpath(lowers)
    short = "lowerdir=" + ":".join(os.path.relpath(lower, base) for lower in lowers)
    text = ",".join(short if option.startswith("lowerdir=") else option for option in data)

    def run() -> None:
        unshare(CLONE_FS)  # this thread only: the process keeps its working directory
        os.chdir(base)
        mount(source, target, kind, flags, text)

    in_fresh_thread(run)


def mount_new(kind: str, options: Sequence[tuple[str, str]], target: str, *, read_only: bool = False) -> None:
    """Mount a file system with any number of options of at most 255 bytes each (Linux 5.2). Raises: OSError naming the target."""
    context = _check(_syscall(_SYS_FSOPEN, ctypes.c_char_p(kind.encode()), ctypes.c_uint(_FSOPEN_CLOEXEC)), target)
    try:
        if read_only:
            _configure(context, _FSCONFIG_SET_FLAG, "ro", None, target)
        for name, value in options:
            _configure(context, _FSCONFIG_SET_STRING, name, value, target)
        _configure(context, _FSCONFIG_CMD_CREATE, None, None, target)
        attributes = ctypes.c_uint(_MOUNT_ATTR_RDONLY if read_only else 0)
        tree = _check(_syscall(_SYS_FSMOUNT, context, ctypes.c_uint(_FSOPEN_CLOEXEC), attributes), target)
    finally:
        os.close(context)
    _attach(tree, target)


def _configure(context: int, command: int, name: str | None, value: str | None, target: str) -> None:
    key, text = (None if part is None else ctypes.c_char_p(os.fsencode(part)) for part in (name, value))
    _check(_syscall(_SYS_FSCONFIG, context, ctypes.c_uint(command), key, text, 0), target)


def umount(target: str | bytes | Path, *, in_use: bool = True) -> bool:
    """Detach the topmost mount at `target`; False when nothing is mounted there. in_use: also if it is, then it is gone with its last user.

    Raises: OSError; EBUSY without in_use.
    """
    try:
        _check(_libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW | (_MNT_DETACH if in_use else 0)), str(target))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # not a mount point
            return False
        raise
    return True


def make_private(target: str | bytes) -> None:
    """Take a mount and all below it out of their peer groups: mounts no longer propagate in either direction. Raises: OSError."""
    _check(_libc.mount(None, os.fsencode(target), None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), target)


def idmapped_mount(source: str, target: str, userns_fd: int, *, recursive: bool = False, read_only: bool = False) -> None:
    """Bind `source` on `target` so that IDs are seen through the mapping of a user namespace (Linux 5.12).

    Raises: OSError; EINVAL when the file system cannot be mapped.
    """
    attributes = _MOUNT_ATTR_IDMAP | (_MOUNT_ATTR_RDONLY if read_only else 0)
    _attach(_clone(source, attributes, userns_fd, recursive=recursive), target)


def bind_fd(fd: int, target: str) -> None:
    """Bind-mount exactly the file or directory behind a descriptor, whatever its path means by now."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
    _attach(_check(_syscall(_SYS_OPEN_TREE, fd, ctypes.c_char_p(b""), flags), target), target)


def without_links(directory: str) -> int:
    """A descriptor of `directory` through which no path follows a symbolic link: a mount of its own, gone when it is closed.

    Raises: OSError (not allowed; unsupported before Linux 5.14).
    """
    return _clone(directory, _MOUNT_ATTR_NOSYMFOLLOW, 0)


def detached(directory: str) -> int:
    """A descriptor of `directory` as the root of a mount of its own that hangs nowhere: no devices, no programs, nothing above it.

    Raises: OSError (not allowed; unsupported before Linux 5.12).
    """
    tree = _clone(directory, _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC, 0)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)  # that one can only be looked at
    finally:
        os.close(tree)


def _clone(source: str, attributes: int, userns_fd: int, *, recursive: bool = False) -> int:
    """A detached bind mount of `source`, with some attributes set."""
    more = _AT_RECURSIVE if recursive else 0
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | more)
    tree = _check(_syscall(_SYS_OPEN_TREE, _AT_FDCWD, ctypes.c_char_p(os.fsencode(source)), flags), source)
    try:
        packed = struct.pack("<4Q", attributes, 0, 0, userns_fd)
        empty = ctypes.c_char_p(b"")
        _check(_syscall(_SYS_MOUNT_SETATTR, tree, empty, ctypes.c_uint(_AT_EMPTY_PATH | more), packed, ctypes.c_size_t(32)), source)
    except BaseException:
        os.close(tree)
        raise
    return tree


def _attach(tree: int, target: str) -> None:
    """Attach a detached mount at its place, and close its descriptor."""
    try:
        empty, where = ctypes.c_char_p(b""), ctypes.c_char_p(os.fsencode(target))
        _check(_syscall(_SYS_MOVE_MOUNT, tree, empty, _AT_FDCWD, where, ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)), target)
    finally:
        os.close(tree)


def syncfs(fd: int) -> None:
    """Put everything of the file system behind `fd` on disk; reports errors since Linux 5.8."""
    _check(_libc.syncfs(fd))


# Namespaces and privileges


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into a namespace."""
    _check(_libc.setns(fd, kind), "setns")


def unshare(flags: int) -> None:
    """Give the calling thread namespaces or attributes of its own."""
    _check(_libc.unshare(flags), "unshare")


def unshare_mounts() -> None:
    """Give the calling thread mounts of its own, that follow the host's."""
    unshare(CLONE_NEWNS)
    mount("", "/", "", MS_REC | MS_SLAVE)  # slave: unmounts of the host still get through


def in_fresh_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread of its own that ends afterwards, taking its namespaces with it. Blocking. Raises: as `work`."""
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


def sethostname(name: str) -> None:
    """Set the host name of the calling thread's UTS namespace."""
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), "sethostname")


def prctl(option: int, argument: int) -> None:
    """Set one attribute of this process or thread."""
    _check(_libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), "prctl")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """Judge every system call of this thread, and of what it starts, by a BPF program (struct sock_filter, 8 bytes each)."""
    filtered = _Program(len(program) // 8, program)
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(filtered), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def stand_back() -> None:
    """What a helper of the daemon's gives up before it sees anything of a stranger's: core dumps, new privileges, and its place
    before pods and the daemon itself; inherited by its children. Killing it costs a retry, killing a pod costs a user.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    os.nice(_HELPER_NICE)
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as stream:
            stream.write(str(_HELPER_OOM_SCORE))
    except OSError:
        pass  # no /proc, or a container that forbids it: only a preference, so nothing breaks


def keep_freed_memory() -> None:
    """Have the C library's allocator keep what is freed, up to 64 MiB, instead of giving it back to the kernel at once.

    For processes that take and free chunks of some 100 KiB all the time: each chunk given back and taken again costs a page
    fault per 4 KiB. Without effect where the library has no such setting.
    """
    if mallopt := getattr(_libc, "mallopt", None):
        for option, value in ((_M_MMAP_THRESHOLD, _KEPT), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _GROWTH)):
            mallopt(option, value)


def fixed_memory(name: str, size: int) -> int:
    """A memfd of so many bytes, for the caller to close, whose size is fixed for every process it is shared with.

    A process that reads a mapping beyond its end dies, and a memfd that grows takes memory that no limit counts. Raises: OSError.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def become_subreaper() -> None:
    """Orphans of our children become our children, not process 1's: they are reaped at once, by us."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def bounding_set() -> frozenset[int]:
    """Capability numbers this process, and so any container of it, can ever have."""
    return frozenset(number for number in range(64) if _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1)


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
