"""Namespaces of a pod, pinned by bind mounts below STATE/sandboxes/ID/ns/ so that no process has to hold them.

Without a user namespace: one fresh thread unshares, configures (loopback up, host name, sysctls) and binds its own
/proc entries. With one: a child process is needed, because only a new process can be the first in a user namespace; its
network, IPC and UTS namespaces are created inside so that the pod's root owns them.

Source: namespaces(7), user_namespaces(7).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.base import kernel
from imgsvc.base.errors import FailedPrecondition, Internal
from imgsvc.base.removal import discard, unmount_below
from imgsvc.runtime.core import Core
from imgsvc.runtime.holder.interfaces import Kind
from imgsvc.runtime.model import IDMapping, UserNamespace
from imgsvc.runtime.numbers.usage import Usage
from imgsvc.runtime.records import SandboxRecord
from imgsvc.runtime.spec import sysctls

KINDS: Final[Mapping[str, int]] = {"net": kernel.CLONE_NEWNET, "ipc": kernel.CLONE_NEWIPC, "uts": kernel.CLONE_NEWUTS}
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1

# The child of a user-namespaced pod: waits until its maps are written, makes the other namespaces, waits to be bound.
_CHILD: Final = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
def unshare(flags):
    if libc.unshare(flags):
        sys.exit(f"unshare: errno {ctypes.get_errno()}")
unshare(0x10000000)
print("user", flush=True)
sys.stdin.readline()
libc.setgroups(0, None)
if libc.setresgid(0, 0, 0) or libc.setresuid(0, 0, 0):
    sys.exit(f"setresuid: errno {ctypes.get_errno()}")
unshare(int(sys.argv[1]))
print("rest", flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True, slots=True)
class NamespacePlan:
    """What to make. kinds: some of KINDS; user: None keeps the host's user namespace."""

    kinds: tuple[str, ...]
    user: UserNamespace | None = None
    hostname: str = ""
    sysctls: Mapping[str, str] | None = None


def pin(directory: Path, plan: NamespacePlan) -> None:
    """Make the namespaces of a pod and bind each to directory/KIND. Blocking, about 1 ms (40 ms with a user namespace).

    After a failure unpin() is owed, too. Raises: FailedPrecondition (a sysctl or a mapping was refused), OSError.
    """
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    if plan.user is None:
        kernel.in_fresh_thread(lambda: _pin_thread(directory, plan))
    else:
        _pin_child(directory, plan, plan.user)


def unpin(directory: Path) -> None:
    """Let the namespaces go. Idempotent."""
    unmount_below(directory)
    discard(directory)


def pinned(directory: Path, kind: str) -> bool:
    """Whether a namespace is bound there: after a reboot the file may be back, the namespace is not."""
    try:
        return os.stat(directory / kind).st_dev != os.stat(directory).st_dev
    except OSError:
        return False


def _flags(kinds: Sequence[str]) -> int:
    flags = 0
    for kind in kinds:
        flags |= KINDS[kind]
    return flags


def _bind(source: str, target: Path) -> None:
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    kernel.mount(source, str(target), "", kernel.MS_BIND)


def _pin_thread(directory: Path, plan: NamespacePlan) -> None:
    kernel.unshare(_flags(plan.kinds))
    _configure(plan)
    for kind in plan.kinds:
        # /proc/self/ns would be the main thread's.
        _bind(f"/proc/self/task/{threading.get_native_id()}/ns/{kind}", directory / kind)


def _pin_child(directory: Path, plan: NamespacePlan, user: UserNamespace) -> None:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, str(_flags(plan.kinds))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin
    assert child.stdout
    assert child.stderr
    try:
        if child.stdout.readline() != "user\n":
            raise FailedPrecondition(f"a user namespace cannot be made: {child.stderr.read().strip()}")
        for name, mappings in (("uid_map", user.uids), ("gid_map", user.gids)):
            _write_map(child.pid, name, mappings)
        child.stdin.write("\n")
        child.stdin.flush()
        if child.stdout.readline() != "rest\n":
            raise FailedPrecondition(f"namespaces inside a user namespace cannot be made: {child.stderr.read().strip()}")
        for kind in ("user", *plan.kinds):
            _bind(f"/proc/{child.pid}/ns/{kind}", directory / kind)
    finally:
        child.kill()
        child.communicate()
    kernel.in_fresh_thread(lambda: _enter_and_configure(directory, plan))


