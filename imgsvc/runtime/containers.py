"""The life of a container.

Create makes the root file system, the specification and, through the handler, the stopped init process; start lets it
exec; a watcher per container notes its end; stop signals, waits and kills; remove takes everything away. Create rolls
back step by step; stop and remove may be repeated at any time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import Undo, in_thread, stop_tasks, time_limit
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument, NotFound, printable
from imgsvc.base.failpoints import afailpoint
from imgsvc.runtime.core import Core, os_errors
from imgsvc.runtime.events import EventType
from imgsvc.runtime.handlers.oci.execerror import is_about_the_command
from imgsvc.runtime.holder.choice import holder_of
from imgsvc.runtime.interfaces import Exit, NewTask, OCIRuntime, RootMount, RunnableImage
from imgsvc.runtime.logs import check_log_directory, prepare_log
from imgsvc.runtime.model import ContainerConfig, LinuxContainerResources, NamespaceMode
from imgsvc.runtime.nri.messages import adjusted_resources
from imgsvc.runtime.numbers import cgroups
from imgsvc.runtime.numbers.oom import OomLedger
from imgsvc.runtime.processes.exits import UNKNOWN_EXIT, alive, now_ns, persistently, start_time
from imgsvc.runtime.records import ContainerRecord, SandboxRecord, container_name, durable
from imgsvc.runtime.rootfs import remove_bundle
from imgsvc.runtime.signals import stop_signal_name, to_number
from imgsvc.runtime.spec import validate
from imgsvc.runtime.spec.build import resources as resources_spec
from imgsvc.runtime.spec.planner import BuiltContainer, ContainerPlanner, built_from, volume_key
from imgsvc.runtime.state import (
    ContainerState,
    container_state,
    require_alive,
    require_ready,
    require_running,
    require_startable,
)

log = logging.getLogger(__name__)

KILL_WAIT_S: Final = 10.0  # after SIGKILL; longer means a process in uninterruptible sleep
_RUNTIME_KILL_S: Final = 2.0  # after the runtime's own SIGKILL, which takes moments, until the cgroup is tried
_START_FAILED: Final = 128  # exit code when init never ran, as containerd reports it


async def _create_init(handler: OCIRuntime, task: NewTask) -> tuple[int, str]:
    """(pid, "") of a container's init; (0, the runtime's complaint) when its command cannot be run: StartContainer tells that.

    A pod whose command is wrong so comes to an end, as with containerd, where the runtime's create is part of the start.
    """
    try:
        return await handler.create(task), ""
    except FailedPrecondition as error:
        if not is_about_the_command(error.what):
            raise
        return 0, str(error)


class Containers:
    """CreateContainer, StartContainer, StopContainer, RemoveContainer and what recovery needs of them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._builder = ContainerPlanner(core)
        self._ended: dict[str, asyncio.Event] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._signalled: set[str] = set()
        self._kills = OomLedger()

    async def create(self, sandbox_id: str, config: ContainerConfig) -> ContainerRecord:
        """A created container in a ready pod. On failure nothing of it stays.

        Raises: NotFound (pod, image), InvalidArgument, AlreadyExists (name taken), FailedPrecondition.
        """
        core = self._core
        sandbox = core.records.sandbox(sandbox_id)
        self._require_open(sandbox)
        validate.container(config)
        image = await core.images.runnable(config.image.image)
        if image is None:
            raise NotFound(f'no image "{printable(config.image.image, 200)}" on this node', hint="pull it first")
        config = await self._builder.settle_image_volumes(config)
        record = self._new_record(sandbox, config, image)
        core.records.reserve(container_name(sandbox.id, config), record.id)
        try:
            with os_errors("making a container"):
                async with core.locks.hold(record.id), Undo() as undo:
                    made = await self._make(record, sandbox, image, undo)
                    self._require_open(core.records.sandbox(sandbox.id))
                    await core.nri.container_created(made)
        finally:
            if record.id not in core.records.containers:
                core.records.release(container_name(sandbox.id, config), record.id)
        core.events.emit(EventType.CREATED, made.id, sandbox.id)
        return made

    def _require_open(self, sandbox: SandboxRecord) -> None:
        require_ready(sandbox, self._core.boot_id)
        if sandbox.id in self._core.stopping:
            raise FailedPrecondition(f"pod sandbox {sandbox.id} is being stopped")

    def _new_record(self, sandbox: SandboxRecord, config: ContainerConfig, image: RunnableImage) -> ContainerRecord:
        log_path = ""
        if config.log_path:
            if not sandbox.config.log_directory:
                raise InvalidArgument("log_path without the pod's log_directory")
            log_path = os.path.join(sandbox.config.log_directory, config.log_path)
        return ContainerRecord(
            id=os.urandom(32).hex(),
            sandbox_id=sandbox.id,
            config=config,
            handler=sandbox.handler,
            image_id=str(image.image_id),
            image_ref=image.repo_digests[0] if image.repo_digests else str(image.image_id),
            image_name=image.repo_tags[0] if image.repo_tags else config.image.user_specified_image or config.image.image,
            boot_id=self._core.boot_id,
            created_at=now_ns(),
            log_path=log_path,
            stop_signal=stop_signal_name(config.stop_signal, image.config.stop_signal),
            resources=config.linux.resources,
        )

    async def _make(self, record: ContainerRecord, sandbox: SandboxRecord, image: RunnableImage, undo: Undo) -> ContainerRecord:
        core = self._core
        handler = core.runtime_of(record)
        undo.push(f"forgetting container {record.id}", self._give_up, record, undo)
        written = core.records.put_container(record)
        await afailpoint("container.recorded")
        undo.push(f"removing the files of container {record.id}", self._release, record)
        core.paths.bundle(record.id).mkdir(mode=0o711)
        mounts = await core.images.prepare_root(
            record.id,
            image.image_id,
            snapshotter=core.handler_settings(record.handler).snapshotter,
            user=sandbox.config.namespaces.user,
        )
        await afailpoint("container.root")
        built = await self._build(record, sandbox, image, mounts)
        undo.push(f"telling NRI plugins that container {record.id} will not be", core.nri.container_undone, record)
        if adjusted := await core.nri.create_container(record, sandbox, built.spec):
            built = await in_thread(self._write, record, built_from(adjusted))
            record = replace(record, resources=adjusted_resources(record.resources, adjusted))
        await afailpoint("container.bundle")
        undo.push(f"deleting container {record.id}", handler.delete, record.id)
        config = record.config
        task = NewTask(
            container_id=record.id,
            sandbox_id=sandbox.id,
            bundle=core.paths.bundle(record.id),
            terminal=config.tty,
            stdin=config.stdin,
            stdin_once=config.stdin_once,
            log_directory=sandbox.config.log_directory,
            log_path=record.log_path,
        )
        pid, start_error = await _create_init(handler, task)
        await afailpoint("container.created")
        made = replace(record, user=built.user, cgroup=built.cgroups_path, made_at=now_ns(), start_error=start_error)
        if not start_error:
            made = replace(made, pid=pid, pid_start=start_time(pid))
        await durable(written)
        core.records.advance_container(made, core.paths.bundle(record.id))
        core.nri.made(record.id)
        if not start_error:
            self.watch(made)
        return made

    async def _build(
        self, record: ContainerRecord, sandbox: SandboxRecord, image: RunnableImage, mounts: Sequence[RootMount]
    ) -> BuiltContainer:
        volumes = await self._builder.image_roots(record)
        target = self._target_pid(record, sandbox)  # here, because records belong to the event loop
        return await in_thread(self._build_blocking, record, sandbox, image, mounts, volumes, target)

    def _build_blocking(
        self,
        record: ContainerRecord,
        sandbox: SandboxRecord,
        image: RunnableImage,
        mounts: Sequence[RootMount],
        volumes: Sequence[Sequence[RootMount]],
        target: str,
    ) -> BuiltContainer:
        self._builder.mount_root(record, mounts, sandbox)
        if record.log_path:
            prepare_log(sandbox.config.log_directory, record.config.log_path)
        return self._write(record, self._builder.build(record, sandbox, image, volumes, target))

    def _write(self, record: ContainerRecord, built: BuiltContainer) -> BuiltContainer:
        (self._core.paths.bundle(record.id) / "config.json").write_text(json.dumps(built.spec))
        return built

    def _target_pid(self, record: ContainerRecord, sandbox: SandboxRecord) -> str:
        """The PID namespace to join: of the pod's pause process, or of a container (for debugging)."""
        options = record.config.security.namespace_options
        if options.pid == NamespaceMode.POD:
            if not (pid := holder_of(self._core, sandbox).pid(sandbox)):
                raise FailedPrecondition("the pod has no shared PID namespace")
            return f"/proc/{pid}/ns/pid"
        if options.pid != NamespaceMode.TARGET:
            return ""
        target = self._core.records.container(options.target_id)
        if target.sandbox_id != sandbox.id:
            raise InvalidArgument(f"the target container {target.id} belongs to another pod")
        require_running(target, self._core.boot_id)
        return f"/proc/{target.pid}/ns/pid"

    async def start(self, container_id: str) -> None:
        """Let a created container run. Raises: NotFound, FailedPrecondition."""
        core = self._core
        full_id = core.records.container(container_id).id
        with os_errors("starting a container"):
            async with core.locks.hold(full_id):
                await self._start_locked(full_id)

    async def _start_locked(self, full_id: str) -> None:
        core = self._core
        record = core.records.container(full_id)
        require_startable(record, core.boot_id)
        self._require_open(core.records.sandbox(record.sandbox_id))
        started_at = now_ns()
        try:
            if record.start_error:
                raise FailedPrecondition(record.start_error)
            await core.nri.start_container(record)
            await core.runtime_of(record).start_task(record.id)
            await afailpoint("container.started")
            current = core.records.container(full_id)
            core.records.advance_container(replace(current, started_at=started_at), core.paths.bundle(full_id))
        except BaseException as error:  # a caller that leaves, too: what runs must not count as CREATED
            async with Undo() as undo:
                message = str(error) or "the caller left while it was being started"
                undo.push(f"ending container {full_id}, which did not start,", self._start_failed, record, message)
                raise
        core.events.emit(EventType.STARTED, full_id, record.sandbox_id)
        await core.nri.container_started(core.records.container(full_id))

    async def _start_failed(self, record: ContainerRecord, message: str) -> None:
        core = self._core
        if not record.start_error:
            try:
                await core.runtime_of(record).kill(record.id, signal.SIGKILL)
            except ImgsvcError as error:
                log.error("container %s did not start, and cannot be killed: %s", record.id, error)
        current = core.records.container(record.id)
        failed = replace(current, finished_at=now_ns(), exit_code=_START_FAILED, reason="StartError", message=message)
        await durable(core.records.put_container(failed))
        await core.nri.stop_container(failed)

    def watch(self, record: ContainerRecord) -> None:
        """Note the container's end when it comes."""
        self._ended[record.id] = asyncio.Event()
        self._watchers[record.id] = asyncio.create_task(self._watch(record), name=f"watch-{record.id[:12]}")

    async def _watch(self, record: ContainerRecord) -> None:
        seen = await persistently(f"container {record.id}", lambda: self._note_end(record), lambda: not alive(record.pid, record.pid_start))
        if not seen:
            await self.finish(record.id, Exit(UNKNOWN_EXIT, now_ns(), known=False))
        self._ended[record.id].set()

    async def _note_end(self, record: ContainerRecord) -> None:
        await afailpoint("watch.container")
        self._kills.begin(self._group(record))
        handler = self._core.runtime_of(record)
        end = await handler.wait(record.id, record.pid, record.pid_start)
        if record.config.security.namespace_options.pid != NamespaceMode.CONTAINER:
            # Without a PID namespace of its own, init's death does not take the others with it.
            try:
                await handler.kill(record.id, signal.SIGKILL, everyone=True)
            except ImgsvcError as error:
                log.warning("processes of container %s may have outlived it: %s", record.id, error)
        killed = self._kills.ended(self._group(record))
        await self.finish(record.id, replace(end, oom_killed=end.oom_killed or killed))

    def _group(self, record: ContainerRecord) -> Path:
        """The container's cgroup on version 2; on version 1 there is none of that name, and conmon hears of every kill."""
        return cgroups.ROOT / cgroups.tree_path(record.cgroup).lstrip("/")

    async def finish(self, container_id: str, end: Exit) -> None:
        """Record how a container ended, once; after a start that is under way, so that events keep their order."""
        core = self._core
        async with core.locks.hold(container_id):
            record = core.records.containers.get(container_id)
            if record is None or record.finished_at:
                return
            reason = "OOMKilled" if end.oom_killed else "Unknown" if not end.known else "Completed" if end.code == 0 else "Error"
            message = "" if end.known else "the exit code was lost"
            # A file's time comes from the clock's last tick, which may lie before the start.
            finished_at = max(end.finished_at, record.started_at, record.created_at)
            finished = replace(record, finished_at=finished_at, exit_code=end.code, reason=reason, message=message)
            written = core.records.put_container(finished)
            core.events.emit(EventType.STOPPED, container_id, record.sandbox_id)
            await durable(written)
            await core.nri.stop_container(finished)

    async def stop(self, container_id: str, timeout_s: float) -> None:
        """Stop signal, then SIGKILL after `timeout_s`. Unknown and ended already are successes.

        Raises: FailedPrecondition when it does not die.
        """
        core = self._core
        try:
            record = core.records.container(container_id)
        except NotFound:
            return
        async with core.locks.hold(record.id):  # behind a create or start that is under way
            current = core.records.containers.get(record.id)
        if current is None or container_state(current, core.boot_id) not in (ContainerState.CREATED, ContainerState.RUNNING):
            return
        with os_errors("stopping a container"):
            if current.start_error:  # it has no process
                await self.finish(current.id, Exit(_START_FAILED, now_ns()))
            else:
                await self._end(current, timeout_s)

    async def _end(self, record: ContainerRecord, timeout_s: float) -> None:
        handler = self._core.runtime_of(record)
        if timeout_s > 0 and record.started_at:
            if record.id not in self._signalled:  # a second stop only waits: many signals are not more graceful than one
                self._signalled.add(record.id)
                try:
                    await handler.kill(record.id, to_number(record.stop_signal))
                except NotFound as error:
                    log.warning("container %s is killed without an earlier signal: %s", record.id, error)
                    timeout_s = 0.0
            if await self._wait_end(record, timeout_s):
                return
        await self._kill(handler, record)

    async def _kill(self, handler: OCIRuntime, record: ContainerRecord) -> None:
        """SIGKILL; by the cgroup where the runtime does not know the container any more, or is not there itself."""
        problem: ImgsvcError | None = None
        try:
            everyone = record.config.security.namespace_options.pid != NamespaceMode.CONTAINER
            await handler.kill(record.id, signal.SIGKILL, everyone=everyone)
        except ImgsvcError as error:
            problem = error
        if await self._wait_end(record, 0.0 if problem else _RUNTIME_KILL_S):
            return
        if record.cgroup:
            await in_thread(cgroups.kill, cgroups.tree_path(record.cgroup))
        if not await self._wait_end(record, KILL_WAIT_S):
            raise problem or FailedPrecondition(f"container {record.id} does not die", hint="a process of it hangs in the kernel")

    async def _wait_end(self, record: ContainerRecord, timeout_s: float) -> bool:
        ended = self._ended.get(record.id)
        if ended is None:  # removed meanwhile
            return not alive(record.pid, record.pid_start)
        try:
            async with time_limit(timeout_s):
                await ended.wait()
        except TimeoutError:
            return False
        return True

    async def end_all(self, sandbox_id: str) -> None:
        """Kill whatever runs in a pod. Raises: the first failure, after all were tried."""
        ids = [c.id for c in self._core.records.containers_of(sandbox_id)]
        results = await asyncio.gather(*(self.stop(i, 0) for i in ids), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def remove(self, container_id: str) -> None:
        """Kill if need be and take everything away but the log. Unknown is a success."""
        core = self._core
        try:
            full_id = core.records.container(container_id).id
        except NotFound:
            return
        await self.stop(full_id, 0)
        with os_errors("removing a container"):
            async with core.locks.hold(full_id):
                record = core.records.containers.get(full_id)
                if record is None:
                    return
                await core.nri.remove_container(record)
                await self.discard(record)
        core.events.emit(EventType.DELETED, full_id, record.sandbox_id)

    async def discard(self, record: ContainerRecord) -> None:
        """Remove every trace of a container, in whatever state it is; the record last."""
        core = self._core
        if runtime := core.find_runtime(record):
            await runtime.delete(record.id)
        await afailpoint("container.deleted")
        await self._release(record)
        await afailpoint("container.released")
        await self._forget(record)

    async def _give_up(self, record: ContainerRecord, undo: Undo) -> None:
        """A container of which something is left counts as ended, so that removing it tries again what failed."""
        if not undo.failed:
            await self._forget(record)
            return
        now, message = now_ns(), "it could not be created, and not be taken away whole"
        left = replace(record, made_at=now, finished_at=now, exit_code=_START_FAILED, reason="StartError", message=message)
        await durable(self._core.records.put_container(left))

    async def _forget(self, record: ContainerRecord) -> None:
        """Stop watching, and drop the record."""
        if (watcher := self._watchers.pop(record.id, None)) is not None:
            await stop_tasks(watcher)
        self._ended.pop(record.id, None)
        self._signalled.discard(record.id)
        await self._core.records.drop_container(record)

    async def _release(self, record: ContainerRecord) -> None:
        await in_thread(self._release_blocking, record)
        for number, mount in enumerate(record.config.mounts):
            if mount.image and mount.image.image:
                await self._core.images.remove_root(volume_key(record.id, number))
        await self._core.images.remove_root(record.id)

    def _release_blocking(self, record: ContainerRecord) -> None:
        remove_bundle(self._core.paths.bundle(record.id))
        remove_bundle(self._core.paths.volumes(record.id))
        path = cgroups.tree_path(record.cgroup)
        if record.id in path:  # the runtime removes it, unless it has lost its state
            cgroups.remove(self._core.host, path)

    async def update(self, container_id: str, resources: LinuxContainerResources | None) -> None:
        """Change a container's limits in place. Raises: NotFound, FailedPrecondition."""
        core = self._core
        if resources is None:
            return
        full_id = core.records.container(container_id).id
        async with core.locks.hold(full_id):
            record = core.records.container(full_id)
            require_alive(record, core.boot_id)
            limits = resources_spec(resources, core.host, tolerate=core.settings.tolerate_missing_hugetlb_controller)
            limits, resources = await core.nri.update_container(record, limits, resources)
            await self.change_limits(full_id, limits, resources)
            await core.nri.container_updated(core.records.container(full_id))

    async def change_limits(self, container_id: str, limits: Mapping[str, Any], resources: LinuxContainerResources) -> None:
        """See nri.service.Changes. Without the container's lock: what plugins ask for comes while other containers are locked, and those
        that wait for one another would wait for ever.
        """
        core = self._core
        record = core.records.container(container_id)
        require_alive(record, core.boot_id)
        if limits:
            await core.runtime_of(record).update(record.id, limits)
        current = core.records.container(record.id)
        await durable(core.records.put_container(replace(current, resources=merge_resources(current.resources, resources))))

    async def reopen_log(self, container_id: str) -> None:
        """After a rotation. Raises: NotFound, FailedPrecondition (not running: then no file is made)."""
        core = self._core
        record = core.records.container(container_id)
        require_running(record, core.boot_id)
        if record.log_path:
            sandbox = core.records.sandbox(record.sandbox_id)
            check_log_directory(sandbox.config.log_directory, record.config.log_path)
            await core.runtime_of(record).reopen_log(record.id, record.log_path)

    async def close(self) -> None:
        """Stop watching; containers keep running."""
        await stop_tasks(*self._watchers.values())


def merge_resources(old: LinuxContainerResources | None, new: LinuxContainerResources) -> LinuxContainerResources:
    """What is in force after an update: 0 and "" in `new` mean unchanged, and so do files that its `unified` does not name."""
    if old is None:
        return new
    values = {name: getattr(new, name) or getattr(old, name) for name in LinuxContainerResources.__dataclass_fields__}
    return LinuxContainerResources(**values | {"unified": {**old.unified, **new.unified}})
