"""Reaping processes that became ours because their parent died: the daemon is a child subreaper.

Monitors, and commands of an exec whose runtime was killed, end as our children. Nobody else waits for them, and a PID
namespace cannot end while one of its processes is an unreaped zombie. Children that we started ourselves are left to
whoever started them: their wait status is not ours to take. They are told apart by the PID namespace (we never start
anything in another one) or because somebody announced the pid as adopted.

Source: prctl(2) PR_SET_CHILD_SUBREAPER, proc(5) status NSpid.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Final

from imgsvc.runtime import kernel

_DELAY_S: Final = 0.005  # collects the SIGCHLDs of one burst into one look
_SWEEP_S: Final = 5.0  # for children that were adopted as zombies already: they send no signal


class Reaper:
    """One per process; start() and stop() on the event loop's thread."""

    def __init__(self) -> None:
        self._adopted: set[int] = set()
        self._pending: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Become the subreaper of everything started from here on."""
        kernel.become_subreaper()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._wake)
        self._sweeper = asyncio.create_task(self._sweep(), name="reaper")

    async def stop(self) -> None:
        """Stop looking."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        if self._pending:
            self._pending.cancel()
        if self._sweeper:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])

    def adopt(self, pid: int) -> None:
        """This process is or will be an orphan of ours: reap it when it ends."""
        if pid > 0:
            self._adopted.add(pid)

    def _wake(self) -> None:
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_DELAY_S, self.reap)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.reap()

    def reap(self) -> None:
        """Take the status of every orphan that has ended."""
        self._pending = None
        for pid in _children():
            if pid in self._adopted or _in_nested_namespace(pid):
                with contextlib.suppress(ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        self._adopted.discard(pid)


def _children() -> list[int]:
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (thread / "children").read_text().split()]
    return found


def _in_nested_namespace(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as stream:
        for line in stream:
            if line.startswith("NSpid:"):
                return len(line.split()) > 2
    return False
