"""Exec sessions in a container of an OCI runtime: the runtime's own `exec`, detached.

The runtime starts the process and ends; the process is then an orphan that the daemon, a subreaper, adopts. So nothing
stands between the process and its three pipes, or its terminal, whose master side the runtime hands over through a
socket. (In the foreground runc copies the streams itself, 10 MB per session, and does not return while any process holds
them open.) A client that leaves takes its process with it: SIGHUP first, as from a lost terminal, then SIGKILL for the
whole process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import tempfile
import termios
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.base import procfs
from imgsvc.base.concurrency import stop_tasks, time_limit, to_the_end
from imgsvc.base.errors import DeadlineExceeded, Internal, printable
from imgsvc.base.removal import discard
from imgsvc.runtime.handlers.oci.child import Child, Orphan, signal_group_of
from imgsvc.runtime.streaming.fdio import FdReader, FdWriter
from imgsvc.runtime.streaming.interfaces import ContainerProcess, Sink, Sizes, Source, Streams

DRAIN_S: Final = 1.0  # for output of processes that outlive the one we started and share its pipes
HANGUP_S: Final = 2.0  # between SIGHUP and SIGKILL for a process whose client left
_END_OF_FILE: Final = b"\x04"  # ^D: how a terminal is told that its input ends
KILL_S: Final = 5.0  # a process in uninterruptible sleep is left to the reaper
MAX_SYNC_OUTPUT: Final = 16 * 1024 * 1024  # [bytes] per stream: what CRI answers may hold (CVE-2022-31030)
_MAX_LOG: Final = 64 * 1024  # [bytes]
_MAX_NAME: Final = 4096  # [bytes] of the name that comes with a terminal


class ExecFailed(Internal):
    """The runtime could not start the process."""


def exec_process(container: Mapping[str, Any], command: Sequence[str], *, terminal: bool) -> dict[str, Any]:
    """The OCI process for a command in a container: user, environment, limits and rights are the container's."""
    process = {key: value for key, value in container.items() if key not in ("consoleSize", "commandLine")}
    process["args"] = list(command)
    process["terminal"] = terminal
    environment = list(container.get("env") or ())
    if terminal and not any(entry.startswith("TERM=") for entry in environment):
        environment.append("TERM=xterm")
    process["env"] = environment
    return process


@dataclass(frozen=True, slots=True)
class ExecTarget:
    """A command in a running container.

    Attributes:
        scratch: a private directory for short-lived files.
        drain_s: how long output of other processes that share the pipes is awaited after the command has ended.
        hangup_s: between SIGHUP and SIGKILL when the session is cancelled; 0 kills at once.
    """

    container: ContainerProcess
    command: tuple[str, ...]
    terminal: bool
    scratch: Path
    drain_s: float = DRAIN_S
    hangup_s: float = HANGUP_S

    async def run(self, streams: Streams) -> int:
        """As CommandTarget.run. Raises: ExecFailed, NotFound (no such runtime)."""
        directory = Path(tempfile.mkdtemp(prefix="exec-", dir=self.scratch))
        try:
            with contextlib.ExitStack() as ours:
                start = self._start_on_terminal if self.terminal else self._start_on_pipes
                wires = await start(directory, streams, ours)
                try:
                    return await _carry(wires, streams, self.drain_s)
                finally:
                    await to_the_end(_end(wires.process, self.hangup_s))
        finally:
            discard(directory)

    async def _start_on_pipes(self, directory: Path, streams: Streams, ours: contextlib.ExitStack) -> _Wires:
        with contextlib.ExitStack() as theirs:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            theirs.callback(os.close, null)
            child_fds = [null, null, null]
            stdin = None
            outputs = []
            if streams.stdin:
                child_fds[0], write_end = os.pipe()
                theirs.callback(os.close, child_fds[0])
                stdin = FdWriter(write_end)
                ours.callback(stdin.close)
            for number, sink in ((1, streams.stdout), (2, streams.stderr)):
                if sink:
                    read_end, child_fds[number] = os.pipe()
                    theirs.callback(os.close, child_fds[number])
                    reader = FdReader(read_end)
                    ours.callback(reader.close)
                    outputs.append((reader, sink))
            process = await self._start(directory, child_fds, [], ours)
        return _Wires(process, stdin, tuple(outputs))

    async def _start_on_terminal(self, directory: Path, streams: Streams, ours: contextlib.ExitStack) -> _Wires:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            with _console_socket(directory) as (listener, path):
                process = await self._start(directory, [null, null, null], ["--console-socket", path], ours)
                master = _receive_terminal(listener)
        finally:
            os.close(null)
        reader, writer = FdReader(os.dup(master)), FdWriter(master)
        ours.callback(reader.close)
        ours.callback(writer.close)
        return _Wires(process, writer, ((reader, streams.stdout or _Nowhere()),), master)

    async def _start(self, directory: Path, fds: Sequence[int], options: Sequence[str], ours: contextlib.ExitStack) -> Orphan:
        """Let the runtime start the process. Cancelled or failed, nothing of either is left running."""
        pid_file = directory / "pid"
        child = Child(self._argv(directory, options), stdin=fds[0], stdout=fds[1], stderr=fds[2])
        try:
            code = await child.wait()
        except asyncio.CancelledError:
            child.kill_group()
            await child.wait()
            if (pid := _read_pid(pid_file)) is not None:
                signal_group_of(pid, signal.SIGKILL)
                self.container.reaper.adopt(pid)
            raise
        pid = _read_pid(pid_file)
        if code or pid is None:
            raise ExecFailed(f"cannot start the command: {_complaint(directory / 'log.json', code)}")
        process = Orphan(pid, self.container.reaper)
        ours.callback(process.close)
        return process

    def _argv(self, directory: Path, options: Sequence[str]) -> list[str]:
        process = exec_process(self.container.process, self.command, terminal=self.terminal)
        (directory / "process.json").write_text(json.dumps(process))
        files = ["--process", str(directory / "process.json"), "--pid-file", str(directory / "pid")]
        log = ["--log", str(directory / "log.json"), "--log-format", "json"]
        return [*self.container.runtime, *log, "exec", "--detach", *files, *options, self.container.container_id]


