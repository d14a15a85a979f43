"""conmon: one small process per container that keeps its stdio, writes its log and stores its exit code.

It outlives the daemon. What it leaves, and where (BUNDLE is STATE/containers/ID):

=================== =====================================================
BUNDLE/conmon.pid   its pid
BUNDLE/ctl          FIFO: "1 H W" resizes the terminal, "2 0 0" reopens the log
BUNDLE/attach       SEQPACKET socket, also reachable as SOCKETS/ID/attach
EXITS/ID            exit code; the file's time is the container's end
BUNDLE/oom          exists when the kernel killed something for memory
=================== =====================================================

Source: conmon 2.1 (command line, pipes, files).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import in_thread, time_limit, to_the_end
from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, NotFound, from_os_error, printable
from imgsvc.base.programs import SAFE_PATH, kill_group
from imgsvc.runtime.interfaces import Exit, NewTask
from imgsvc.runtime.processes.exits import UNKNOWN_EXIT, now_ns, process_gone, read_exit_file, settle, start_time
from imgsvc.runtime.processes.reaper import Reaper

CREATE_TIMEOUT_S: Final = 120.0
_EXIT_FILE_WAIT_S: Final = 12.0  # conmon drains the container's pipes before it stores the code
_REOPEN_WAIT_S: Final = 5.0
_REAP_WAIT_S: Final = 0.05  # the reaper is quicker
_MAX_MESSAGE: Final = 65536


@dataclass(frozen=True, slots=True)
class MonitorPaths:
    """Where conmon's files are."""

    bundles: Path
    exits: Path
    sockets: Path

    def bundle(self, container_id: str) -> Path:
        """The bundle of a container."""
        return self.bundles / container_id


