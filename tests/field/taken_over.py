"""The helper processes with an attacker's code in the place of their own work, started as the daemon starts them.

    python -m tests.field.taken_over DOWNLOAD|UNPACK CONTROL

It says what it managed as one line of JSON on its standard error: {attempt: "done" or the name of an errno}. In the environment:
VICTIM, a file that only root may read; DAEMON, a process; SOCKET, the path of a listening socket; POWERLESS, set for a root
without capabilities.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Callable

from imgsvc.base import kernel
from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import InvalidArgument
from imgsvc.registry.http import bulk_worker
from imgsvc.snapshot.unpack import extract
from imgsvc.snapshot.unpack import worker as unpack_worker

VICTIM, DAEMON, SOCKET = os.environ["VICTIM"], int(os.environ["DAEMON"]), os.environ["SOCKET"]
_PTRACE_SEIZE = 0x4206
_libc = ctypes.CDLL(None, use_errno=True)


def _called(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def _write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))


def _read(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _device() -> None:
    os.mknod("made", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.close(os.open("made", os.O_WRONLY))


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def _datagram() -> None:
    """A pair of sockets may be connected elsewhere."""
    for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
        end.close()


def _open_socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def _start() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def _fork() -> None:
    if not os.fork():
        os._exit(0)


def _become_root() -> None:
    if os.getuid() == 0:
        raise OSError(errno.EPERM, "")  # it is one without the power, which the other attempts show
    os.setuid(0)


ATTEMPTS: dict[str, Callable[[], None]] = {
    "write /etc": lambda: _write("/etc/imgsvc-taken-over"),
    "write the victim": lambda: _write(VICTIM),
    "remove the victim": lambda: os.unlink(VICTIM),
    "read the victim": lambda: _read(VICTIM),
    "read /etc/shadow": lambda: _read("/etc/shadow"),
    "read through ..": lambda: _read("../../../../../../../../etc/shadow"),
    "read through init": lambda: _read("/proc/1/root/etc/shadow"),
    "set core_pattern": lambda: _write("/proc/sys/kernel/core_pattern"),
    "read the daemon's memory": lambda: _read(f"/proc/{DAEMON}/mem"),
    "change the victim's mode": lambda: os.chmod(VICTIM, 0o666),
    "change the victim's owner": lambda: os.chown(VICTIM, 1, 1),
    "trace the daemon": lambda: _called(_libc.ptrace(_PTRACE_SEIZE, DAEMON, None, None)),
    "mount": lambda: kernel.mount("none", "/", "tmpfs"),
    "leave the root": lambda: os.chroot("/"),
    "new namespaces": lambda: kernel.unshare(kernel.CLONE_NEWNS | 0x10000000),
    "open a device": _device,
    "connect to the daemon": lambda: _connect(SOCKET),
    "make a datagram pair": _datagram,
    "open a raw socket": lambda: _open_socket(socket.AF_INET, socket.SOCK_RAW),
    "open an internet socket": lambda: _open_socket(socket.AF_INET, socket.SOCK_STREAM),
    "kill the daemon": lambda: os.kill(DAEMON, 0),
    "start a program": _start,
    "fork": _fork,
    "become root": _become_root,
    "add a key": lambda: _called(_libc.syscall(250, 0, -3, 1)),
}


def attack() -> dict[str, str]:
    """Try everything."""
    found = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno or 0, str(error))
    return found


def report() -> None:
    """Say it."""
    print(json.dumps(attack()), file=sys.stderr, flush=True)


async def _instead_of_downloading(control: socket.socket) -> None:
    await in_thread(report)


def _instead_of_extracting(extractor: object, stream: object) -> None:
    report()
    raise InvalidArgument("taken over")


if __name__ == "__main__":
    if "POWERLESS" in os.environ:
        kernel.keep_capabilities(0)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    role, sys.argv[1:] = sys.argv[1], [*sys.argv[2:], ""]
    if role == "DOWNLOAD":
        bulk_worker.serve = _instead_of_downloading
        bulk_worker.main()
    extract.Extractor.run = _instead_of_extracting  # type: ignore[assignment, method-assign]  # that is what being taken over means
    unpack_worker.serve(socket.socket(fileno=int(sys.argv[1])), "")
