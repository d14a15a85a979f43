"""Exec sessions in a container of an OCI runtime: the runtime's own `exec`, as a child of the daemon.

Without a terminal the process gets three pipes. With one, the runtime gets the far end of a terminal of ours and makes
the container's terminal itself; it copies between the two and hands sizes on. The runtime stays in front of the process
until that ends, so its exit code is the process's. A client that leaves takes its process with it: SIGHUP first, as from
a lost terminal, then SIGKILL for the whole process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import tempfile
import termios
import tty
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.errors import DeadlineExceeded, Internal, printable
from imgsvc.runtime.streaming.child import Child
from imgsvc.runtime.streaming.fdio import FdReader, FdWriter
from imgsvc.runtime.streaming.flow import stop
from imgsvc.runtime.streaming.interfaces import ContainerProcess, Sink, Sizes, Source, Streams

DRAIN_S: Final = 1.0  # for output of processes that outlive the one we started and share its pipes
HANGUP_S: Final = 2.0  # between SIGHUP and SIGKILL for a process whose client left
_END_OF_FILE: Final = b"\x04"  # ^D: how a terminal is told that its input ends
KILL_S: Final = 5.0  # for the runtime to notice that its process was killed
MAX_SYNC_OUTPUT: Final = 16 * 1024 * 1024  # [bytes] per stream: what CRI answers may hold (CVE-2022-31030)
_MAX_LOG: Final = 64 * 1024  # [bytes]


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
            code = await self._run(directory, streams)
            if code and not (directory / "pid").exists():
                raise ExecFailed(f"cannot start the command: {_complaint(directory / 'log.json', code)}")
            return code
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def _run(self, directory: Path, streams: Streams) -> int:
        argv = self._prepare(directory)
        with contextlib.ExitStack() as ours:
            start = _start_on_terminal if self.terminal else _start_on_pipes
            wires = start(argv, streams, ours)
            try:
                return await _carry(wires, streams, self.drain_s)
            finally:
                if wires.child.running:
                    await _end(wires.child, directory / "pid", self.hangup_s)

    def _prepare(self, directory: Path) -> list[str]:
        process = exec_process(self.container.process, self.command, terminal=self.terminal)
        (directory / "process.json").write_text(json.dumps(process))
        files = ["--process", str(directory / "process.json"), "--pid-file", str(directory / "pid")]
        log = ["--log", str(directory / "log.json"), "--log-format", "json"]
        return [*self.container.runtime, *log, "exec", *files, self.container.container_id]


@dataclass(frozen=True, slots=True)
class _Wires:
    """A started child and our ends of what it is connected to."""

    child: Child
    stdin: FdWriter | None
    outputs: tuple[tuple[FdReader, Sink], ...]
    terminal: int | None = None


def _start_on_pipes(argv: Sequence[str], streams: Streams, ours: contextlib.ExitStack) -> _Wires:
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
        child = Child(argv, stdin=child_fds[0], stdout=child_fds[1], stderr=child_fds[2])
    return _Wires(child, stdin, tuple(outputs))


def _start_on_terminal(argv: Sequence[str], streams: Streams, ours: contextlib.ExitStack) -> _Wires:
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)  # all that a terminal does is done by the one inside the container
        reader, writer = FdReader(os.dup(master)), FdWriter(master)
        ours.callback(reader.close)
        ours.callback(writer.close)
        child = Child(argv, stdin=slave, stdout=slave, stderr=slave)
    finally:
        os.close(slave)
    return _Wires(child, writer, ((reader, streams.stdout or _Nowhere()),), master)


async def _carry(wires: _Wires, streams: Streams, drain_s: float) -> int:
    """Move bytes until the child has ended and its output is delivered. Raises: what a sink raises."""
    side = []
    if streams.stdin and wires.stdin:
        side.append(asyncio.create_task(_feed(streams.stdin, wires.stdin, terminal=wires.terminal is not None)))
    if streams.sizes and wires.terminal is not None:
        side.append(asyncio.create_task(_resize(streams.sizes, wires.terminal, wires.child)))
    ended = asyncio.create_task(_ended(wires, drain_s))
    outputs = [asyncio.create_task(_deliver(reader, sink)) for reader, sink in wires.outputs]
    try:
        done, _ = await asyncio.wait([ended, *outputs], return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return ended.result()
    finally:
        await stop([*side, ended, *outputs])


async def _ended(wires: _Wires, drain_s: float) -> int:
    code = await wires.child.wait()
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


async def _resize(sizes: Sizes, terminal: int, child: Child) -> None:
    while size := await sizes.next():
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size.height, size.width, 0, 0))
        # The terminal is not the runtime's controlling terminal, so the kernel does not tell it.
        child.send(signal.SIGWINCH)


async def _end(child: Child, pid_file: Path, hangup_s: float) -> None:
    """End the process in the container and then the runtime in front of it."""
    if hangup_s:
        _signal_process(child, pid_file, signal.SIGHUP)
        await _wait_up_to(child, hangup_s)
    _signal_process(child, pid_file, signal.SIGKILL)
    await _wait_up_to(child, KILL_S)
    child.kill_group()
    await child.wait()


def _signal_process(child: Child, pid_file: Path, number: signal.Signals) -> None:
    """Signal the process group inside the container. While the runtime waits for the process, its pid is not given anew."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return  # not started yet
    if child.running and pid > 1:
        with contextlib.suppress(ProcessLookupError):
            # crun's process is a member of a group whose leader, a process of crun's own, is gone.
            group = os.getpgid(pid)
            if group != os.getpgid(0):
                os.killpg(group, number)


async def _wait_up_to(child: Child, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await child.wait()


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
        async with asyncio.timeout(timeout_s or None):
            code = await target.run(Streams(stdout=stdout, stderr=stderr))
    except TimeoutError as error:
        raise DeadlineExceeded(f"the command did not end within {timeout_s:g} s and was killed") from error
    return ExecResult(bytes(stdout.data), bytes(stderr.data), code)
