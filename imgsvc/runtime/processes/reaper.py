"""Reaping processes that became ours because their parent died: the daemon is a child subreaper.

Monitors, helpers of an OCI runtime, and commands of an exec whose runtime was killed end as our children. No other code
waits for them, and a PID namespace cannot end while one of its processes is an unreaped zombie. Children that we started
ourselves are left to the code that started them: their wait status is not ours to take. What is not ours is

* processes that were announced as adopted (monitors);
* what lives in another PID namespace, where we never start anything;
* a member of a process group that is neither its own nor ours: what we start is either a leader or in our group;
* what has been a zombie for three sweeps: code that starts a child here waits for it at once, or has said in
  imgsvc.base.children that it will later.

Every note is on a process, never on a number alone, which the kernel may give to a later child of ours.

Source: prctl(2) PR_SET_CHILD_SUBREAPER, proc(5) stat and status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import Final, NamedTuple

from imgsvc.base import children, kernel, procfs
from imgsvc.base.concurrency import stop_tasks

log = logging.getLogger(__name__)

_DELAY_S: Final = 0.005  # collects the SIGCHLDs of one burst into one look
_SWEEP_S: Final = 5.0  # for children that were adopted as zombies already: they send no signal
_PATIENCE: Final = 3  # sweeps
_REMEMBERED: Final = 1024  # exit codes; asked for within moments, or never


class _Identity(NamedTuple):
    """A process, told from a later one of the same number by its start [clock ticks since boot]."""

    pid: int
    start: int


def _identity(pid: int) -> _Identity | None:
    found = procfs.process(pid)
    return _Identity(pid, found.start) if found else None


class Reaper:
    """One per process; start() and stop() on the event loop's thread."""

    def __init__(self) -> None:
        self._adopted: set[_Identity] = set()
        self._seen: dict[_Identity, int] = {}
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
            await stop_tasks(self._sweeper)

    def adopt(self, pid: int) -> None:
        """This process is or will be an orphan of ours: reap it when it ends. Gone already is fine."""
        if pid > 0 and (found := _identity(pid)) is not None:
            self._adopted.add(found)

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
        """Forget ended processes, and take for an orphan what has been a zombie for three sweeps."""
        self._adopted = {p for p in self._adopted if _identity(p.pid) == p}
        unclaimed = [_Identity(found.pid, found.start) for found in _zombies() if found.pid not in children.owed()]
        self._seen = {process: self._seen.get(process, 0) + 1 for process in unclaimed}
        self._adopted.update(process for process, sweeps in self._seen.items() if sweeps >= _PATIENCE)
        self.reap()

    def reap(self) -> None:
        """Take the status of every orphan that has ended."""
        own = os.getpgrp()
        for found in _zombies():
            process = _Identity(found.pid, found.start)
            if process in self._adopted or found.group not in (found.pid, own) or procfs.nested(found.pid):
                with contextlib.suppress(ChildProcessError):
                    self._note(*os.waitpid(found.pid, os.WNOHANG))
                self._adopted.discard(process)

    def _note(self, pid: int, status: int) -> None:
        self._codes[pid] = status
        while len(self._codes) > _REMEMBERED:
            del self._codes[next(iter(self._codes))]

    def exit_code(self, pid: int) -> int | None:
        """How an orphan that was reaped ended (128 + N for signal N); None when unknown."""
        status = self._codes.pop(pid, None)
        if status is None:
            return None
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def _zombies() -> list[procfs.Process]:
    try:  # one call tells, most of the time, that there are none: a look at each of hundreds of monitors is dear
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return []
    except ChildProcessError:
        return []
    return [found for pid in procfs.children() if (found := procfs.process(pid)) is not None and found.ended]
