"""Reaping processes that became ours because their parent died: the daemon is a child subreaper.

Monitors, helpers of an OCI runtime, and commands of an exec whose runtime was killed end as our children. Nobody else
waits for them, and a PID namespace cannot end while one of its processes is an unreaped zombie. Children that we started
ourselves are left to whoever started them: their wait status is not ours to take. What is not ours is

* what somebody announced as adopted (monitors);
* what lives in another PID namespace, where we never start anything;
* a member of a process group that is neither its own nor ours: what we start is either a leader or in our group;
* what has been a zombie for three sweeps: whoever starts a child here waits for it at once, or has said in
  imgsvc.children that it will later.

Every note is on a process, never on a number alone, which may be given to a child of ours anew.

Source: prctl(2) PR_SET_CHILD_SUBREAPER, proc(5) stat and status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import Final, NamedTuple

from imgsvc import children, kernel
from imgsvc.runtime.exits import GONE

log = logging.getLogger(__name__)

_DELAY_S: Final = 0.005  # collects the SIGCHLDs of one burst into one look
_SWEEP_S: Final = 5.0  # for children that were adopted as zombies already: they send no signal
_PATIENCE: Final = 3  # sweeps
_REMEMBERED: Final = 1024  # exit codes; asked for within moments, or never


class _Process(NamedTuple):
    """A process, told from a later one of the same number by its start [clock ticks since boot]."""

    pid: int
    start: int


class Reaper:
    """One per process; start() and stop() on the event loop's thread."""

    def __init__(self) -> None:
        self._adopted: set[_Process] = set()
        self._seen: dict[_Process, int] = {}
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
        """This process is or will be an orphan of ours: reap it when it ends. Gone already is fine."""
        if pid > 0 and (found := _look(pid)) is not None:
            self._adopted.add(found.process)

    def _wake(self) -> None:
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_DELAY_S, self._look_after)

    def _look_after(self) -> None:
        self._pending = None
        try:
            self.reap()
        except OSError as error:
            log.error("looking for ended processes failed, trying again within %g s: %s", _SWEEP_S, error)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self.sweep()
            except OSError as error:
                log.error("looking for ended processes failed, trying again in %g s: %s", _SWEEP_S, error)

    def sweep(self) -> None:
        """Forget who is gone, and take for an orphan what nobody has waited for in three sweeps."""
        self._adopted = {p for p in self._adopted if (found := _look(p.pid)) is not None and found.process == p}
        unclaimed = [found.process for found in _zombies() if found.process.pid not in children.owed()]
        self._seen = {process: self._seen.get(process, 0) + 1 for process in unclaimed}
        self._adopted.update(process for process, sweeps in self._seen.items() if sweeps >= _PATIENCE)
        self.reap()

    def reap(self) -> None:
        """Take the status of every orphan that has ended."""
        own = os.getpgrp()
        for process, group, _ in _zombies():
            if process in self._adopted or group not in (process.pid, own) or _in_nested_namespace(process.pid):
                with contextlib.suppress(ChildProcessError):
                    self._note(*os.waitpid(process.pid, os.WNOHANG))
                self._adopted.discard(process)

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


class _Found(NamedTuple):
    process: _Process
    group: int
    zombie: bool


def _look(pid: int) -> _Found | None:
    """What the process table says; None for what is gone. Raises: OSError when that cannot be told now."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except GONE:
        return None
    return _Found(_Process(pid, int(fields[19])), int(fields[2]), fields[0] == b"Z")


def _zombies() -> list[_Found]:
    try:  # one call tells, most of the time, that there are none: a look at each of hundreds of monitors is dear
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return []
    except ChildProcessError:
        return []
    return [found for pid in _children() if (found := _look(pid)) is not None and found.zombie]


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
