"""The life of a pod sandbox.

Run: record, namespaces, files, network, what holds it (holder/), done. What each step needs
to be undone is owed from before it begins; a failure or a caller that leaves pays, backwards.
Stop and remove go on where an earlier, interrupted one ended; both may be repeated, and are, by recovery.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from imgsvc.base.concurrency import Undo, in_thread
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, NotFound
from imgsvc.base.failpoints import afailpoint
from imgsvc.runtime import podfiles
from imgsvc.runtime.containers import Containers
from imgsvc.runtime.core import Core, os_errors
from imgsvc.runtime.events import EventType
from imgsvc.runtime.holder.choice import suitable
from imgsvc.runtime.holder.holders import Holders
from imgsvc.runtime.holder.namespaces import NamespacePlan, pin, pinned, set_network_sysctls
from imgsvc.runtime.model import LinuxContainerResources, NamespaceMode, PodSandboxConfig
from imgsvc.runtime.numbers import cgroups, podlimits
from imgsvc.runtime.processes.exits import now_ns
from imgsvc.runtime.records import SandboxRecord, durable, sandbox_name
from imgsvc.runtime.rootfs import remove_bundle
from imgsvc.runtime.spec import selinux, sysctls, validate
from imgsvc.runtime.state import require_ready

log = logging.getLogger(__name__)


class Sandboxes:
    """RunPodSandbox, StopPodSandbox, RemovePodSandbox and what recovery needs of them."""

    def __init__(self, core: Core, containers: Containers) -> None:
        self._core = core
        self._containers = containers
        self._holders = Holders(core, self._lost)

    async def run(self, config: PodSandboxConfig, runtime_handler: str) -> SandboxRecord:
        """A new, ready sandbox. On failure nothing of it stays.

        Raises: InvalidArgument, AlreadyExists (name taken), FailedPrecondition (the node cannot), Unavailable (network).
        """
        core = self._core
        validate.pod(config)
        handler = core.resolve_handler(runtime_handler)
        if config.namespaces.user and not core.handler(handler).features.user_namespaces:
            raise FailedPrecondition(f'runtime handler "{handler}" has no user namespaces on this node')
        record = SandboxRecord(
            id=os.urandom(32).hex(),
            config=config,
            handler=handler,
            runtime_handler=runtime_handler,
            boot_id=core.boot_id,
            created_at=now_ns(),
            network=config.namespaces.network != NamespaceMode.NODE,
            selinux=self._label(config, handler),
            runtime=core.handler(handler).description,
        )
        record = replace(record, holder=suitable(core, record)[0].name)
        core.records.reserve(sandbox_name(config), record.id)
        try:
            with os_errors("making a pod sandbox"):
                async with core.locks.hold(record.id), Undo() as undo:
                    ready = await self._make(record, undo)
        finally:
            if record.id not in core.records.sandboxes:
                core.records.release(sandbox_name(config), record.id)
        core.events.emit(EventType.CREATED, ready.id, ready.id)
        core.events.emit(EventType.STARTED, ready.id, ready.id)
        return ready

    def _label(self, config: PodSandboxConfig, handler: str) -> str:
        """The pod's SELinux label, "" where that is off."""
        core, contexts = self._core, self._core.host.contexts
        if not (core.settings.enable_selinux and core.host.selinux):
            return ""
        level = selinux.new_level({s.selinux for s in core.records.sandboxes.values()}, core.settings.selinux_category_range)
        context = contexts.machine if "kata" in core.handler_settings(handler).type else contexts.process
        return selinux.process_label(context, config.linux.security_context.selinux_options, level)

    async def _make(self, record: SandboxRecord, undo: Undo) -> SandboxRecord:
        core, config = self._core, record.config
        parent = cgroups.pod_cgroup(config.linux.cgroup_parent, record.id)
        if not cgroups.exists(core.host, cgroups.tree_path(parent)):
            record = replace(record, owned_cgroup=parent)
        undo.push(f"forgetting pod sandbox {record.id}", self._give_up, record, undo)
        written = core.records.put_sandbox(record)
        await afailpoint("sandbox.recorded")
        undo.push(f"removing the files of pod sandbox {record.id}", self._release, record)
        await in_thread(self._prepare, record)
        await durable(written)  # before the network: a DEL is owed from here on
        await afailpoint("sandbox.namespaces")
        ips: tuple[str, ...] = ()
        if record.network:
            settings = core.handler_settings(record.handler)
            undo.push(f"detaching pod sandbox {record.id} from its network", self._detach, record)
            ips = await core.network.setup(
                record.id,
                str(core.paths.pins(record.id) / "net"),
                config,
                conf_dir=settings.cni_conf_dir,
                max_conf_num=settings.cni_max_conf_num if settings.cni_conf_dir else None,
                cgroup_path=parent,
            )
            if late := sysctls.of_interfaces(self._sysctls(config)):
                await in_thread(set_network_sysctls, core.paths.pins(record.id), late)
        await afailpoint("sandbox.network")
        undo.push(f"ending what holds pod sandbox {record.id}", self._holders.end, record)
        held = await self._holders.start(record)
        await afailpoint("sandbox.pause")
        ready = replace(held, ips=ips, started_at=now_ns())
        undo.push(f"telling NRI plugins that pod sandbox {record.id} will not be", core.nri.pod_undone, ready)
        await core.nri.run_pod(ready)
        core.records.advance_sandbox(ready, core.paths.sandbox(record.id))
        core.nri.pod_made(record.id)
        self._holders.watch(ready)
        return ready

    def _prepare(self, record: SandboxRecord) -> None:
        """Directory, namespaces, generated files, log directory. Blocking."""
        config = record.config
        directory = self._core.paths.sandbox(record.id)
        directory.mkdir(mode=0o711, parents=True)
        wanted = self._sysctls(config)
        late = sysctls.of_interfaces(wanted)
        early = {name: value for name, value in wanted.items() if name not in late}
        pin(self._core.paths.pins(record.id), namespace_plan(config, early))
        label = selinux.file_label(self._core.host.contexts.file, record.selinux)
        podfiles.write(directory, config, label)
        podfiles.mount_shm(directory, config, label)
        if config.log_directory:
            os.makedirs(config.log_directory, 0o755, exist_ok=True)

    def _sysctls(self, config: PodSandboxConfig) -> dict[str, str]:
        """The pod's, over what containerd sets, too: ports below 1024 and ping without privileges."""
        wanted = {sysctls.canonical(name): value for name, value in config.linux.sysctls.items()}
        if config.namespaces.network == NamespaceMode.NODE:
            return wanted
        defaults = {}
        if self._core.settings.enable_unprivileged_ports:
            defaults["net.ipv4.ip_unprivileged_port_start"] = "0"
        if self._core.settings.enable_unprivileged_icmp and config.namespaces.user is None:
            defaults["net.ipv4.ping_group_range"] = "0 2147483647"
        return defaults | wanted

    async def stop(self, sandbox_id: str) -> None:
        """End everything of a pod; its record stays, NOTREADY. Unknown and stopped already are successes.

        Raises: what the network said when it could not detach; then the rest is stopped and the call may be repeated.
        """
        core = self._core
        try:
            full_id = core.records.sandbox(sandbox_id).id
        except NotFound:
            return
        core.stopping.add(full_id)
        try:
            with os_errors("stopping a pod sandbox"):
                async with core.locks.hold(full_id):
                    await self._stop_locked(full_id)
        finally:
            core.stopping.discard(full_id)

    async def _stop_locked(self, sandbox_id: str) -> None:
        record = self._core.records.sandboxes.get(sandbox_id)
        if record is None or (record.stopped_at and not record.network and not self._core.paths.sandbox(sandbox_id).exists()):
            return
        await self._containers.end_all(sandbox_id)
        if not record.stopped_at:
            await self._core.nri.stop_pod(record)
        await self._holders.end(record)
        problem: ImgsvcError | None = None
        try:
            await self._detach(record)
            record = replace(record, network=False)
        except ImgsvcError as error:
            problem = error
        if problem is None:
            await self._release(record)
        await afailpoint("sandbox.stopped")
        if not record.stopped_at or problem is None:
            first = not record.stopped_at
            record = replace(record, stopped_at=record.stopped_at or now_ns(), holder_pid=0, holder_start=0)
            await durable(self._core.records.put_sandbox(record))
            if first:
                self._core.events.emit(EventType.STOPPED, sandbox_id, sandbox_id)
        if problem:
            raise problem

    async def remove(self, sandbox_id: str) -> None:
        """Stop, then remove its containers and every trace. Unknown is a success."""
        core = self._core
        try:
            full_id = core.records.sandbox(sandbox_id).id
        except NotFound:
            return
        core.stopping.add(full_id)
        try:
            with os_errors("removing a pod sandbox"):
                async with core.locks.hold(full_id):
                    await self._remove_locked(full_id)
        finally:
            core.stopping.discard(full_id)

    async def _remove_locked(self, sandbox_id: str) -> None:
        core = self._core
        await self._stop_locked(sandbox_id)
        for container in core.records.containers_of(sandbox_id):
            await self._containers.remove(container.id)
        record = core.records.sandboxes.get(sandbox_id)
        if record is None:
            return
        await self._release(record)
        await afailpoint("sandbox.released")
        await core.nri.remove_pod(record)
        await core.records.drop_sandbox(record)
        core.events.emit(EventType.DELETED, sandbox_id, sandbox_id)

    async def roll_back(self, record: SandboxRecord) -> None:
        """Undo a sandbox that never became ready (recovery)."""
        try:
            await self._holders.end(record)
            await self._detach(record)
            await self._release(record)
        except (ImgsvcError, OSError):
            await self._keep_for_removal(record)
            raise
        await self._core.records.drop_sandbox(record)

    async def _give_up(self, record: SandboxRecord, undo: Undo) -> None:
        if undo.failed:
            await self._keep_for_removal(record)
        else:
            await self._core.records.drop_sandbox(record)

    async def _keep_for_removal(self, record: SandboxRecord) -> None:
        """A pod of which something is left is listed, not ready: the kubelet removes it then, which tries again what failed."""
        await durable(self._core.records.put_sandbox(replace(record, started_at=record.created_at, stopped_at=now_ns())))

    async def _lost(self, sandbox_id: str) -> None:
        """What held the pod has ended by itself. Its network stays until the pod is stopped."""
        core = self._core
        async with core.locks.hold(sandbox_id):
            record = core.records.sandboxes.get(sandbox_id)
            if record is None or record.stopped_at:
                return
            log.warning("what held pod sandbox %s has ended; it is not ready any more", sandbox_id)
            written = core.records.put_sandbox(replace(record, stopped_at=now_ns(), holder_pid=0, holder_start=0))
            core.events.emit(EventType.STOPPED, sandbox_id, sandbox_id)
            await durable(written)
            await core.nri.stop_pod(record)

    def watch(self, record: SandboxRecord) -> None:
        """Watch over a ready pod of an earlier daemon."""
        self._holders.watch(record)

    async def close(self) -> None:
        """Stop watching; pods stay."""
        await self._holders.close()

    async def _detach(self, record: SandboxRecord) -> None:
        if record.network:
            pins = self._core.paths.pins(record.id)
            await self._core.network.teardown(record.id, str(pins / "net") if pinned(pins, "net") else "")

    async def _release(self, record: SandboxRecord) -> None:
        await in_thread(self._release_blocking, record)

    def _release_blocking(self, record: SandboxRecord) -> None:
        directory = self._core.paths.sandbox(record.id)
        remove_bundle(directory)
        if record.owned_cgroup:
            cgroups.remove(self._core.host, record.owned_cgroup)

    async def update_resources(
        self, sandbox_id: str, overhead: LinuxContainerResources | None, resources: LinuxContainerResources | None
    ) -> None:
        """Note new pod resources, and write them to the pod's cgroup when it is ours, as far as the kernel lets us.

        The kubelet has changed the cgroup already when it made it. None: as before. Raises: NotFound, FailedPrecondition.
        """
        core = self._core
        full_id = core.records.sandbox(sandbox_id).id
        async with core.locks.hold(full_id):
            record = core.records.sandbox(full_id)
            require_ready(record, core.boot_id)
            await core.nri.update_pod(record, overhead, resources)
            old = record.config.linux
            linux = replace(old, overhead=overhead or old.overhead, resources=resources or old.resources)
            if record.owned_cgroup and core.settings.cgroup_driver != "systemd":  # which would undo what others write
                limits = podlimits.total(linux.overhead, linux.resources)
                problems = await in_thread(podlimits.apply, core.host, cgroups.tree_path(record.owned_cgroup), limits)
                if problems:
                    log.warning("limits of pod sandbox %s are not all in force: %s", full_id, "; ".join(problems))
            changed = replace(record, config=replace(record.config, linux=linux))
            await durable(core.records.put_sandbox(changed))
            await core.nri.pod_updated(changed)


def namespace_plan(config: PodSandboxConfig, sysctls: dict[str, str]) -> NamespacePlan:
    """Which namespaces to pin. The UTS namespace goes with the network, as containerd and the kubelet see it."""
    kinds = []
    if config.namespaces.network != NamespaceMode.NODE:
        kinds += ["net", "uts"]
    if config.namespaces.ipc != NamespaceMode.NODE:
        kinds.append("ipc")
    return NamespacePlan(tuple(kinds), config.namespaces.user, config.hostname, sysctls)
