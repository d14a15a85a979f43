"""A child process with descriptors of our choice, awaited through its pidfd: no thread per child, no signal handler."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

from imgsvc.errors import NotFound, from_os_error
from imgsvc.runtime.process import SAFE_PATH


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

    def send(self, number: signal.Signals) -> None:
        """Signal it alone; gone already is fine."""
        if self.running:
            self._process.send_signal(number)

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