def _write_map(pid: int, name: str, mappings: Sequence[IDMapping]) -> None:
    lines = "".join(f"{m.container_id} {m.host_id} {m.length}\n" for m in mappings)
    try:
        with open(f"/proc/{pid}/{name}", "w") as stream:
            stream.write(lines)
    except OSError as error:
        raise FailedPrecondition(f"the ID mapping was refused by the kernel: {error.strerror}", where=name) from error


def _enter_and_configure(directory: Path, plan: NamespacePlan) -> None:
    _enter(directory, plan.kinds)
    _configure(plan)


def _enter(directory: Path, kinds: Sequence[str]) -> None:
    for kind in kinds:
        fd = os.open(directory / kind, os.O_RDONLY | os.O_CLOEXEC)
        try:
            kernel.setns(fd, KINDS[kind])
        finally:
            os.close(fd)


def _configure(plan: NamespacePlan) -> None:
    """Runs inside the namespaces."""
    if "net" in plan.kinds:
        _loopback_up()
    if "uts" in plan.kinds and plan.hostname:
        kernel.sethostname(plan.hostname)
    for name, value in (plan.sysctls or {}).items():
        write_sysctl(name, value)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def set_network_sysctls(directory: Path, values: Mapping[str, str]) -> None:
    """Set sysctls in the pinned network namespace. Blocking. Raises: FailedPrecondition, OSError."""

    def run() -> None:
        _enter(directory, ("net",))
        for name, value in values.items():
            write_sysctl(name, value)

    kernel.in_fresh_thread(run)


def write_sysctl(name: str, value: str) -> None:
    """Set one sysctl as seen by the calling thread. The name was checked by validate.sysctls."""
    try:
        with open(Path("/proc/sys", *sysctls.parts(name)), "w") as stream:
            stream.write(value)
    except FileNotFoundError as error:
        raise FailedPrecondition(f"there is no sysctl {name}", hint="the kernel or the pod's network does not have it") from error
    except OSError as error:
        raise FailedPrecondition(f"sysctl {name} cannot be set to {value!r}: {error.strerror}") from error


def userns_fd(user: UserNamespace) -> int:
    """A descriptor of a user namespace with these mappings, for idmapped mounts. Blocking, about 20 ms."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin
    assert child.stdout
    try:
        if child.stdout.readline() != "user\n":
            raise Internal("a user namespace for an idmapped mount cannot be made")
        for name, mappings in (("uid_map", user.uids), ("gid_map", user.gids)):
            _write_map(child.pid, name, mappings)
        return os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        child.kill()
        child.communicate()


class NamespaceHolder:
    """Holds a pod by its pinned namespaces alone; there is no process. Satisfies PodHolder."""

    def __init__(self, core: Core) -> None:
        pass

    async def start(self, record: SandboxRecord) -> int:
        """Nothing to do: the namespaces are pinned."""
        return 0

    async def end(self, record: SandboxRecord) -> None:
        """Nothing to do: the namespaces go with the pod's files."""

    def has_ended(self, record: SandboxRecord) -> bool:
        """False."""
        return False

    async def wait(self, record: SandboxRecord) -> None:
        """For ever: bind mounts do not end by themselves."""
        await asyncio.Event().wait()

    def pid(self, record: SandboxRecord) -> int:
        """0: it has no PID namespace."""
        return 0

    async def info(self, record: SandboxRecord) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    async def usage(self, record: SandboxRecord) -> Usage | None:
        """None: the pod's cgroup says it."""
        return None


KIND: Final = Kind("namespaces", lambda core, record: True, NamespaceHolder, can_end=False)
