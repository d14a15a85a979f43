"""ShimRuntime: an OCIRuntime over containerd shims."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from google.protobuf import any_pb2, empty_pb2

from imgsvc.api import runc_options_pb2, runtime_options_pb2
from imgsvc.api import task_v2_pb2 as task
from imgsvc.base import procfs
from imgsvc.base.concurrency import Undo, in_thread, time_limit, to_the_end
from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, ImgsvcError, NotFound, Unavailable
from imgsvc.runtime.handlers.shim.bootstrap import Endpoint, Launcher, find_program, program_name, save_endpoint, saved_endpoint
from imgsvc.runtime.handlers.shim.connections import CALL_TIMEOUT_S, Connections
from imgsvc.runtime.handlers.shim.events import ShimEvents
from imgsvc.runtime.handlers.shim.figures import usage_of
from imgsvc.runtime.handlers.shim.logs import ContainerLog
from imgsvc.runtime.handlers.shim.pods import ShimPods, join_pod, made_by_shim
from imgsvc.runtime.handlers.shim.sessions import ShimAttach, ShimExec
from imgsvc.runtime.handlers.shim.stuck import kill_listener
from imgsvc.runtime.interfaces import ExecResult, Exit, HandlerFeatures, NewTask, OCIRuntime
from imgsvc.runtime.numbers import cgroups
from imgsvc.runtime.numbers.usage import Usage
from imgsvc.runtime.processes.exits import UNKNOWN_EXIT, now_ns
from imgsvc.runtime.settings import HandlerSettings, RuntimeSettings
from imgsvc.runtime.streaming.interfaces import Streams

log = logging.getLogger(__name__)

R = TypeVar("R")

_KILL_S: Final = 5.0  # for a shim to send a signal, which takes it the start of an OCI runtime
_PROBE_S: Final = 2.0  # for one that has not, to answer anything at all
_END_S: Final = 30.0  # from SIGKILL to the end of a container, and to its being deleted
_KILLED: Final = 128 + signal.SIGKILL
_EXEC_LIMIT: Final = 16 * 1024 * 1024
_SPEC_RESOURCES: Final = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


class ShimRuntime:
    """One handler whose type is a containerd runtime name. Satisfies OCIRuntime."""

    def __init__(self, handler: HandlerSettings, settings: RuntimeSettings, bundles: Path) -> None:
        self._handler = handler
        self._settings = settings
        self._bundles = bundles
        place = settings.state_dir / f"shim-{handler.name}"
        self._events = ShimEvents(place.with_name(f"{place.name}.sock"), place.with_name(f"{place.name}.oom"))
        self._launcher = Launcher(handler.path or program_name(handler.type), str(settings.state_dir / "imgsvc.sock"), self._events)
        self._connections = Connections()
        self._pods = ShimPods(self._launcher, self._connections, bundles)
        self._inits: dict[str, tuple[int, int]] = {}  # pid and start of those that are waited for
        self._fates: dict[str, int | None] = {}
        # Only the runc shim can do without a sandbox container: others build their sandbox from it.
        self._features = HandlerFeatures(needs_pause=not self._is_runc, own_figures=not self._is_runc)

    @property
    def _is_runc(self) -> bool:
        return ".runc." in self._handler.type

    @property
    def features(self) -> HandlerFeatures:
        """See OCIRuntime."""
        return self._features

    @property
    def pods(self) -> ShimPods:
        """See OCIRuntime. Whether its shims have a sandbox API shows when it is called."""
        return self._pods

    @property
    def description(self) -> str:
        """See OCIRuntime."""
        return self._handler.describe(self._handler.path)

    async def start(self, *, test: bool = True) -> None:
        """See OCIRuntime."""
        if test:
            self._launcher.program = find_program(self._handler.type, self._handler.path)
            await self._find_features()
        await in_thread(self._events.start, again=True)

    async def _find_features(self) -> None:
        found = await self._launcher.describe()
        # What the runc shim of an older containerd cannot tell is true of every runc that is still in use.
        self._features = replace(
            self._features,
            recursive_read_only_mounts="rro" in found.get("mountOptions", ()) if found else self._is_runc,
            user_namespaces="user" in found.get("linux", {}).get("namespaces", ()) if found else self._is_runc,
        )

    async def close(self) -> None:
        """See OCIRuntime."""
        await self._connections.close()

    async def create(self, task_: NewTask) -> int:
        """See OCIRuntime."""
        async with Undo() as undo:
            undo.push(f"deleting container {task_.container_id}", self.delete, task_.container_id)
            # To its end also when the caller leaves: a shim that is still starting has no address yet to be ended by.
            return await to_the_end(self._create(task_))

    async def _create(self, new: NewTask) -> int:
        endpoint = join_pod(new.bundle, self._bundles / new.sandbox_id)
        if endpoint:
            save_endpoint(new.bundle, endpoint)
        else:
            endpoint = await self._launcher.start(new.container_id, new.bundle, self._options())
        # A pod's pause process says nothing.
        fifos = await in_thread(self._make_fifos, new) if new.container_id != new.sandbox_id else {}
        request = task.CreateTaskRequest(
            id=new.container_id,
            bundle=str(new.bundle),
            terminal=new.terminal,
            stdin=str(fifos["stdin"]) if "stdin" in fifos else "",
            stdout=str(fifos.get("stdout", "")),
            stderr=str(fifos.get("stderr", "")),
        )
        if options := self._options():
            request.options.CopyFrom(options)
        return (await self._connections.task(endpoint, "Create", request, task.CreateTaskResponse)).pid

    def _make_fifos(self, new: NewTask) -> dict[str, Path]:
        names = ["stdout"] if new.terminal else ["stdout", "stderr"]
        names += ["stdin"] if new.stdin else []
        directory = new.bundle / "io"
        directory.mkdir(mode=0o700)
        for name in names:
            os.mkfifo(directory / name, 0o600)
        facts = {"log_directory": new.log_directory, "log_path": new.log_path, "stdin_once": new.stdin_once}
        (new.bundle / "io.json").write_text(json.dumps(facts))
        self._log(new.container_id).start()
        return {name: directory / name for name in names}

    def _log(self, container_id: str) -> ContainerLog:
        return ContainerLog(self._bundles / container_id, self._settings.max_container_log_line_size)

    def _options(self) -> any_pb2.Any | None:
        """The handler's options as the shim expects them."""
        o = self._handler.options
        if self._is_runc:
            message = runc_options_pb2.Options(
                no_pivot_root=bool(o.get("NoPivotRoot")),
                no_new_keyring=bool(o.get("NoNewKeyring")),
                shim_cgroup=str(o.get("ShimCgroup", "")),
                io_uid=int(o.get("IoUid", 0)),
                io_gid=int(o.get("IoGid", 0)),
                binary_name=str(o.get("BinaryName", "")),
                root=str(o.get("Root", "")),
                systemd_cgroup=bool(o.get("SystemdCgroup", self._settings.cgroup_driver == "systemd")),
                criu_image_path=str(o.get("CriuImagePath", "")),
                criu_work_path=str(o.get("CriuWorkPath", "")),
            )
            return any_pb2.Any(type_url="containerd.runc.v1.Options", value=message.SerializeToString())
        if not o:
            return None
        body = str(o.get("ConfigBody", "")).encode()
        generic = runtime_options_pb2.Options(
            type_url=str(o.get("TypeUrl", "")), config_path=str(o.get("ConfigPath", "")), config_body=body
        )
        return any_pb2.Any(type_url="runtimeoptions.v1.Options", value=generic.SerializeToString())

    async def start_pause(self, sandbox_id: str, bundle: Path) -> int:
        """See OCIRuntime."""
        pid = await self.create(NewTask(sandbox_id, sandbox_id, bundle))
        await self.start_task(sandbox_id)
        return pid

    async def start_task(self, container_id: str) -> None:
        """See OCIRuntime."""
        await self.ask(container_id, "Start", task.StartRequest(id=container_id), task.StartResponse)

    async def kill(self, container_id: str, signal: int, *, everyone: bool = False) -> None:
        """See OCIRuntime."""
        request = task.KillRequest(id=container_id, signal=signal, all=everyone)
        with contextlib.suppress(NotFound):
            try:
                await self.ask(container_id, "Kill", request, empty_pb2.Empty, timeout_s=_KILL_S)
            except FailedPrecondition as error:
                if "process already finished" not in error.what and "not running" not in error.what:
                    raise
            except DeadlineExceeded:
                if not await self._put_down(container_id):
                    raise

    async def _put_down(self, container_id: str) -> bool:
        """Kill the shim of a container if it answers nothing at all; whether it did so. Nothing can be done to its containers
        any more: the tasks that wait for them then record their end.
        """
        endpoint = saved_endpoint(self._bundles / container_id)
        if endpoint is None or await self._answers(endpoint, container_id):
            return False
        for other, (pid, started) in self._inits.items():
            if saved_endpoint(self._bundles / other) == endpoint:
                self._fates[other] = _fate(pid, started)  # before they are ours to reap
        killed = await in_thread(kill_listener, endpoint.address)
        log.error("the shim of container %s did not answer, and was killed: process %s", container_id, killed or "unknown")
        return True

    async def _answers(self, endpoint: Endpoint, container_id: str) -> bool:
        """Whether a shim answers a call that takes it nothing, with whatever."""
        request = task.ConnectRequest(id=container_id)
        try:
            await self._connections.task(endpoint, "Connect", request, task.ConnectResponse, timeout_s=_PROBE_S)
        except DeadlineExceeded:
            return False
        except ImgsvcError:
            pass
        return True

    async def wait(self, container_id: str, pid: int, pid_start: int) -> Exit:
        """See OCIRuntime."""
        keeper = asyncio.create_task(self._log(container_id).keep(), name=f"log-{container_id[:12]}")
        self._inits[container_id] = pid, pid_start
        try:
            answer = await self._await_end(container_id)
            if answer is None:
                return await self._bury(container_id, self._fates[container_id] if container_id in self._fates else _fate(pid, pid_start))
        except NotFound:
            return Exit(UNKNOWN_EXIT, now_ns(), self._events.out_of_memory(container_id), known=False)
        finally:
            keeper.cancel()
            del self._inits[container_id]
            self._fates.pop(container_id, None)
        await self._log(container_id).finish()
        return Exit(answer.exit_status, answer.exited_at.ToNanoseconds() or now_ns(), self._events.out_of_memory(container_id))

    async def _await_end(self, container_id: str) -> task.WaitResponse | None:
        """The shim's answer, None when the shim has died."""
        request = task.WaitRequest(id=container_id)
        while True:
            try:
                return await self.ask(container_id, "Wait", request, task.WaitResponse, timeout_s=None)
            except Unavailable:
                if await self._shim_is_dead(container_id):
                    return None

    async def _shim_is_dead(self, container_id: str) -> bool:
        endpoint = saved_endpoint(self._bundles / container_id)
        if endpoint is None:
            return True
        with contextlib.suppress(Unavailable):
            await self._connections.client(endpoint)
            return False
        return True

    async def _bury(self, container_id: str, fate: int | None) -> Exit:
        """The shim died: end what is left of the container, and say how it ended. fate: see _fate."""
        answer = await self._end_rest(container_id)
        await self._log(container_id).finish()
        code = answer.exit_status or _KILLED if fate is None else fate
        return Exit(code, answer.exited_at.ToNanoseconds() or now_ns(), known=fate is not None)

    async def _end_rest(self, container_id: str) -> task.DeleteResponse:
        """Kill what a shim that is dead has left of a container, and let its program clear up. Raises: FailedPrecondition."""
        bundle = self._bundles / container_id
        if path := _cgroup(bundle):
            await in_thread(cgroups.kill, path)
        return await self._launcher.delete(container_id, bundle)

    async def delete(self, container_id: str) -> None:
        """See OCIRuntime."""
        bundle = self._bundles / container_id
        endpoint = saved_endpoint(bundle)
        if endpoint is None:
            await self._log(container_id).finish()
            return
        try:
            await self._delete_task(endpoint, container_id)
        except (Unavailable, DeadlineExceeded) as error:
            if isinstance(error, DeadlineExceeded) and not await self._put_down(container_id):
                raise
            with contextlib.suppress(FailedPrecondition):
                await self._end_rest(container_id)
            if not made_by_shim(bundle):
                Path(endpoint.address.removeprefix("unix://")).unlink(missing_ok=True)
        await self._log(container_id).finish()
        (bundle / "bootstrap.json").unlink(missing_ok=True)
        self._events.forget(container_id)

    async def _delete_task(self, endpoint: Endpoint, container_id: str) -> None:
        kill = task.KillRequest(id=container_id, signal=signal.SIGKILL, all=True)
        with contextlib.suppress(NotFound, FailedPrecondition):
            await self._connections.task(endpoint, "Kill", kill, empty_pb2.Empty, timeout_s=_KILL_S)
            await self._connections.task(endpoint, "Wait", task.WaitRequest(id=container_id), task.WaitResponse, timeout_s=_END_S)
        with contextlib.suppress(NotFound):
            await self._connections.task(endpoint, "Delete", task.DeleteRequest(id=container_id), task.DeleteResponse, timeout_s=_END_S)
        if made_by_shim(self._bundles / container_id):
            return  # the shim ends with its pod
        with contextlib.suppress(ImgsvcError):  # refused while the pod has other containers; then it answers and stays
            shutdown = task.ShutdownRequest(id=container_id)
            await self._connections.task(endpoint, "Shutdown", shutdown, empty_pb2.Empty, timeout_s=_KILL_S)

    async def usage(self, container_id: str) -> Usage | None:
        """See OCIRuntime."""
        try:
            answer = await self.ask(container_id, "Stats", task.StatsRequest(id=container_id), task.StatsResponse, timeout_s=10.0)
        except ImgsvcError:
            return None
        return usage_of(answer.stats)

    async def update(self, container_id: str, resources: Mapping[str, Any]) -> None:
        """See OCIRuntime."""
        request = task.UpdateTaskRequest(id=container_id)
        request.resources.CopyFrom(any_pb2.Any(type_url=_SPEC_RESOURCES, value=json.dumps(dict(resources)).encode()))
        await self.ask(container_id, "Update", request, empty_pb2.Empty)

    async def checkpoint(self, container_id: str, images: Path, work: Path, timeout_s: float) -> None:
        """See OCIRuntime."""
        raise FailedPrecondition(
            f"checkpoints are made by criu through an OCI runtime, not through {self._handler.type}", hint='use a handler of type "oci"'
        )

    async def reopen_log(self, container_id: str, log_path: str) -> None:
        """See OCIRuntime."""
        await self._log(container_id).reopen()

    async def exec_sync(self, container_id: str, command: Sequence[str], timeout_s: float) -> ExecResult:
        """See OCIRuntime."""
        stdout, stderr = _Kept(), _Kept()
        try:
            async with time_limit(timeout_s or None):
                code = await self.exec_target(container_id, command, terminal=False).run(Streams(stdout=stdout, stderr=stderr))
        except TimeoutError as error:
            raise DeadlineExceeded(f"the command did not end within {timeout_s:g} s and was killed") from error
        return ExecResult(bytes(stdout.data), bytes(stderr.data), code)

    def exec_target(self, container_id: str, command: Sequence[str], *, terminal: bool) -> ShimExec:
        """See OCIRuntime."""
        bundle = self._bundles / container_id
        process = json.loads((bundle / "config.json").read_bytes())["process"]
        return ShimExec(self, container_id, process, tuple(command), terminal, bundle / "io")

    def attach_target(self, container_id: str) -> ShimAttach:
        """See OCIRuntime."""
        bundle = self._bundles / container_id
        once = bool(json.loads((bundle / "io.json").read_text()).get("stdin_once"))
        return ShimAttach(self, container_id, self._log(container_id), bundle / "io/stdin", once)

    async def ask(self, container_id: str, method: str, request: Any, answer: type[R], *, timeout_s: float | None = CALL_TIMEOUT_S) -> R:
        """See Tasks."""
        endpoint = saved_endpoint(self._bundles / container_id)
        if endpoint is None:
            raise NotFound(f"no shim serves container {container_id}")
        return await self._connections.task(endpoint, method, request, answer, timeout_s=timeout_s)


def _fate(pid: int, started: int) -> int | None:
    """The exit code of a container's init whose shim does not tell it: of a zombie what the kernel says, of one that lives that
    of the SIGKILL it is about to get; None when it is gone. Blocking.
    """
    found = procfs.process(pid)
    if found is None or found.start != started:
        return None
    if not found.ended:
        return _KILLED
    code = os.waitstatus_to_exitcode(found.status)
    return code if code >= 0 else 128 - code


def _cgroup(bundle: Path) -> str:
    """Where a container lives in the cgroup tree; "" when its bundle does not tell."""
    try:
        return cgroups.tree_path(json.loads((bundle / "config.json").read_bytes())["linux"]["cgroupsPath"])
    except (OSError, ValueError, KeyError):
        return ""


class _Kept:
    """A sink that keeps output up to a limit and throws the rest away."""

    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        """As Sink.write."""
        self.data += data[: _EXEC_LIMIT - len(self.data)]


def as_oci_runtime(runtime: ShimRuntime) -> OCIRuntime:
    """Typed as its Protocol, for mypy."""
    return runtime
