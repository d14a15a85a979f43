"""Exec and attach sessions over a shim: FIFOs on one side, a client's streams on the other. Both are CommandTargets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from google.protobuf import any_pb2, empty_pb2

from imgsvc.api import task_v2_pb2 as task
from imgsvc.base.concurrency import stop_tasks
from imgsvc.base.errors import FailedPrecondition, ImgsvcError
from imgsvc.base.removal import discard
from imgsvc.runtime.handlers.oci.exec import exec_process
from imgsvc.runtime.handlers.shim.logs import ContainerLog
from imgsvc.runtime.streaming.fdio import FdReader, FdWriter
from imgsvc.runtime.streaming.interfaces import CommandTarget, Sink, Sizes, Source, Streams

R = TypeVar("R")

SPEC_PROCESS: Final = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_DRAIN_S: Final = 0.2  # the shim has copied everything before it reports the end of a process
_HANGUP_S: Final = 5.0


class Tasks(Protocol):
    """Calls to the shim that serves a container."""

    async def ask(self, container_id: str, method: str, request: Any, answer: type[R], *, timeout_s: float | None = 120.0) -> R:
        """One call of the task service. Raises: ImgsvcError."""


@dataclass(frozen=True, slots=True)
class ShimExec:
    """A command in a running container. process: the container's own, from config.json."""

    tasks: Tasks
    container_id: str
    process: Mapping[str, Any]
    command: tuple[str, ...]
    terminal: bool
    directory: Path

    async def run(self, streams: Streams) -> int:
        """As CommandTarget.run."""
        place = Path(tempfile.mkdtemp(prefix="exec-", dir=self.directory))
        try:
            async with AsyncExitStack() as ours:
                return await self._run(place, streams, ours)
        finally:
            discard(place)

    async def _run(self, place: Path, streams: Streams, ours: AsyncExitStack) -> int:
        outputs = _outputs(place, streams, ours, terminal=self.terminal)
        request = task.ExecProcessRequest(
            id=self.container_id, exec_id=place.name, terminal=self.terminal, stdout=str(place / "stdout"), stderr=_path(place, "stderr")
        )
        if streams.stdin:
            os.mkfifo(place / "stdin", 0o600)
            request.stdin = str(place / "stdin")
        process = exec_process(self.process, self.command, terminal=self.terminal)
        request.spec.CopyFrom(any_pb2.Any(type_url=SPEC_PROCESS, value=json.dumps(process).encode()))
        ours.push_async_callback(self._forget, place.name)  # before it is asked for: a caller that leaves now does not hear of it
        await self._ask("Exec", request, empty_pb2.Empty)
        await self._ask("Start", task.StartRequest(id=self.container_id, exec_id=place.name), task.StartResponse)
        async with self._sides(place, streams, ours):
            carried = [asyncio.create_task(_deliver(reader, sink)) for reader, sink in outputs]
            try:
                wait = task.WaitRequest(id=self.container_id, exec_id=place.name)
                ended = await self._ask("Wait", wait, task.WaitResponse, timeout_s=None)
                for reader, _ in outputs:
                    reader.end_within(_DRAIN_S)
                await asyncio.gather(*carried)
            finally:
                await stop_tasks(*carried)
        return ended.exit_status

    @asynccontextmanager
    async def _sides(self, place: Path, streams: Streams, ours: AsyncExitStack) -> AsyncIterator[None]:
        sides = []
        if streams.stdin:
            writer = FdWriter(os.open(place / "stdin", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            ours.callback(writer.close)
            sides.append(asyncio.create_task(self._feed(streams.stdin, writer, place.name)))
        if streams.sizes:
            sides.append(asyncio.create_task(resize(self.tasks, self.container_id, place.name, streams.sizes)))
        try:
            yield
        finally:
            await stop_tasks(*sides)

    async def _feed(self, source: Source, writer: FdWriter, exec_id: str) -> None:
        while data := await source.read():
            await writer.write(data)
        writer.close()  # the process sees the end only when no writer holds the FIFO open
        await close_stdin(self.tasks, self.container_id, exec_id)

    async def _forget(self, exec_id: str) -> None:
        """Kill the process if it still runs, and let the shim forget it."""
        with contextlib.suppress(ImgsvcError):
            await self._ask(
                "Kill",
                task.KillRequest(id=self.container_id, exec_id=exec_id, signal=signal.SIGKILL, all=True),
                empty_pb2.Empty,
                timeout_s=_HANGUP_S,
            )
            wait = task.WaitRequest(id=self.container_id, exec_id=exec_id)
            await self._ask("Wait", wait, task.WaitResponse, timeout_s=_HANGUP_S)
        with contextlib.suppress(ImgsvcError):
            await self._ask("Delete", task.DeleteRequest(id=self.container_id, exec_id=exec_id), task.DeleteResponse, timeout_s=_HANGUP_S)

    async def _ask(self, method: str, request: Any, answer: type[R], *, timeout_s: float | None = 120.0) -> R:
        return await self.tasks.ask(self.container_id, method, request, answer, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class ShimAttach:
    """The first process of a running container. once: its standard input ends with the first client's."""

    tasks: Tasks
    container_id: str
    log: ContainerLog
    stdin: Path
    once: bool

    async def run(self, streams: Streams) -> int:
        """As CommandTarget.run. Raises: FailedPrecondition when the client reads too slowly for the container."""
        async with AsyncExitStack() as ours:
            sides = []
            if streams.stdin and self.stdin.exists():
                writer = FdWriter(os.open(self.stdin, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                ours.callback(writer.close)
                sides.append(asyncio.create_task(self._feed(streams.stdin, writer)))
            if streams.sizes:
                sides.append(asyncio.create_task(resize(self.tasks, self.container_id, "", streams.sizes)))
            ours.push_async_callback(stop_tasks, *sides)
            sinks = {"stdout": streams.stdout, "stderr": streams.stderr}
            async with contextlib.aclosing(self.log.follow()) as output:
                async for name, data in output:
                    if (sink := sinks[name]) is not None:
                        await sink.write(data)
        return 0

    async def _feed(self, source: Source, writer: FdWriter) -> None:
        while data := await source.read():
            await writer.write(data)
        writer.close()
        if self.once:
            await close_stdin(self.tasks, self.container_id, "")


def _path(place: Path, name: str) -> str:
    return str(place / name) if (place / name).exists() else ""


def _outputs(place: Path, streams: Streams, ours: AsyncExitStack, *, terminal: bool) -> list[tuple[FdReader, Sink | None]]:
    """Make and open the output FIFOs. The shim wants both unless there is a terminal; unwanted output is discarded."""
    found: list[tuple[FdReader, Sink | None]] = []
    wanted: Sequence[tuple[str, Sink | None]] = (("stdout", streams.stdout), ("stderr", streams.stderr))
    for name, sink in wanted[:1] if terminal else wanted:
        os.mkfifo(place / name, 0o600)
        reader = FdReader(os.open(place / name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        ours.callback(reader.close)
        found.append((reader, sink))
    return found


async def _deliver(reader: FdReader, sink: Sink | None) -> None:
    while data := await reader.read():
        if sink is not None:
            await sink.write(data)


async def close_stdin(tasks: Tasks, container_id: str, exec_id: str) -> None:
    """End of standard input; a process that has ended needs none."""
    with contextlib.suppress(ImgsvcError):
        await tasks.ask(container_id, "CloseIO", task.CloseIORequest(id=container_id, exec_id=exec_id, stdin=True), empty_pb2.Empty)


async def resize(tasks: Tasks, container_id: str, exec_id: str, sizes: Sizes) -> None:
    """Pass terminal sizes on."""
    while size := await sizes.next():
        request = task.ResizePtyRequest(id=container_id, exec_id=exec_id, width=size.width, height=size.height)
        with contextlib.suppress(FailedPrecondition):
            await tasks.ask(container_id, "ResizePty", request, empty_pb2.Empty)


def as_command_target(target: ShimExec | ShimAttach) -> CommandTarget:
    """Typed as its Protocol, for mypy."""
    return target
