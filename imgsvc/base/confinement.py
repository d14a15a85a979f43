"""What a helper process of the daemon gives up before it reads untrusted bytes: users, files, system calls.

A helper that parses untrusted input may be taken over. Each measure works alone and is left out where this kernel or the
daemon's own rights do not allow it:

* a user of its own (become_stranger), as root only: it owns no file and no other process on the node.
* a root directory without a way out (enter), as root only: a detached mount, with devices and programs off.
* Landlock (only_below), for a daemon that is not root: opening and changing names below one directory only. It does not cover
  chmod, chown and times, which is why it is the second choice. From Linux 5.13 on.
* a system call filter (allow_only): a list of what is needed; all else fails as on a kernel that does not have the call, so that
  libraries fall back. Source: seccomp(2), linux/filter.h, linux/seccomp.h, asm/unistd.h, landlock(7).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from imgsvc.base import kernel

# Debian keeps 65533 and those around for itself without using them, systemd's dynamic users end at 65519, and a user namespace of
# 65536 IDs has it. It needs no entry in /etc/passwd.
STRANGER: Final = 65529


def become_stranger() -> bool:
    """Run as a user and group that own nothing, without capabilities; False when this process may not change its user."""
    try:
        os.setgroups(())
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):  # EINVAL: this user namespace has no such ID
            raise
    kernel.keep_capabilities(0)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # other processes of this user must not inspect it
    return os.getuid() == STRANGER


def enter(root: int) -> bool:
    """Make the directory behind a descriptor this process's root; False, and Landlock instead, when it may not change that.

    With a detached mount (kernel.detached), there is nothing above it. Drop CAP_SYS_CHROOT and close other directories afterwards.
    """
    try:
        os.fchdir(root)
        os.chroot(".")
    except PermissionError:
        only_below(root)
        return False
    sys.meta_path.clear()  # a late import would take its code from the directory
    return True


# Landlock

_LANDLOCK_CREATE: Final = 444
_LANDLOCK_ADD: Final = 445
_LANDLOCK_RESTRICT: Final = 446
_VERSION: Final = 1
_BENEATH: Final = 1
_EXECUTE: Final = 1
_READ: Final = 1 << 2 | 1 << 3  # files, directories
_RIGHTS: Final = (13, 14, 15)  # kinds of access that versions 1, 2, 3 and later know; those of ioctl (5) are not asked for
_SCOPES: Final = (0, 0, 0, 0, 0, 3)  # version 6: no abstract sockets and no signals to processes outside


def only_below(root: int | None, *, reads: bool = True) -> bool:
    """Forbid opening, making and removing files but below the directory `root` (None: anywhere). reads: those as well, and executing.

    False without Landlock. Needs PR_SET_NO_NEW_PRIVS. Of the calling thread and what it starts.
    """
    version = kernel.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION), missing=-1)
    if version < 1:
        return False
    handled = (1 << _RIGHTS[min(version, len(_RIGHTS)) - 1]) - 1
    if not reads:
        handled &= ~(_READ | _EXECUTE)
    scoped = _SCOPES[min(version, len(_SCOPES)) - 1]
    attributes = struct.pack("<QQQ", handled, 0, scoped)
    size = 24 if scoped else 8  # an older kernel takes what it knows
    ruleset = kernel.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint(0))
    try:
        if root is not None:
            kernel.syscall(_LANDLOCK_ADD, ruleset, _BENEATH, struct.pack("<Qi", handled & ~_EXECUTE, root), ctypes.c_uint(0))
        kernel.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint(0))
    finally:
        os.close(ruleset)
    return True


# System calls


class Calls(Enum):
    """What kinds of helpers need."""

    DOWNLOAD = "download"
    UNPACK = "unpack"
    SETTLE = "settle"


# Numbers on (x86_64, aarch64); None where an architecture does not have a call.
_RUNTIME: Final = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe": (22, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "exit": (60, 93),
    "uname": (63, 160),
    "fsync": (74, 82),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "openat": (257, 56),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "getrandom": (318, 278),
    "memfd_create": (319, 279),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
_NETWORK: Final = {
    "connect": (42, 203),
    "shutdown": (48, 210),
    "bind": (49, 200),  # of the netlink socket that tells a resolver which addresses this node has
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "setsockopt": (54, 208),
    "getsockopt": (55, 209),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "recvmmsg": (299, 243),
    "sendmmsg": (307, 269),
    "epoll_pwait2": (441, 441),
}
_FILES: Final = {
    "ftruncate": (77, 46),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "link": (86, None),
    "unlink": (87, None),
    "symlink": (88, None),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "umask": (95, 166),
    "mknod": (133, None),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "fgetxattr": (193, 10),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "fadvise64": (221, 223),
    "mkdirat": (258, 34),
    "mknodat": (259, 33),
    "fchownat": (260, 54),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "fchmodat": (268, 53),
    "utimensat": (280, 88),
    "fallocate": (285, 47),
    "renameat2": (316, 276),
    "copy_file_range": (326, 285),
    "openat2": (437, 437),
    "fchmodat2": (452, 452),
}
_MOUNTING: Final = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "capget": (125, 90),
    "capset": (126, 91),
    "unshare": (272, 97),
    "sendfile": (40, 71),
}
CALLS: Final = {
    Calls.DOWNLOAD: _RUNTIME | _NETWORK,
    Calls.UNPACK: _RUNTIME | _FILES,
    Calls.SETTLE: _RUNTIME | _FILES | _MOUNTING,
}


@dataclass(frozen=True, slots=True)
class _Machine:
    """An architecture. audit: linux/audit.h; numbers: of the calls whose arguments are looked at."""

    column: int
    audit: int
    clone: int
    fcntl: int
    ioctl: int
    kill: int
    prctl: int
    prlimit64: int
    socket: int
    socketpair: int
    tgkill: int


_MACHINES: Final = {
    "x86_64": _Machine(0, 0xC000003E, 56, 72, 16, 62, 157, 302, 41, 53, 234),
    "aarch64": _Machine(1, 0xC00000B7, 220, 25, 29, 129, 167, 261, 198, 199, 131),
}

_ALLOW: Final = 0x7FFF0000
_FAIL: Final = 0x00050000  # with an errno
_KILL: Final = 0x80000000
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_NUMBER_AT: Final = 0  # in struct seccomp_data
_MACHINE_AT: Final = 4
_CLONE_THREAD: Final = 0x10000
_PR_SET_NAME: Final = 15
_F_SETOWN: Final = (8, 15)  # and F_SETOWN_EX: they have the kernel send signals
_IOCTLS: Final = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: of Python's files and sockets
_NETS: Final = (2, 10)  # AF_INET, AF_INET6
_AF_NETLINK: Final = 16
_STREAM_PAIRS: Final = (
    1,
    1 | 0x80000,
    1 | 0x800,
    1 | 0x80000 | 0x800,
)  # SOCK_STREAM with flags; a pair of datagrams could be connected elsewhere


def allow_only(calls: Calls) -> bool:
    """Have every system call fail from now on but those of this kind of helper; False on an architecture without a list.

    Call it while the process has one thread. Needs PR_SET_NO_NEW_PRIVS. Raises: OSError.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None or sys.maxsize < 1 << 32:
        return False
    program = _fixed(calls, machine) + _own_process(machine)
    kernel.filter_calls(program + _answer(_FAIL | errno.ENOSYS))
    return True


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _answer(value: int) -> bytes:
    return _instruction(_RETURN, value)


