"""Making a node fail: a small file system, a disk that loses power, no descriptors left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_GOING_DOWN: Final = 0x8004587D  # EXT4_IOC_SHUTDOWN
_AT_ONCE: Final = struct.pack("I", 2)  # without writing the journal's buffers


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    """Mount a tmpfs on `path`; options as in mount(8), e.g. "size=4m". Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class FailingDisk:
    """A file system of its own on `path`, which keeps nothing of what was not synced when the power goes. Needs root."""

    def __init__(self, image: Path, path: Path) -> None:
        self._image, self._path = image, path
        with image.open("wb") as file:
            file.truncate(512 << 20)  # sparse
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=60)
        path.mkdir(exist_ok=True)

    def mount(self) -> None:
        """As after a boot: the journal is replayed."""
        # ext4 writes after five seconds, and what replaces a file at once, unless it is told not to.
        options = "loop,commit=1000,noauto_da_alloc"
        subprocess.run(["mount", "-t", "ext4", "-o", options, str(self._image), str(self._path)], check=True, timeout=60)

    def cut(self) -> None:
        """The power goes: nothing is written from now on. Source: fs/ext4/ioctl.c."""
        place = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(place, _GOING_DOWN, _AT_ONCE)
        finally:
            os.close(place)

    def replace(self) -> None:
        """Put what is on the disk into another one, and mount that: whoever still uses the first, it stays dead."""
        self.unmount()
        copy = self._image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", str(self._image), str(copy)], check=True, timeout=60)
        copy.replace(self._image)
        self.mount()

    def unmount(self) -> None:
        """It may be in use."""
        subprocess.run(["umount", "--lazy", str(self._path)], check=True, timeout=60)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Opening a file fails with EMFILE inside."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
