"""A shim that does not answer any more: finding its process by the socket it listens on, and ending it.

A shim's process is not our child, nor does every generation tell its pid; the process that holds the listening socket is the shim.

Source: proc(5) net/unix and PID/fd, pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from typing import Final

_LISTENS: Final = b"00010000"  # the flag __SO_ACCEPTCON
_KILL_S: Final = 5.0


def kill_listener(address: str) -> list[int]:
    """SIGKILL every process that listens on a shim's Unix socket, and wait for its end; the pids. Blocking. Raises: OSError."""
    killed = []
    links = {f"socket:[{inode}]" for inode in _listening(address)}
    for pid in _holders(links) if links else ():
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                if _holds(pid, links):  # still this process, not a later one of its number
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    poll = select.poll()
                    poll.register(fd, select.POLLIN)
                    poll.poll(_KILL_S * 1000)
                    killed.append(pid)
            finally:
                os.close(fd)
    return killed


def _listening(address: str) -> Iterator[str]:
    """Inodes of the sockets that listen on unix:///path, /path, or an abstract name."""
    path = address.removeprefix("unix://")
    wanted = os.fsencode(path if path.startswith("/") else f"@{path.lstrip('@')}")
    with open("/proc/net/unix", "rb") as stream:
        for line in stream:
            fields = line.rstrip(b"\n").split(None, 7)
            if len(fields) == 8 and fields[3] == _LISTENS and fields[7] == wanted:
                yield fields[6].decode("ascii")


def _holders(links: set[str]) -> Iterator[int]:
    own = os.getpid()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != own and _holds(int(name), links):
            yield int(name)


def _holds(pid: int, links: set[str]) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in links:
                    return True
    return False
