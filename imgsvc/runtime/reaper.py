"""Reaping processes that became ours because their parent died: the daemon is a child subreaper.

Monitors, helpers of an OCI runtime, and commands of an exec whose runtime was killed end as our children. Nobody else
waits for them, and a PID namespace cannot end while one of its processes is an unreaped zombie. Children that we started
ourselves are left to whoever started them: their wait status is not ours to take. What is not ours is

* what somebody announced as adopted (monitors);
* what lives in another PID namespace, where we never start anything;
* a member of a process group that is neither its own nor ours: what we start is either a leader or in our group;
* what has been a zombie for three sweeps, because whoever starts a child here waits for it at once.

Source: prctl(2) PR_SET_CHILD_SUBREAPER, proc(5) stat and status.
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
_PATIENCE: Final = 3  # sweeps
_REMEMBERED: Final = 1024  # exit codes; asked for within moments, or never


class Reaper:
    """One per process; start() and stop() on the event loop's thread."""

    def __init__(self) -> None:
        self._adopted: set[int] = set()
        self._seen: dict[int, int] = {}
        self._codes: dict[int, int] = {}
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
            zombies = {pid for pid in _children() if _zombie_group(pid) is not None}
            self._seen = {pid: self._seen.get(pid, 0) + 1 for pid in zombies}
            self._adopted.update(pid for pid, sweeps in self._seen.items() if sweeps >= _PATIENCE)
            self.reap()

    def reap(self) -> None:
        """Take the status of every orphan that has ended."""
        self._pending = None
        own = os.getpgrp()
        for pid in _children():
            group = _zombie_group(pid)
            if group is not None and (pid in self._adopted or group not in (pid, own) or _in_nested_namespace(pid)):
                with contextlib.suppress(ChildProcessError):
                    self._note(*os.waitpid(pid, os.WNOHANG))
                self._adopted.discard(pid)

    def _note(self, pid: int, status: int) -> None:
        self._codes[pid] = status
        while len(self._codes) > _REMEMBERED:
            del self._codes[next(iter(self._codes))]

    def exit_code(self, pid: int) -> int | None:
        """How an orphan that was reaped ended (128 + N for signal N); None when that is not known."""
        status = self._codes.pop(pid, None)
        if status is None:
            return None
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def _zombie_group(pid: int) -> int | None:
    """The process group of a zombie; None for what runs or is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[2]) if fields[0] == b"Z" else None


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
