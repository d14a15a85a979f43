"""The daemon's side of a container's log: starting the process that keeps it (logprocess.py), and talking to it.

io/ctl in the bundle is its socket: gone when the output has ended, deaf when the process died. io/logged is there since one was
started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.concurrency import in_thread, time_limit
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, from_os_error
from imgsvc.base.oci import MIB
from imgsvc.runtime.handlers.shim import logprocess
from imgsvc.runtime.logs import open_log

log = logging.getLogger(__name__)

_UNLIMITED: Final = 4 * MIB  # what is kept of a line that may be as long as it likes
_STREAMS: Final = {b"o": "stdout", b"e": "stderr"}
_ANSWER_S: Final = 10.0
_RETRY_S: Final = 1.0

_children: list[subprocess.Popen[bytes]] = []  # of this daemon; they are waited for when the next one is started


@dataclass(frozen=True, slots=True)
class ContainerLog:
    """The log of one container. limit: longest part of a line [bytes]; 0 and -1: a line is not cut below 4 MiB."""

    bundle: Path
    limit: int

    def start(self) -> None:
        """Start its process, which has the FIFOs open on return. Blocking. Raises: InvalidArgument (the log), OSError."""
        _children[:] = [child for child in _children if child.poll() is None]
        socket_path = self.bundle / "io/ctl"
        with ExitStack() as ours:
            streams = {}
            for name in ("stdout", "stderr"):
                with contextlib.suppress(FileNotFoundError):
                    streams[name] = _opened(ours, self.bundle / "io" / name, os.O_RDONLY | os.O_NONBLOCK)
            log_fd = self._open_log()
            if log_fd >= 0:
                ours.callback(os.close, log_fd)
            listener = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            socket_path.unlink(missing_ok=True)
            directory = _opened(ours, socket_path.parent, os.O_PATH | os.O_DIRECTORY)
            listener.bind(_short(directory))
            listener.listen()
            given = [listener.fileno(), *streams.values(), *([log_fd] if log_fd >= 0 else [])]
            words = [str(listener.fileno()), str(socket_path), str(log_fd), str(self.limit if self.limit > 0 else _UNLIMITED)]
            words += [f"{name}={fd}" for name, fd in streams.items()]
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", logprocess.__file__, *words],
                pass_fds=given,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                env={},
            )
        _children.append(child)
        (self.bundle / "io/logged").touch()

    def _open_log(self) -> int:
        facts = json.loads((self.bundle / "io.json").read_bytes())
        if not facts["log_path"]:
            return -1
        directory = facts.get("log_directory") or os.path.dirname(facts["log_path"])  # an older version did not note it
        return open_log(directory, os.path.relpath(facts["log_path"], directory))

    async def keep(self) -> None:
        """Until the output has ended: another process for one that died, and for a container of a version that had none."""
        while (self.bundle / "io.json").exists():
            try:
                async with self._connected() as connection:
                    if await asyncio.get_running_loop().sock_recv(connection, 1):
                        return
                log.warning("the log process of container %s died; a new one takes over", self.bundle.name)
            except FileNotFoundError:
                if (self.bundle / "io/logged").exists():
                    return
            except OSError as error:
                log.warning("the log process of container %s is gone (%s); a new one takes over", self.bundle.name, error)
            try:
                await in_thread(self.start)
            except (ImgsvcError, OSError) as error:
                log.error("the log of container %s cannot be written: %s", self.bundle.name, error)
            await asyncio.sleep(_RETRY_S)

    async def reopen(self) -> None:
        """Go on in a new file at the same path. Raises: InvalidArgument, FailedPrecondition; then it goes on in the old one."""
        fd = await in_thread(self._open_log)
        if fd < 0:
            return
        try:
            async with time_limit(_ANSWER_S), self._talking() as connection:
                socket.send_fds(connection, [b"R"], [fd])
                await asyncio.get_running_loop().sock_recv(connection, 1)
        except TimeoutError as error:
            raise FailedPrecondition(f"the log process does not answer within {_ANSWER_S:g} s", where=str(self.bundle)) from error
        finally:
            os.close(fd)

    async def follow(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """(stream, data) from now on, until the container's output ends.

        Raises: FailedPrecondition when there is no output any more, or when the follower is so slow that the container would have
        to wait.
        """
        loop = asyncio.get_running_loop()
        async with self._talking() as connection:
            await loop.sock_sendall(connection, b"F")
            while (message := await loop.sock_recv(connection, logprocess.CHUNK + 1)) != b"E":
                if not message:
                    raise FailedPrecondition("the attached client reads too slowly for the container, or its log process died")
                if message != b"F":
                    yield _STREAMS[message[:1]], message[1:]

    async def finish(self) -> None:
        """The container has ended: wait until the log has what is left. Idempotent."""
        with contextlib.suppress(OSError, TimeoutError):
            async with time_limit(_ANSWER_S), self._connected() as connection:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(connection, b"Q")
                await loop.sock_recv(connection, 1)

    @asynccontextmanager
    async def _talking(self) -> AsyncIterator[socket.socket]:
        try:
            async with self._connected() as connection:
                yield connection
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise FailedPrecondition(f"container {self.bundle.name} has no streams now") from error
        except OSError as error:
            raise from_os_error(error, "talking to a log process", where=str(self.bundle)) from error

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[socket.socket]:
        """A connection to the process. Raises: FileNotFoundError (the output has ended), OSError (it died)."""
        with ExitStack() as ours:
            directory = _opened(ours, self.bundle / "io", os.O_PATH | os.O_DIRECTORY)
            connection = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, _short(directory))
            yield connection


def _opened(ours: ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    ours.callback(os.close, fd)
    return fd


def _short(directory: int) -> str:
    """The socket's path by a descriptor of its directory: one of a socket may have 107 bytes."""
    return f"/proc/self/fd/{directory}/ctl"