def _argument(number: int) -> bytes:
    """Load the low half of an argument; the kernel looks at no more of an int."""
    return _instruction(_LOAD, 16 + 8 * number)


def _one_of(values: Sequence[int]) -> bytes:
    """Allow when what is loaded is one of these."""
    return b"".join(_instruction(_EQUAL, value, 0, 1) + _answer(_ALLOW) for value in values)


def _case(number: int, body: bytes, otherwise: int) -> bytes:
    """For one system call: a body that allows or falls through to an error. The number is loaded before and, elsewhere, after it."""
    body += _answer(_FAIL | otherwise)
    return _instruction(_EQUAL, number, 0, len(body) // 8) + body


@functools.cache
def _fixed(calls: Calls, machine: _Machine) -> bytes:
    """What is the same in every process."""
    program = (
        _instruction(_LOAD, _MACHINE_AT) + _instruction(_EQUAL, machine.audit, 1, 0) + _answer(_KILL) + _instruction(_LOAD, _NUMBER_AT)
    )
    program += _one_of([number for numbers in CALLS[calls].values() if (number := numbers[machine.column]) is not None])
    thread = _argument(0) + _instruction(_ANY_BIT, _CLONE_THREAD, 0, 1) + _answer(_ALLOW)
    program += _case(machine.clone, thread, errno.EPERM)
    owners = _argument(1) + b"".join(_instruction(_EQUAL, command, 0, 1) + _answer(_FAIL | errno.EPERM) for command in _F_SETOWN)
    program += _case(machine.fcntl, owners + _answer(_ALLOW), errno.EPERM)
    program += _case(machine.ioctl, _argument(1) + _one_of(_IOCTLS), errno.EPERM)
    names = (_PR_SET_NAME,) if calls is not Calls.SETTLE else (_PR_SET_NAME, kernel.PR_SET_PDEATHSIG)
    program += _case(machine.prctl, _argument(0) + _one_of(names), errno.EINVAL)
    program += _case(machine.prlimit64, _argument(0) + _one_of((0,)), errno.EPERM)
    if calls is Calls.DOWNLOAD:
        routes = _argument(2) + _instruction(_EQUAL, 0, 0, 1) + _answer(_ALLOW)  # NETLINK_ROUTE
        netlink = _instruction(_EQUAL, _AF_NETLINK, 0, len(routes) // 8) + routes
        program += _case(machine.socket, _argument(0) + _one_of(_NETS) + netlink, errno.EAFNOSUPPORT)
        program += _case(machine.socketpair, _argument(1) + _one_of(_STREAM_PAIRS), errno.EAFNOSUPPORT)
    return program


def _own_process(machine: _Machine) -> bytes:
    """Signals to this process alone, as abort() sends."""
    own = _argument(0) + _one_of((os.getpid(),))
    return _case(machine.kill, own, errno.EPERM) + _case(machine.tgkill, own, errno.EPERM)