class Conmon:
    """Starts conmon and reads what it leaves."""

    def __init__(self, program: str, paths: MonitorPaths, reaper: Reaper) -> None:
        self._program = program
        self._paths = paths
        self._reaper = reaper

    async def create(self, task: NewTask, runtime: str, runtime_args: Sequence[str], flags: Sequence[str]) -> int:
        """Have conmon run `RUNTIME ARGS create`; the pid of the container's init. When the caller is cancelled, this ends after the
        runtime has: what it makes can be deleted then.

        Raises: FailedPrecondition with the runtime's complaint, NotFound (no conmon), DeadlineExceeded.
        """
        return await to_the_end(self._create(task, [self._program, *self._arguments(task, runtime, runtime_args), *flags]))

    async def _create(self, task: NewTask, argv: Sequence[str]) -> int:
        sync_read, sync_write = os.pipe2(os.O_CLOEXEC)
        start_read, start_write = os.pipe2(os.O_CLOEXEC)
        # Its arguments have to be text in its locale: without one of UTF-8, a path outside ASCII is refused.
        environment = {"PATH": os.environ.get("PATH", SAFE_PATH), "LC_ALL": "C.UTF-8"}
        environment |= {"_OCI_SYNCPIPE": str(sync_write), "_OCI_STARTPIPE": str(start_read)}
        try:
            try:
                launcher = await _launch(argv, environment, task.bundle, (sync_write, start_read))
            finally:
                os.close(sync_write)
                os.close(start_read)
            os.write(start_write, b"\0")
            os.close(start_write)
            start_write = -1
            answer = await self._answer(task.container_id, launcher, sync_read)
        finally:
            os.close(sync_read)
            if start_write >= 0:
                os.close(start_write)
        return _created_pid(answer)

    async def _answer(self, container_id: str, launcher: asyncio.subprocess.Process, sync_read: int) -> bytes:
        """What conmon says of the runtime's create. Raises: DeadlineExceeded; both are killed then."""
        try:
            async with time_limit(CREATE_TIMEOUT_S):
                await launcher.wait()
                return await _read_line(sync_read)
        except TimeoutError as error:
            for pid in {self.pid(container_id), launcher.pid if launcher.returncode is None else 0} - {0}:
                kill_group(pid)
            await launcher.wait()
            raise DeadlineExceeded(f"container {container_id} was not created within {CREATE_TIMEOUT_S:g} s") from error
        finally:
            self._reaper.adopt(self.pid(container_id))

    def _arguments(self, task: NewTask, runtime: str, runtime_args: Sequence[str]) -> list[str]:
        bundle = task.bundle
        argv = ["-b", str(bundle), "-c", task.container_id, "-u", task.container_id, "-n", task.container_id, "-r", runtime]
        argv += [f"--runtime-arg={argument}" for argument in runtime_args]
        argv += ["--exit-dir", str(self._paths.exits), "--persist-dir", str(bundle), "--socket-dir-path", str(self._paths.sockets)]
        argv += ["-P", str(bundle / "conmon.pid"), "-p", str(bundle / "init.pid"), "--log-level", "error"]
        argv += ["-l", f"k8s-file:{task.log_path}" if task.log_path else "none"]
        if task.terminal:
            argv.append("-t")
        if task.stdin:
            argv.append("-i")
            if not task.stdin_once:
                argv.append("--leave-stdin-open")
        return argv

    def pid(self, container_id: str) -> int:
        """Conmon's pid, 0 when there is none. Raises: OSError when that is unknown now."""
        try:
            return int((self._paths.bundle(container_id) / "conmon.pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    async def wait(self, container_id: str, pid: int, pid_start: int) -> Exit:
        """Until the container has ended and conmon stored the code; 255 when conmon died before and the code is unknown."""
        monitor = self.pid(container_id)
        monitor_start = start_time(monitor)
        if not monitor_start:
            self._reaper.adopt(pid)
        await process_gone(pid, pid_start)
        found = await self._stored_exit(container_id, monitor, monitor_start)
        oom = (self._paths.bundle(container_id) / "oom").exists()
        if found is None:
            code = self._reaper.exit_code(pid)  # without its monitor, the container was our child
            return Exit(UNKNOWN_EXIT if code is None else code, now_ns(), oom, known=code is not None)
        return Exit(found[0], found[1], oom)

    async def _stored_exit(self, container_id: str, monitor: int, monitor_start: int) -> tuple[int, int] | None:
        path = self._paths.exits / container_id
        pause, waited = 0.001, 0.0
        while (found := read_exit_file(path)) is None:
            if waited >= _EXIT_FILE_WAIT_S or start_time(monitor) != monitor_start or not monitor_start:
                await asyncio.sleep(_REAP_WAIT_S)
                return read_exit_file(path)  # it may have been stored between the two looks
            await asyncio.sleep(pause)
            waited += pause
            pause = min(pause * 2, 0.1)
        return found

    async def reopen_log(self, container_id: str, log_path: str) -> None:
        """Make conmon open the log path again; it does not answer, so wait for the file.

        Raises: FailedPrecondition (no conmon), DeadlineExceeded.
        """
        await in_thread(self._control, container_id, "2 0 0\n")
        waited = 0.0
        while not os.path.lexists(log_path):
            if waited > _REOPEN_WAIT_S:
                raise DeadlineExceeded("the log was not opened again", where=log_path)
            await asyncio.sleep(0.005)
            waited += 0.005

    def _control(self, container_id: str, line: str) -> None:
        path = self._paths.bundle(container_id) / "ctl"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FailedPrecondition(f"container {container_id} has no monitor: {error.strerror}") from error
        with os.fdopen(fd, "wb", buffering=0) as stream:
            stream.write(line.encode())

    async def gone(self, container_id: str) -> None:
        """Until conmon has ended (bounded), then remove what it left outside the bundle."""
        monitor = self.pid(container_id)
        with contextlib.suppress(TimeoutError):
            async with time_limit(_EXIT_FILE_WAIT_S):
                await process_gone(monitor, start_time(monitor))
        (self._paths.exits / container_id).unlink(missing_ok=True)
        (self._paths.sockets / container_id).unlink(missing_ok=True)


async def _launch(argv: Sequence[str], env: dict[str, str], cwd: Path, fds: tuple[int, ...]) -> asyncio.subprocess.Process:
    nowhere = asyncio.subprocess.DEVNULL
    try:
        return await asyncio.create_subprocess_exec(
            *argv, stdin=nowhere, stdout=nowhere, stderr=nowhere, env=env, cwd=cwd, pass_fds=fds, start_new_session=True
        )
    except FileNotFoundError as error:
        raise NotFound(f"no program {argv[0]}", hint="install conmon, or correct [runtime] conmon") from error
    except OSError as error:
        raise from_os_error(error, "starting conmon", where=argv[0]) from error


async def _read_line(fd: int) -> bytes:
    """One line from a pipe, without a thread."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    data = b""
    while b"\n" not in data and len(data) < _MAX_MESSAGE:
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(fd, settle, readable)
        try:
            await readable
        finally:
            loop.remove_reader(fd)
        chunk = os.read(fd, 8192)
        if not chunk:
            break
        data += chunk
    return data


def _created_pid(answer: bytes) -> int:
    try:
        message: dict[str, Any] = json.loads(answer)
        pid = int(message.get("pid", message.get("data", -1)))
    except (ValueError, AttributeError, TypeError) as error:
        raise FailedPrecondition(f"conmon ended without an answer: {printable(answer.decode(errors='replace')) or 'no output'}") from error
    if pid <= 0:
        raise FailedPrecondition(f"the OCI runtime refused the container: {runtime_message(str(message.get('message', '')))}")
    return pid


def runtime_message(text: str) -> str:
    """The telling part of what runc or crun wrote: the msg of JSON or logfmt lines, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "no message"
    last = lines[-1]
    with contextlib.suppress(ValueError, AttributeError):
        return printable(str(json.loads(last).get("msg", last)))
    marker = 'msg="'
    if marker in last:
        last = last[last.index(marker) + len(marker) :].rstrip('"').replace('\\"', '"')
    return printable(last)
