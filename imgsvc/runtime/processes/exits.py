"""Noticing that a process ended, without being its parent. Source: pidfd_open(2), proc(5)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from imgsvc.base import procfs
from imgsvc.base.errors import ImgsvcError

log = logging.getLogger(__name__)

UNKNOWN_EXIT: Final = 255  # what CRI-O and containerd report when the code is unknown
_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 30.0
_TRIES_AFTER_END: Final = 5  # about 3 s


def start_time(pid: int) -> int:
    """When a process started [clock ticks since boot], 0 when it is gone or a zombie. With the pid, an identity.

    Raises: OSError when that cannot be told now (no descriptor is free); the process may well be there.
    """
    found = procfs.process(pid)
    return 0 if found is None or found.ended else found.start


def alive(pid: int, started: int) -> bool:
    """Whether this very process is still there. Raises: OSError, as start_time."""
    return pid > 0 and started > 0 and start_time(pid) == started


async def process_gone(pid: int, started: int) -> None:
    """Return when the process has ended. started: its start_time(). Raises: OSError, which says nothing about the process."""
    if not alive(pid, started):
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if alive(pid, started):  # the descriptor refers to this process
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()
            loop.add_reader(fd, settle, ended)
            try:
                await ended
            finally:
                loop.remove_reader(fd)
    finally:
        os.close(fd)


async def persistently(what: str, wait: Callable[[], Awaitable[None]], is_gone: Callable[[], bool]) -> bool:
    """Wait for an end, however often the waiting itself fails: that is logged and tried again, less and less often.

    what: for the log, e.g. "container 1234". Returns whether `wait` returned at last; False when it goes on failing although
    `is_gone` says that there is nothing to wait for any more.
    """
    pause, tries = _FIRST_RETRY_S, 0
    while True:
        try:
            await wait()
        except Exception as error:  # whatever it is, it is not the end that is waited for
            unforeseen = not isinstance(error, (ImgsvcError, OSError))
            log.error("waiting for the end of %s failed, trying again in %g s: %s", what, pause, error, exc_info=unforeseen)
        else:
            return True
        with contextlib.suppress(OSError):
            tries += is_gone()
        if tries >= _TRIES_AFTER_END:
            return False
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LAST_RETRY_S)


def read_exit_file(path: Path) -> tuple[int, int] | None:
    """Exit code and time [ns] that conmon left, or None. Raises: OSError when there may be one."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(path.read_text().strip()), path.stat().st_mtime_ns
    return None


def now_ns() -> int:
    """Nanoseconds since the epoch."""
    return time.time_ns()


def settle(future: asyncio.Future[None]) -> None:
    """Complete a future, unless it is complete already."""
    if not future.done():
        future.set_result(None)
