"""Short-lived helper programs: run, bounded in time and output, killed with their whole process group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import ended, time_limit, to_the_end
from imgsvc.base.errors import DeadlineExceeded, NotFound, from_os_error, printable
from imgsvc.base.oci import MIB

MAX_OUTPUT: Final = 4 * MIB  # [bytes] per stream; a CNI result or a runtime's state is some KiB
SAFE_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended. status: exit code, or -N for signal N."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def complaint(self) -> str:
        """The last line it wrote to standard error, made safe for a message."""
        lines = [line for line in self.stderr.decode(errors="replace").splitlines() if line.strip()]
        return printable(lines[-1].strip()) if lines else f"exit status {self.status}"


async def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 60.0,
) -> Finished:
    """Run a program to its end; output over MAX_OUTPUT is read and thrown away.

    Raises: NotFound (no such program), DeadlineExceeded (it and its process group were killed).
    """
    process = await spawn(argv, env=env, cwd=cwd)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    try:
        async with time_limit(timeout_s):
            _, stdout, stderr, status = await asyncio.gather(
                _feed(process.stdin, stdin), _collect(process.stdout), _collect(process.stderr), process.wait()
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


async def _collect(reader: asyncio.StreamReader) -> bytes:
    kept: list[bytes] = []
    size = 0
    while chunk := await reader.read(65536):
        if size < MAX_OUTPUT:
            kept.append(chunk[: MAX_OUTPUT - size])
            size += len(kept[-1])
    return b"".join(kept)
