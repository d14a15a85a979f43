"""What the kernel says in /proc. Paths and names there are bytes: any file name can be part of a mount point or a command name.

Source: proc(5).
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

_GONE: Final = (FileNotFoundError, ProcessLookupError)  # how /proc says that a process is not there, at once or while it is read
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")  # the kernel writes blank, tab, newline and backslash so


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of mountinfo.

    Attributes:
        root: the directory of the file system that is shown at `point`.
        propagation: the optional fields, such as "shared:N" and "master:N".
    """

    id: int
    parent: int
    device: str
    root: bytes
    point: bytes
    options: tuple[str, ...]
    propagation: tuple[str, ...]
    type: str
    source: bytes
    super_options: bytes


def is_within(path: bytes, directory: bytes) -> bool:
    """Whether an absolute, canonical path is that of a directory or lies below it."""
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")


def mounts(process: str = "self") -> list[Mount]:
    """All mounts a process sees; process: a pid, "self" or "thread-self". Blocking. Raises: OSError."""
    with open(f"/proc/{process}/mountinfo", "rb") as stream:
        return list(parse_mounts(stream))


def parse_mounts(lines: Iterable[bytes]) -> Iterator[Mount]:
    """Lines of mountinfo. Raises: ValueError when one is none."""
    for line in lines:
        fields = line.rstrip(b"\n").split(b" ")
        end = fields.index(b"-", 6)
        number, parent, device, root, point, options = fields[:6]
        yield Mount(
            id=int(number),
            parent=int(parent),
            device=device.decode("ascii"),
            root=_unescaped(root),
            point=_unescaped(point),
            options=tuple(_text(options).split(",")),
            propagation=tuple(map(_text, fields[6:end])),
            type=_text(fields[end + 1]),
            source=_unescaped(fields[end + 2]),
            super_options=_unescaped(fields[end + 3]),
        )


def _unescaped(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field) if b"\\" in field else field


def _text(field: bytes) -> str:
    return field.decode("utf-8", "surrogateescape")


def mount_id(fd: int) -> int:
    """The ID of the mount a descriptor was opened on. Raises: OSError; ENOTSUP where the kernel does not tell it."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as stream:
        for line in stream:
            name, _, value = line.partition(b":")
            if name == b"mnt_id":
                return int(value)
    raise OSError(errno.ENOTSUP, "the kernel does not report mount IDs")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one of the same number by its start [clock ticks since boot].

    Attributes:
        state: one letter, b"Z" for a zombie.
        group: its process group.
        status: how it ended, as wait(2) has it; 0 while it lives, and for readers without permission.
    """

    pid: int
    start: int
    group: int
    state: bytes
    status: int = 0

    @property
    def ended(self) -> bool:
        """Whether only its exit status is left."""
        return self.state in (b"Z", b"X")


def process(pid: int) -> Process | None:
    """What the process table says; None when there is no such process. Blocking.

    Raises: OSError when that cannot be told now.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            # The name, in parentheses, may have anything in it.
            fields = stream.read().rpartition(b")")[2].split()
    except _GONE:
        return None
    return Process(pid, int(fields[19]), int(fields[2]), fields[0], int(fields[49]))


def cgroups(pid: int) -> list[bytes]:
    """Paths of the control groups a process is in, one per hierarchy; [] when it is gone. Blocking. Raises: OSError."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as stream:
            return [line.rstrip(b"\n").split(b":", 2)[2] for line in stream]
    except _GONE:
        return []


def nested(pid: int) -> bool:
    """Whether a process is in a PID namespace below ours; False when it is gone. Blocking. Raises: OSError."""
    try:
        with open(f"/proc/{pid}/status", "rb") as stream:
            return any(line.startswith(b"NSpid:") and len(line.split()) > 2 for line in stream)
    except _GONE:
        return False


def children() -> list[int]:
    """Pids of this process's children. Blocking. Raises: OSError."""
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children", "rb") as stream:
                found += [int(pid) for pid in stream.read().split()]
        except _GONE:  # the thread has ended
            continue
    return found


def interfaces(process: int | str) -> dict[str, list[int]]:
    """The 16 counters of /proc/PID/net/dev by interface, without lo. Blocking. Raises: OSError."""
    with open(f"/proc/{process}/net/dev", "rb") as stream:
        return parse_interfaces(stream)


def parse_interfaces(lines: Iterable[bytes]) -> dict[str, list[int]]:
    """Lines of net/dev. A name is made printable: it is shown to clients, and may be of any bytes."""
    found = {}
    for line in itertools.islice(lines, 2, None):
        name, _, counters = line.rpartition(b":")
        if (name := name.strip(b" ")) != b"lo":
            found[name.decode("utf-8", "backslashreplace")] = [int(counter) for counter in counters.split()]
    return found
