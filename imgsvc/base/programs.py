"""Short-lived foreign programs: run, bounded in time and output, killed with their whole process group.

run() is for the event loop, run_blocking() for a worker thread with a CancelToken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from imgsvc.base import children
from imgsvc.base.concurrency import CancelToken, ended, time_limit, to_the_end
from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, NotFound, ResourceExhausted, from_os_error, printable
from imgsvc.base.oci import MIB

MAX_STDERR: Final = 4096  # [bytes] kept by run_blocking for error texts, the last ones; the rest is read and dropped
POLL_S: Final = 0.1  # [seconds] how soon a cancelled run_blocking is noticed
_LAST_WAIT_S: Final = 5.0  # for a killed program to be gone
_CHUNK: Final = 64 * 1024
MAX_OUTPUT: Final = 4 * MIB  # [bytes] per stream; a CNI result or a runtime's state is some KiB
SAFE_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended. status: exit code, or -N for signal N. stdout may hold secrets, so it stays out of the repr."""

    status: int
    stdout: bytes = field(repr=False)
    stderr: bytes

    @property
    def said(self) -> str:
        """Everything that was kept of its standard error."""
        return self.stderr.decode(errors="replace").strip()

    @property
    def complaint(self) -> str:
        """The last line it wrote to standard error, made safe for a message."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        return printable(lines[-1].strip()) if lines else f"exit status {self.status}"


async def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 60.0,
    limit: int = MAX_OUTPUT,
) -> Finished:
    """Run a program to its end; output over `limit` [bytes per stream] is read and thrown away.

    Raises: NotFound (no such program), DeadlineExceeded (it and its process group were killed).
    """
    process = await spawn(argv, env=env, cwd=cwd)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    try:
        async with time_limit(timeout_s):
            _, stdout, stderr, status = await asyncio.gather(
                _feed(process.stdin, stdin), _collect(process.stdout, limit), _collect(process.stderr, limit), process.wait()
            )
    except TimeoutError as error:
        raise DeadlineExceeded(f"{os.path.basename(argv[0])} did not end within {timeout_s:g} s and was killed") from error
    finally:
        if process.returncode is None:
            await to_the_end(_kill(process))
    return Finished(status, stdout, stderr)


async def spawn(argv: Sequence[str], *, env: Mapping[str, str] | None, cwd: Path | None) -> asyncio.subprocess.Process:
    """Start a program with three pipes in a process group of its own, which has ended on return when the caller is cancelled.

    Raises: NotFound, ImgsvcError.
    """
    start = asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(env) if env is not None else {"PATH": os.environ.get("PATH", SAFE_PATH)},
        cwd=cwd,
        start_new_session=True,
    )
    try:
        return await started_whole(start)
    except FileNotFoundError as error:
        raise NotFound(f"no program {argv[0]}", hint="install it, or correct its path in the configuration") from error
    except OSError as error:
        raise from_os_error(error, "starting a program", where=argv[0]) from error


async def started_whole(start: Coroutine[Any, Any, asyncio.subprocess.Process]) -> asyncio.subprocess.Process:
    """Await the start of a program. When the caller is cancelled in that moment, its whole process group is killed and waited for;
    asyncio itself would kill the one process it started, and leave those that this one has started already.
    """
    starting = asyncio.ensure_future(start)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await ended(starting)
        if not starting.cancelled() and starting.exception() is None:
            await to_the_end(_kill(starting.result()))
        raise


async def _kill(process: asyncio.subprocess.Process) -> None:
    kill_group(process.pid)
    # asyncio also waits for the end of the pipes, which a child of the program that left its session may keep open.
    with contextlib.suppress(TimeoutError):
        async with time_limit(_LAST_WAIT_S):
            await process.wait()


def kill_group(pid: int) -> None:
    """SIGKILL a process group that we started; gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def _feed(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if data:
            writer.write(data)
            await writer.drain()
        writer.close()


async def _collect(reader: asyncio.StreamReader, limit: int) -> bytes:
    kept: list[bytes] = []
    size = 0
    while chunk := await reader.read(_CHUNK):
        if size < limit:
            kept.append(chunk[: limit - size])
            size += len(kept[-1])
    return b"".join(kept)


def run_blocking(
    argv: Sequence[str],
    given: bytes,
    *,
    timeout_s: float,
    limit: int,
    env: Mapping[str, str] | None = None,
    cancel: CancelToken | None = None,
) -> Finished:
    """Run a program to its end with `given` on its stdin.

    The program leads a process group of its own, which is killed when the deadline passes, when stdout exceeds `limit`
    [bytes], or on cancel; helpers it started go with it.

    Raises: FailedPrecondition (cannot be started), DeadlineExceeded, ResourceExhausted, Cancelled.
    """
    try:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        raise FailedPrecondition(f"cannot start the program: {error.strerror}", where=argv[0]) from error
    children.started(child.pid)  # it may have ended long before a helper of its closes the pipes
    stdout, stderr = bytearray(), bytearray()
    deadline = time.monotonic() + timeout_s
    try:
        _exchange(child, memoryview(given), stdout, stderr, limit, deadline, cancel)
        status = child.wait(max(0.0, deadline - time.monotonic()) + POLL_S)
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        raise DeadlineExceeded(f"no answer within {timeout_s:g} s", where=argv[0]) from error
    finally:
        # Also after success: what the program left in its group must not outlive it.
        kill_group(child.pid)
        for stream in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(BrokenPipeError):
                _opened(stream).close()
        child.wait()
        children.waited(child.pid)
    return Finished(status, bytes(stdout), bytes(stderr))


def _exchange(
    child: subprocess.Popen[bytes],
    pending: memoryview,
    stdout: bytearray,
    stderr: bytearray,
    limit: int,
    deadline: float,
    cancel: CancelToken | None,
) -> None:
    """Move bytes until both outputs end. Raises: TimeoutError, ResourceExhausted, Cancelled."""
    with selectors.DefaultSelector() as selector:
        selector.register(_opened(child.stdin), selectors.EVENT_WRITE)
        selector.register(_opened(child.stdout), selectors.EVENT_READ, stdout)
        selector.register(_opened(child.stderr), selectors.EVENT_READ, stderr)
        os.set_blocking(_opened(child.stdin).fileno(), False)
        while any(key.data is not None for key in selector.get_map().values()):
            if cancel:
                cancel.check()
            if time.monotonic() > deadline:
                raise TimeoutError
            for key, _ in selector.select(POLL_S):
                if key.data is None:
                    pending = _feed_some(selector, key, pending)
                    continue
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
                del stderr[:-MAX_STDERR]
                if len(stdout) > limit:
                    raise ResourceExhausted(f"printed more than {limit} bytes", where=str(child.args[0]))  # type: ignore[index]  # a list


def _feed_some(selector: selectors.BaseSelector, key: selectors.SelectorKey, pending: memoryview) -> memoryview:
    """Write what fits; close stdin when all is written or the program has stopped reading."""
    try:
        pending = pending[os.write(key.fd, pending) :]
    except BrokenPipeError:
        pending = pending[:0]
    if not pending:
        selector.unregister(key.fileobj)
        key.fileobj.close()  # type: ignore[union-attr]  # we registered a file object
    return pending


def _opened(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "every stream of this child is a pipe"
    return stream
