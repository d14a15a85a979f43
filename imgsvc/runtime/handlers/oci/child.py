"""Processes awaited through their pidfds, without a thread or a signal handler for each: children, and adopted orphans."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

from imgsvc.base.errors import Internal, NotFound, from_os_error
from imgsvc.base.programs import SAFE_PATH
from imgsvc.runtime.streaming.interfaces import Adopter


class Child:
    """One running child, leader of a session and process group of its own. Wait for it, always."""

    def __init__(self, argv: Sequence[str], *, stdin: int, stdout: int, stderr: int) -> None:
        """Start it. Raises: NotFound (no such program), ImgsvcError."""
        env = {"PATH": os.environ.get("PATH", SAFE_PATH)}
        try:
            self._process = subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, start_new_session=True)
        except FileNotFoundError as error:
            raise NotFound(f"no program {argv[0]}", hint="install it, or correct its path in the configuration") from error
        except OSError as error:
            raise from_os_error(error, "starting a program", where=argv[0]) from error
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._exited = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def running(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Its exit code, 128+N when signal N ended it. May be called by several, and again."""
        await self._exited.wait()
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def kill_group(self) -> None:
        """SIGKILL everything in its process group; gone already is fine."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._exited.set()


class Orphan:
    """A process that a child of ours has started and left to us, as we are its subreaper. Close it, always."""

    def __init__(self, pid: int, reaper: Adopter) -> None:
        """Take note of a process that may have ended already."""
        self._pid = pid
        self._reaper = reaper
        self._exited = asyncio.Event()
        self._status: int | None = None
        reaper.adopt(pid)
        self._pidfd = _open_if_ours(pid)
        if self._pidfd is None:
            self._settle()
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._settle)

    @property
    def running(self) -> bool:
        """Whether it has not been seen to end."""
        return not self._exited.is_set()

    async def wait(self) -> int:
        """Its exit code, 128+N when signal N ended it. May be called again. Raises: Internal when it is unknown."""
        await self._exited.wait()
        if self._status is None:
            raise Internal("the exit code of the command was lost", hint="check whether other code waits for the daemon's children")
        return self._status

    def signal_group(self, number: signal.Signals) -> None:
        """Signal its process group; gone already is fine."""
        if self.running:
            signal_group_of(self._pid, number)

    def close(self) -> None:
        """Free the descriptor; what still runs is left to the reaper. Idempotent."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _settle(self) -> None:
        """Take the status, unless the reaper was quicker."""
        self.close()
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])  # a readable pidfd says that it does not block
            self._status = 128 - code if code < 0 else code
        except ChildProcessError:
            self._status = self._reaper.exit_code(self._pid)
        self._exited.set()


def _open_if_ours(pid: int) -> int | None:
    """The pidfd of a child of ours, running or a zombie; None when it is reaped (and its number possibly reused)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        os.close(pidfd)
        return None
    return pidfd


def signal_group_of(pid: int, number: signal.Signals) -> None:
    """Signal the process group of a process in a container; gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        # It need not lead its group: crun leaves it in one whose leader was a process of crun's own.
        group = os.getpgid(pid)
        if group != os.getpgid(0):
            os.killpg(group, number)