@dataclass(frozen=True, slots=True)
class _Wires:
    """A started process and our ends of what it is connected to. terminal: the master side, when it has one."""

    process: Orphan
    stdin: FdWriter | None
    outputs: tuple[tuple[FdReader, Sink], ...]
    terminal: int | None = None


@contextlib.contextmanager
def _console_socket(directory: Path) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket for the runtime to hand a terminal to, and a path to it that is short enough for sockaddr_un."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/{os.getpid()}/fd/{fd}/console"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            listener.setblocking(False)
            yield listener, path
    finally:
        os.close(fd)


def _receive_terminal(listener: socket.socket) -> int:
    """The master side that the runtime has sent before it ended. Raises: ExecFailed."""
    try:
        connection, _ = listener.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, _MAX_NAME, 1)
    except OSError as error:
        raise ExecFailed("the runtime did not hand over the terminal") from error
    if len(fds) != 1:
        raise ExecFailed("the runtime did not hand over the terminal")
    os.set_inheritable(fds[0], False)
    return fds[0]


async def _carry(wires: _Wires, streams: Streams, drain_s: float) -> int:
    """Move bytes until the process has ended and its output is delivered. Raises: what a sink raises."""
    side = []
    if streams.stdin and wires.stdin:
        side.append(asyncio.create_task(_feed(streams.stdin, wires.stdin, terminal=wires.terminal is not None)))
    if streams.sizes and wires.terminal is not None:
        side.append(asyncio.create_task(_resize(streams.sizes, wires.terminal)))
    ended = asyncio.create_task(_ended(wires, drain_s))
    outputs = [asyncio.create_task(_deliver(reader, sink)) for reader, sink in wires.outputs]
    try:
        done, _ = await asyncio.wait([ended, *outputs], return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return ended.result()
    finally:
        await stop_tasks(*side, ended, *outputs)


async def _ended(wires: _Wires, drain_s: float) -> int:
    code = await wires.process.wait()
    for reader, _ in wires.outputs:
        reader.end_within(drain_s)
    return code


async def _deliver(reader: FdReader, sink: Sink) -> None:
    while data := await reader.read():
        await sink.write(data)


async def _feed(source: Source, sink: FdWriter, *, terminal: bool) -> None:
    try:
        while data := await source.read():
            await sink.write(data)
        if terminal:
            await sink.write(_END_OF_FILE)
    except OSError:  # the process closed its input, or is gone
        while await source.read():
            pass
    if not terminal:
        sink.close()


async def _resize(sizes: Sizes, terminal: int) -> None:
    while size := await sizes.next():
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size.height, size.width, 0, 0))


async def _end(process: Orphan, hangup_s: float) -> None:
    """End a process that still runs, with its process group."""
    if process.running and hangup_s:
        process.signal_group(signal.SIGHUP)
        with contextlib.suppress(TimeoutError):
            async with time_limit(hangup_s):
                await process.wait()
    if process.running:
        process.signal_group(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with time_limit(KILL_S):
                await process.wait()


def end_interrupted(scratch: Path, container_id: str) -> None:
    """End the commands that were under way in a container when a daemon was killed, and remove their files. Blocking."""
    for directory in list(scratch.glob("exec-*")):
        pid = _read_pid(directory / "pid")
        # Else the number is another's by now.
        if pid is not None and any(container_id.encode() in path for path in procfs.cgroups(pid)):
            with contextlib.suppress(OSError):  # it has ended
                signal_group_of(pid, signal.SIGKILL)
        discard(directory)


def _read_pid(pid_file: Path) -> int | None:
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return None  # the process was not started
    return pid if pid > 1 else None


def _complaint(log: Path, code: int) -> str:
    """The runtime's last message in its JSON log."""
    try:
        with log.open("rb") as stream:
            last = stream.read(_MAX_LOG).decode(errors="replace").strip().splitlines()[-1]
        message = json.loads(last)["msg"]
    except (OSError, ValueError, LookupError, TypeError):
        return f"the runtime ended with exit code {code}"
    return printable(str(message))


class _Nowhere:
    async def write(self, data: bytes) -> None:
        """Drop it."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What ExecSync answers."""

    stdout: bytes
    stderr: bytes
    exit_code: int


class _Collector:
    """Keeps the first MAX_SYNC_OUTPUT bytes; the rest is read and thrown away, so that the process can go on."""

    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        self.data += data[: MAX_SYNC_OUTPUT - len(self.data)]


async def exec_sync(
    container: ContainerProcess, command: Sequence[str], *, timeout_s: float, scratch: Path, drain_s: float = DRAIN_S
) -> ExecResult:
    """Run a command to its end. timeout_s 0 means no limit.

    Raises: DeadlineExceeded (the command and its process group were killed), ExecFailed, NotFound (no such runtime).
    """
    target = ExecTarget(container, tuple(command), False, scratch, drain_s=drain_s, hangup_s=0.0)
    stdout, stderr = _Collector(), _Collector()
    try:
        async with time_limit(timeout_s or None):
            code = await target.run(Streams(stdout=stdout, stderr=stderr))
    except TimeoutError as error:
        raise DeadlineExceeded(f"the command did not end within {timeout_s:g} s and was killed") from error
    return ExecResult(bytes(stdout.data), bytes(stderr.data), code)
