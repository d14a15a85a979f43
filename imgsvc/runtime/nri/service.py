"""What the use cases of pods and containers call, and what plugins ask of them.

Without a connected plugin, each of these costs one check of a list.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from imgsvc.api import nri_pb2 as nri
from imgsvc.base.concurrency import in_thread, stop_tasks
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, printable
from imgsvc.runtime.host import Host
from imgsvc.runtime.model import LinuxContainerResources
from imgsvc.runtime.nri import messages
from imgsvc.runtime.nri.adjust import Node, apply, update_spec
from imgsvc.runtime.nri.merge import Merged, overlay
from imgsvc.runtime.nri.plugin import Plugin
from imgsvc.runtime.nri.plugins import Plugins
from imgsvc.runtime.paths import Paths
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord
from imgsvc.runtime.settings import RuntimeSettings
from imgsvc.runtime.spec import cdi
from imgsvc.runtime.spec.volumes import in_mount_order
from imgsvc.runtime.state import ContainerState, SandboxState, container_state, sandbox_state

log = logging.getLogger(__name__)

Spec = dict[str, Any]

_EVICTION_GRACE_S: Final = 30.0


class Changes(Protocol):
    """What plugins change of containers."""

    async def change_limits(self, container_id: str, limits: Mapping[str, Any], resources: LinuxContainerResources) -> None:
        """New limits for a container that is there: as the OCI runtime takes them, and for its record. Raises: ImgsvcError."""

    async def stop(self, container_id: str, timeout_s: float) -> None:
        """End a container. Raises: ImgsvcError."""


class Nri:
    """One per daemon. Belongs to the event loop."""

    def __init__(self, settings: RuntimeSettings, records: Records, paths: Paths, host: Host, boot_id: str) -> None:
        self._settings = settings
        self._records = records
        self._paths = paths
        self._node = Node(host, settings.restrict_oom_score_adj)
        self._boot_id = boot_id
        self._plugins: Plugins | None = None
        self._changes: Changes | None = None
        # Being made, and not asked about any more: a plugin that joins learns of them with the existing ones.
        self._new_pods: dict[str, SandboxRecord] = {}
        self._new_containers: dict[str, ContainerRecord] = {}
        self._evicting: set[asyncio.Task[None]] = set()

    async def start(self, changes: Changes) -> None:
        """Start plugins and let others connect."""
        settings = self._settings.nri
        if settings.disable:
            return
        self._changes = changes
        self._plugins = Plugins(settings, self._snapshot, self._carry_out_of, self._update_containers)
        await self._plugins.start()

    async def close(self) -> None:
        """Let go of all plugins."""
        await stop_tasks(*self._evicting)
        if self._plugins is not None:
            await self._plugins.close()

    @property
    def busy(self) -> bool:
        """Whether a plugin is to be asked."""
        return self._plugins is not None and self._plugins.busy

    def describe(self) -> dict[str, Any]:
        """For Status(verbose)."""
        return {"enabled": True, **self._plugins.describe()} if self._plugins is not None else {"enabled": False}

    # --- pods

    async def run_pod(self, record: SandboxRecord) -> None:
        """A pod is complete and not shown yet; pod_made() or pod_undone() follows. Raises: what a plugin refuses with."""
        if self._plugins is None or not self._plugins.busy:
            self._new_pods[record.id] = record
            return
        request = nri.RunPodSandboxRequest(pod=self._pod(record))
        await self._plugins.relay(nri.EVENT_RUN_POD_SANDBOX, lambda: request, first=lambda: self._new_pods.__setitem__(record.id, record))

    def pod_made(self, sandbox_id: str) -> None:
        """Its record shows it from now on."""
        self._new_pods.pop(sandbox_id, None)

    async def pod_undone(self, record: SandboxRecord) -> None:
        """A pod that run_pod() was called for will not be."""
        self.pod_made(record.id)
        await self.remove_pod(record)

    async def stop_pod(self, record: SandboxRecord) -> None:
        """Its containers have ended, its network is still there."""
        await self._tell_of_pod(nri.EVENT_STOP_POD_SANDBOX, nri.StopPodSandboxRequest, record)

    async def remove_pod(self, record: SandboxRecord) -> None:
        """Nothing is left of it but its record."""
        await self._tell_of_pod(nri.EVENT_REMOVE_POD_SANDBOX, nri.RemovePodSandboxRequest, record)

    async def update_pod(
        self, record: SandboxRecord, overhead: LinuxContainerResources | None, resources: LinuxContainerResources | None
    ) -> None:
        """Its limits are about to change. Raises: what a plugin refuses with."""
        if self._plugins is None or not self._plugins.busy:
            return
        request = nri.UpdatePodSandboxRequest(pod=self._pod(record))
        if overhead:
            request.overhead_linux_resources.CopyFrom(messages.of_cri(overhead))
        if resources:
            request.linux_resources.CopyFrom(messages.of_cri(resources))
        await self._plugins.relay(nri.EVENT_UPDATE_POD_SANDBOX, lambda: request)

    async def pod_updated(self, record: SandboxRecord) -> None:
        """Its limits have changed."""
        await self._tell_of_pod(nri.EVENT_POST_UPDATE_POD_SANDBOX, nri.PostUpdatePodSandboxRequest, record)

    async def _tell_of_pod(self, event: int, request: Any, record: SandboxRecord) -> None:
        if self._plugins is None or not self._plugins.busy:
            return
        message = request(pod=self._pod(record))
        try:
            await self._plugins.relay(event, lambda: message)
        except ImgsvcError as error:
            log.warning("pod sandbox %s: %s", record.id, error)

    def _pod(self, record: SandboxRecord) -> nri.PodSandbox:
        return messages.pod(record, self._paths.pins(record.id))

    # --- containers

    async def create_container(self, record: ContainerRecord, sandbox: SandboxRecord, spec: Spec) -> Spec | None:
        """A container's specification is complete; what it becomes, None when it stays. made() or container_undone() follows.

        Raises: what a plugin refuses with; FailedPrecondition, InvalidArgument, NotFound (what they want cannot be).
        """
        if self._plugins is None or not self._plugins.busy:
            self._new_containers[record.id] = record
            return None
        merged, current, pod = Merged(record.id), spec, self._pod(sandbox)

        def request() -> nri.CreateContainerRequest:
            return nri.CreateContainerRequest(pod=pod, container=messages.container(record, self._boot_id, current))

        def take(answer: nri.CreateContainerResponse, plugin: str) -> None:
            nonlocal current
            merged.evictions += answer.evict
            merged.update(answer.update, plugin, made=False)
            if answer.HasField("adjust"):
                merged.adjust(answer.adjust, plugin)
                current = self._adjusted(spec, merged.adjustment)

        async def validate(plugins: Sequence[Plugin]) -> None:
            if any(plugin.wants(nri.EVENT_VALIDATE_CONTAINER_ADJUSTMENT) for plugin in plugins):
                await _validate(plugins, self._verdict_on(pod, messages.container(record, self._boot_id, spec), merged, plugins))

        await self._plugins.relay(
            nri.EVENT_CREATE_CONTAINER,
            request,
            take,
            first=lambda: self._new_containers.__setitem__(record.id, record),
            last=validate,
        )
        await self._carry_out(merged.updates.values(), merged.evictions)
        names = [device.name for device in merged.adjustment.cdi_devices]
        if names:
            current = await in_thread(self._with_cdi_devices, current, names)
        return None if current is spec else current

    def _adjusted(self, spec: Spec, adjustment: nri.ContainerAdjustment) -> Spec:
        changed = copy.deepcopy(spec)
        apply(changed, adjustment, self._node)
        return changed

    def _with_cdi_devices(self, spec: Spec, names: Sequence[str]) -> Spec:
        if not self._settings.enable_cdi:
            raise FailedPrecondition("an NRI plugin asks for CDI devices, but enable_cdi is false")
        changed = copy.deepcopy(spec)
        cdi.apply(changed, cdi.edits_for(names, self._settings.cdi_spec_dirs))
        changed["mounts"] = in_mount_order(changed["mounts"])
        return changed

    def _verdict_on(
        self, pod: nri.PodSandbox, container: nri.Container, merged: Merged, plugins: Sequence[Plugin]
    ) -> nri.ValidateContainerAdjustmentRequest:
        return nri.ValidateContainerAdjustmentRequest(
            pod=pod,
            container=container,
            adjust=merged.adjustment,
            update=merged.updates.values(),
            owners=merged.owners,
            plugins=[nri.PluginInstance(name=plugin.base, index=plugin.index) for plugin in plugins],
        )

    def made(self, container_id: str) -> None:
        """Its record shows it from now on."""
        self._new_containers.pop(container_id, None)

    async def container_undone(self, record: ContainerRecord) -> None:
        """A container that create_container() was called for will not be."""
        self.made(record.id)
        await self._tell(nri.EVENT_REMOVE_CONTAINER, nri.RemoveContainerRequest, record)

    async def container_created(self, record: ContainerRecord) -> None:
        """It is there."""
        await self._tell(nri.EVENT_POST_CREATE_CONTAINER, nri.PostCreateContainerRequest, record)

    async def start_container(self, record: ContainerRecord) -> None:
        """It is about to start. Raises: what a plugin refuses with."""
        if self._plugins is not None and self._plugins.busy and (sandbox := self._records.sandboxes.get(record.sandbox_id)):
            request = nri.StartContainerRequest(pod=self._pod(sandbox), container=await self._container(record))
            await self._plugins.relay(nri.EVENT_START_CONTAINER, lambda: request)

    async def container_started(self, record: ContainerRecord) -> None:
        """It runs."""
        await self._tell(nri.EVENT_POST_START_CONTAINER, nri.PostStartContainerRequest, record)

    async def update_container(
        self, record: ContainerRecord, limits: Spec, resources: LinuxContainerResources
    ) -> tuple[Spec, LinuxContainerResources]:
        """Its limits are about to change; to what. limits: as the OCI runtime takes them.

        Raises: what a plugin refuses with; FailedPrecondition, InvalidArgument (what they want cannot be).
        """
        sandbox = self._records.sandboxes.get(record.sandbox_id)
        if self._plugins is None or not self._plugins.busy or sandbox is None:
            return limits, resources
        merged, base = Merged(record.id), messages.of_oci(limits)
        pod, container = self._pod(sandbox), await self._container(record)

        def wanted() -> nri.LinuxResources:
            own = merged.updates.get(record.id)
            return overlay(base, own.linux.resources) if own else base

        def take(answer: nri.UpdateContainerResponse, plugin: str) -> None:
            merged.update(answer.update, plugin)
            merged.evictions += answer.evict

        await self._plugins.relay(
            nri.EVENT_UPDATE_CONTAINER,
            lambda: nri.UpdateContainerRequest(pod=pod, container=container, linux_resources=wanted()),
            take,
        )
        own = merged.updates.pop(record.id, None)
        await self._carry_out(merged.updates.values(), merged.evictions)
        if own is None:
            return limits, resources
        final = overlay(base, own.linux.resources)
        return update_spec(final, self._node.host), replace(messages.to_cri(final), oom_score_adj=resources.oom_score_adj)

    async def container_updated(self, record: ContainerRecord) -> None:
        """Its limits have changed."""
        await self._tell(nri.EVENT_POST_UPDATE_CONTAINER, nri.PostUpdateContainerRequest, record)

    async def stop_container(self, record: ContainerRecord) -> None:
        """It has ended."""
        merged = Merged(record.id)
        await self._tell(
            nri.EVENT_STOP_CONTAINER, nri.StopContainerRequest, record, lambda answer, plugin: merged.update(answer.update, plugin)
        )
        await self._carry_out_of(merged.updates.values(), "a plugin")

    async def remove_container(self, record: ContainerRecord) -> None:
        """It is about to be taken away."""
        await self._tell(nri.EVENT_REMOVE_CONTAINER, nri.RemoveContainerRequest, record)

    async def _tell(self, event: int, request: Any, record: ContainerRecord, take: Any = lambda answer, plugin: None) -> None:
        """What no plugin can refuse any more."""
        sandbox = self._records.sandboxes.get(record.sandbox_id)
        if self._plugins is None or not self._plugins.busy or sandbox is None:
            return
        message = request(pod=self._pod(sandbox), container=await self._container(record))
        try:
            await self._plugins.relay(event, lambda: message, take)
        except ImgsvcError as error:
            log.warning("container %s: %s", record.id, error)

    async def _container(self, record: ContainerRecord) -> nri.Container:
        return (await in_thread(self._read, [record]))[0]

    def _read(self, records: Iterable[ContainerRecord]) -> list[nri.Container]:
        """Containers with what their bundles say. Blocking."""
        found = []
        for record in records:
            try:
                spec = json.loads((self._paths.bundle(record.id) / "config.json").read_bytes())
            except (OSError, ValueError):  # gone, or not written yet
                spec = {}
            found.append(messages.container(record, self._boot_id, spec))
        return found

    # --- what plugins ask

    async def _snapshot(self) -> tuple[list[nri.PodSandbox], list[nri.Container]]:
        pods = {r.id: r for r in self._records.sandboxes.values() if sandbox_state(r, self._boot_id) is SandboxState.READY}
        alive = (ContainerState.CREATED, ContainerState.RUNNING)
        containers = {r.id: r for r in self._records.containers.values() if container_state(r, self._boot_id) in alive}
        found = await in_thread(self._read, [*(self._new_containers | containers).values()])
        return [self._pod(record) for record in (self._new_pods | pods).values()], found

    async def _carry_out_of(self, updates: Iterable[nri.ContainerUpdate], plugin: str) -> None:
        """What is asked for where nothing can fail any more."""
        for update in updates:
            try:
                await self._carry_out([update], [])
            except ImgsvcError as error:
                log.warning("what %s changes of container %s cannot be done: %s", plugin, printable(update.container_id, 80), error)

    async def _carry_out(self, updates: Iterable[nri.ContainerUpdate], evictions: Iterable[nri.ContainerEviction]) -> None:
        assert self._changes is not None
        for update in updates:
            try:
                wanted = update.linux.resources
                limits = update_spec(wanted, self._node.host)
                await self._changes.change_limits(update.container_id, limits, messages.to_cri(wanted))
            except ImgsvcError as error:
                if not update.ignore_failure:
                    raise
                log.info("container %s is not changed: %s", printable(update.container_id, 80), error)
        for eviction in evictions:
            self._evict(eviction)

    def _evict(self, eviction: nri.ContainerEviction) -> None:
        log.warning(
            "an NRI plugin evicts container %s: %s",
            printable(eviction.container_id, 80),
            printable(eviction.reason) or "it gives no reason",
        )
        task = asyncio.ensure_future(self._end(eviction.container_id))
        self._evicting.add(task)
        task.add_done_callback(self._evicting.discard)

    async def _end(self, container_id: str) -> None:
        assert self._changes is not None
        try:
            await self._changes.stop(container_id, _EVICTION_GRACE_S)
        except ImgsvcError as error:
            log.error("container %s is not evicted: %s", printable(container_id, 80), error)

    async def _update_containers(self, request: nri.UpdateContainersRequest, plugin: str) -> nri.UpdateContainersResponse:
        failed = []
        for update in request.update:
            try:
                await self._carry_out([update], [])
            except ImgsvcError as error:
                log.warning(
                    "what NRI plugin %s changes of container %s cannot be done: %s", plugin, printable(update.container_id, 80), error
                )
                failed.append(update)
        await self._carry_out([], request.evict)
        return nri.UpdateContainersResponse(failed=failed)


async def _validate(plugins: Sequence[Plugin], request: nri.ValidateContainerAdjustmentRequest) -> None:
    """Raises: FailedPrecondition when a plugin rejects what is to be, or cannot say whether it does."""
    event = nri.EVENT_VALIDATE_CONTAINER_ADJUSTMENT
    for plugin in plugins:
        if not plugin.wants(event):
            continue
        answer = await plugin.ask(event, request)
        if answer is None:
            raise FailedPrecondition(f"NRI plugin {plugin.name}, which validates what others change, did not answer")
        if answer.reject:
            raise FailedPrecondition(
                f"NRI plugin {plugin.name} rejects what others change: {printable(answer.reason) or 'no reason given'}"
            )
