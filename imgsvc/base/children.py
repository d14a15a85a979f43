"""Children that live longer than a call: processes of ours beside the daemon, and whose exit status will be asked for.

The reaper of orphans (imgsvc.runtime.processes.reaper) takes what has been a zombie for a while. Code that does not wait for a child at
once, such as a server that is looked after only when it is needed, says so here; otherwise its status would be lost, which
`subprocess` reports as success.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from imgsvc.base.concurrency import in_thread, to_the_end

# Process IDs. The kernel reuses none of them before its owner has waited for it. Added and removed by any thread.
_owed: set[int] = set()


def started(pid: int) -> None:
    """A child that its starter will wait for; call waited() after that."""
    _owed.add(pid)


def waited(pid: int) -> None:
    """Its status was taken. Idempotent."""
    _owed.discard(pid)


def owed() -> AbstractSet[int]:
    """Children that only their owner may reap."""
    return _owed


class Companion:
    """A module of imgsvc as a process beside the daemon: started by exec on first use, and again if it dies.

    Its arguments are the descriptor of a SOCK_SEQPACKET socket, then `arguments`. It ends when that socket is closed. It is in a
    process group of its own, for signals of a terminal, but in the daemon's session: where the kernel schedules by sessions
    (autogroup), its niceness would mean nothing against a daemon in another one. Belongs to one event loop; calls one by one.
    """

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """environment: None for the daemon's own."""
        self._module = module
        self._arguments = arguments
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._is_killed = False
        self._control: socket.socket | None = None

    async def connect(self) -> socket.socket:
        """Our end of its socket, non-blocking. A caller that finds the process dead calls stop(). Raises: OSError."""
        if self._is_killed:
            self.stop()
        if self._control is None:
            await to_the_end(self._start())
        assert self._control is not None
        return self._control

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                self._process = await in_thread(self._execute, theirs.fileno())
        except OSError:
            ours.close()
            raise
        started(self._process.pid)
        self._control = ours

    def _execute(self, control: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-m", self._module, str(control), *self._arguments]
        null = subprocess.DEVNULL
        return subprocess.Popen(command, pass_fds=(control,), stdin=null, stdout=null, env=self._environment, cwd="/", process_group=0)

    def kill(self) -> None:
        """Kill a process that no longer answers: users of its sockets notice its death, and connect() starts another."""
        if self._process is not None:
            self._process.kill()
            self._is_killed = True

    def stop(self) -> None:
        """End it. Idempotent."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            waited(self._process.pid)
            self._process = None
            self._is_killed = False
