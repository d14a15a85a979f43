"""Noticing that a process ended, without being its parent. Source: pidfd_open(2), proc(5)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Final

UNKNOWN_EXIT: Final = 255  # what CRI-O and containerd report when nobody saw the code


def start_time(pid: int) -> int:
    """When a process started [clock ticks since boot], 0 when it is gone or a zombie. With the pid, an identity."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def alive(pid: int, started: int) -> bool:
    """Whether this very process is still there."""
    return pid > 0 and started > 0 and start_time(pid) == started


async def process_gone(pid: int, started: int) -> None:
    """Return when the process has ended. started: its start_time()."""
    if not alive(pid, started):
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if alive(pid, started):  # it is this process that the descriptor stands for
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()
            loop.add_reader(fd, settle, ended)
            try:
                await ended
            finally:
                loop.remove_reader(fd)
    finally:
        os.close(fd)


def read_exit_file(path: Path) -> tuple[int, int] | None:
    """Exit code and time [ns] that conmon left, or None."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text().strip()), path.stat().st_mtime_ns
    return None


def now_ns() -> int:
    """Nanoseconds since the epoch."""
    return time.time_ns()


def boot_id() -> str:
    """What tells one boot of this node from another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def settle(future: asyncio.Future[None]) -> None:
    """Wake whoever awaits a future, unless somebody did already."""
    if not future.done():
        future.set_result(None)
