"""What the kernel says in /proc. Paths and names there are bytes: any file name can be part of a mount point or a command name.

Source: proc(5).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

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
    raise OSError(errno.ENOTSUP, "the kernel does not tell mount IDs")
