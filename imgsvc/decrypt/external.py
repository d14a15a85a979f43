"""Runs a chain of stream processors: ciphertext into the first one's stdin, the unpacker reads the last one's stdout.

posix_spawn rather than asyncio.create_subprocess_exec, because the payload must be descriptor 3 of the child, which needs
dup2 between fork and exec. Every process leads a session of its own, so that killing it takes its helpers along.
Exits are awaited before a failure is blamed on one of them: a failing decoder otherwise shows as a broken stream or a wrong diff ID.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Mapping
from typing import Final

from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, printable
from imgsvc.base.oci import KIB, MIB, Descriptor
from imgsvc.decrypt import payload
from imgsvc.decrypt.interfaces import ChainRun
from imgsvc.decrypt.processors import Chain, Step, child_environment

MAX_STDERR: Final = 4 * KIB  # [bytes] kept of each processor, the last ones
EXIT_GRACE_S: Final = 30.0  # for a processor to exit once its output ended
_FIRST_FREE_FD: Final = 16  # sources of dup2 stay clear of its targets 0 to 3
_PIPE_SIZE: Final = MIB
_LOST_READER: Final = (-signal.SIGPIPE, 128 + signal.SIGPIPE)  # directly, and as a shell says it


class ProcessorFailed(FailedPrecondition):
    """A stream processor exited with a failure. Fields: processor (ID), status (negative: the signal), stderr."""

    def __init__(self, processor: str, status: int, stderr: str, where: str) -> None:
        ended = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        super().__init__(f'stream processor "{printable(processor, 120)}" failed ({ended}): {stderr or "no text on stderr"}', where=where)
        self.processor = processor
        self.status = status
        self.stderr = stderr


class _Process:
    """One running processor. Belongs to the event loop's thread."""

    def __init__(self, step: Step, pid: int, stderr: int) -> None:
        self.id = step.processor.id
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._stderr_fd = stderr
        self._kept = bytearray()
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self.exited_at = 0.0
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._loop.add_reader(stderr, self._on_stderr)

    @property
    def stderr(self) -> str:
        """The end of what it said, safe to show."""
        return printable(self._kept.decode("utf-8", "replace").strip(), MAX_STDERR)

    def kill(self) -> None:
        """Kill it and what it started."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)

    def _on_exit(self) -> None:
        self._on_stderr()
        # The group first: after waitpid its number may belong to another process.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._close_stderr()
        self.exited_at = self._loop.time()
        self.exited.set_result(os.waitstatus_to_exitcode(status))

    def _on_stderr(self) -> None:
        for _ in range(16):  # then the loop's other work has its turn
            try:
                chunk = os.read(self._stderr_fd, 64 * KIB) if self._stderr_fd >= 0 else b""
            except BlockingIOError:
                return
            if not chunk:
                self._close_stderr()
                return
            self._kept += chunk
            del self._kept[:-MAX_STDERR]

    def _close_stderr(self) -> None:
        if self._stderr_fd >= 0:
            self._loop.remove_reader(self._stderr_fd)
            os.close(self._stderr_fd)
            self._stderr_fd = -1


class RunningChain:
    """See ChainRun."""

    def __init__(self, processes: list[_Process], output: int, media_type: str, where: str) -> None:
        self._processes = processes
        self._output = output
        self._media_type = media_type
        self._where = where

    @property
    def output(self) -> int:
        """See ChainRun."""
        return self._output

    @property
    def media_type(self) -> str:
        """See ChainRun."""
        return self._media_type

    async def wait(self) -> None:
        """See ChainRun."""
        # An unpacker that gave up early leaves a writer blocked on the pipe; closing our end lets it see SIGPIPE.
        self._close_output()
        done, late = await asyncio.wait([p.exited for p in self._processes], timeout=EXIT_GRACE_S)
        failed = [p for p in self._processes if p.exited in done and p.exited.result()]
        # Who only lost its reader is not the cause; of the others, who failed first made the rest fail.
        causes = [p for p in failed if p.exited.result() not in _LOST_READER] or failed
        if causes:
            first = min(causes, key=lambda p: p.exited_at)
            raise ProcessorFailed(first.id, first.exited.result(), first.stderr, self._where)
        if late:
            names = ", ".join(p.id for p in self._processes if p.exited in late)
            raise DeadlineExceeded(f"stream processor {printable(names, 120)} did not exit within {EXIT_GRACE_S:g} s", where=self._where)

    async def kill(self) -> None:
        """See ChainRun."""
        self._close_output()
        for process in self._processes:
            process.kill()
        if self._processes:
            await asyncio.wait([p.exited for p in self._processes])

    def _close_output(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1


async def start_chain(chain: Chain, descriptor: Descriptor, source: int, *, send_payload: bool, environment: Mapping[str, str]) -> ChainRun:
    """Start every step of a chain that has steps. See Decryptor.open_chain for source and errors."""
    where = f"layer {descriptor.digest}"
    environments = [child_environment(step, environment) for step in chain.steps]
    # All programs are looked for before the first one starts.
    programs = [_program(step, env, where) for step, env in zip(chain.steps, environments, strict=True)]
    processes: list[_Process] = []
    upstream = _moved(os.dup(source))
    try:
        for step, program, env in zip(chain.steps, programs, environments, strict=True):
            given = payload.encode(descriptor) if send_payload and step.payload else None
            stdin, upstream = upstream, -1
            upstream, process = _start(step, program, stdin, given, env, where)
            processes.append(process)
    except BaseException:
        await RunningChain(processes, upstream, "", where).kill()
        raise
    return RunningChain(processes, upstream, chain.result, where)


def _program(step: Step, env: Mapping[str, str], where: str) -> str:
    """Where the program is. Raises: FailedPrecondition."""
    found = shutil.which(step.processor.path, path=env.get("PATH", os.defpath))
    if found is None:
        raise FailedPrecondition(f"{_named(step)}: executable {printable(step.processor.path, 120)} not found in PATH", where=where)
    return found


def _start(step: Step, program: str, stdin: int, given: bytes | None, env: Mapping[str, str], where: str) -> tuple[int, _Process]:
    """Start one process; `stdin` is used up. Returns the read end of its stdout."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        theirs.callback(os.close, stdin)
        output, stdout = _pipe(ours, theirs)
        errors, stderr = _pipe(ours, theirs)
        os.set_blocking(errors, False)
        files = [stdin, stdout, stderr]
        if given is not None:
            files.append(_memory_file(given))
            theirs.callback(os.close, files[payload.FD])
        actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(files)]
        if given is None:
            actions.append((os.POSIX_SPAWN_CLOSE, payload.FD))  # a socket-activated daemon has something else there
        argv = [step.processor.path, *step.processor.args]
        # Python ignores SIGPIPE; a child that inherits that may run on after its reader is gone.
        reset = (signal.SIGPIPE, signal.SIGXFSZ)
        try:
            pid = os.posix_spawn(program, argv, dict(env), file_actions=actions, setsid=True, setsigmask=(), setsigdef=reset)
        except OSError as error:
            raise FailedPrecondition(f"{_named(step)}: cannot start {printable(program, 120)}: {error.strerror}", where=where) from error
        ours.pop_all()
    return output, _Process(step, pid, errors)


def _named(step: Step) -> str:
    return f'stream processor "{printable(step.processor.id, 120)}"'


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """(read end, write end), closed with the stacks."""
    reader, writer = (_moved(fd) for fd in os.pipe())
    ours.callback(os.close, reader)
    theirs.callback(os.close, writer)
    with contextlib.suppress(OSError):  # unprivileged users have a budget
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return reader, writer


def _memory_file(data: bytes) -> int:
    """A file to read to its end. No pipe: that would block on a payload over its size, or on a program that never reads."""
    fd = _moved(os.memfd_create("payload", os.MFD_CLOEXEC))
    with open(fd, "wb", closefd=False) as stream:
        stream.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _moved(fd: int) -> int:
    """The same file under a number of at least _FIRST_FREE_FD, close-on-exec."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
    finally:
        os.close(fd)
