"""The CRI RuntimeService: protobuf <-> dataclasses, and nothing else.

Errors are raised as imgsvc.base.errors; the edge's interceptor turns them into gRPC status.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from imgsvc import __version__
from imgsvc.api import cri_pb2 as pb
from imgsvc.api.cri_pb2_grpc import RuntimeServiceServicer
from imgsvc.base.errors import InvalidArgument, Unimplemented
from imgsvc.runtime import convert
from imgsvc.runtime.checkpoint import checkpoint
from imgsvc.runtime.codec import from_proto
from imgsvc.runtime.model import ContainerConfig, LinuxContainerResources, PodSandboxConfig
from imgsvc.runtime.node import RuntimeNode
from imgsvc.runtime.numbers.metrics import descriptors
from imgsvc.runtime.records import ContainerRecord, SandboxRecord
from imgsvc.runtime.state import ContainerState, SandboxState, container_state, require_running, sandbox_state
from imgsvc.runtime.streaming.interfaces import StreamWants
from imgsvc.runtime.streaming.port_target import PodPorts
from imgsvc.runtime.streaming.server import StreamServer

RUNTIME_NAME: Final = "imgsvc"
API_VERSION: Final = "v1"
_STREAM_BATCH: Final = 64  # items per message of the streaming list calls


class RuntimeService(RuntimeServiceServicer):
    """Served by the edge. `streams` is None when the streaming server is off; `notes` tells what is not well with the configuration,
    `describe` what Status(verbose) says beside what the runtime knows.
    """

    def __init__(
        self,
        node: RuntimeNode,
        streams: StreamServer | None,
        notes: Callable[[], Sequence[str]] = tuple,
        describe: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._node = node
        self._streams = streams
        self._notes = notes
        self._describe = describe
        records = node.core.records
        self._pod_lines = convert.Lines(records.sandboxes, lambda record: convert.sandbox_item(record, self._boot))
        self._container_lines = convert.Lines(records.containers, lambda record: convert.container_item(record, self._boot))

    @property
    def _boot(self) -> str:
        return self._node.core.boot_id

    async def Version(self, request: pb.VersionRequest, context: Any) -> pb.VersionResponse:
        """Who we are."""
        return pb.VersionResponse(version="0.1.0", runtime_name=RUNTIME_NAME, runtime_version=__version__, runtime_api_version=API_VERSION)

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        """Conditions, handlers and their features."""
        node = self._node
        problem = await node.core.network.status()
        broken = node.core.broken_handlers.get(node.core.settings.default_runtime_name)
        conditions = [
            pb.RuntimeCondition(
                type="RuntimeReady", status=not broken, reason="" if not broken else "RuntimeNotReady", message=broken or ""
            ),
            pb.RuntimeCondition(
                type="NetworkReady",
                status=problem is None,
                reason="" if problem is None else "NetworkPluginNotReady",
                message="" if problem is None else str(problem),
            ),
            _configuration(self._notes()),
        ]
        handlers = []
        for name, handler in node.core.handlers.items():
            features = pb.RuntimeHandlerFeatures(
                recursive_read_only_mounts=handler.features.recursive_read_only_mounts, user_namespaces=handler.features.user_namespaces
            )
            handlers.append(pb.RuntimeHandler(name=name, features=features))
            if name == node.core.settings.default_runtime_name:
                handlers.append(pb.RuntimeHandler(name="", features=features))
        return pb.StatusResponse(
            status=pb.RuntimeStatus(conditions=conditions),
            runtime_handlers=handlers,
            features=pb.RuntimeFeatures(
                supplemental_groups_policy=True,
                user_namespaces_host_network=any(h.features.user_namespaces for h in node.core.handlers.values()),
                mount_options=True,
            ),
            info={k: json.dumps(v) for k, v in {**node.describe(), **self._describe()}.items()} if request.verbose else {},
        )

    async def RuntimeConfig(self, request: pb.RuntimeConfigRequest, context: Any) -> pb.RuntimeConfigResponse:
        """The cgroup driver."""
        driver = pb.CgroupDriver.SYSTEMD if self._node.core.settings.cgroup_driver == "systemd" else pb.CgroupDriver.CGROUPFS
        return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def UpdateRuntimeConfig(self, request: pb.UpdateRuntimeConfigRequest, context: Any) -> pb.UpdateRuntimeConfigResponse:
        """The node's pod address ranges."""
        await self._node.update_pod_cidr(request.runtime_config.network_config.pod_cidr)
        return pb.UpdateRuntimeConfigResponse()

    async def RunPodSandbox(self, request: pb.RunPodSandboxRequest, context: Any) -> pb.RunPodSandboxResponse:
        """A new pod."""
        config = _read(PodSandboxConfig, request.config)
        return pb.RunPodSandboxResponse(pod_sandbox_id=(await self._node.sandboxes.run(config, request.runtime_handler)).id)

    async def StopPodSandbox(self, request: pb.StopPodSandboxRequest, context: Any) -> pb.StopPodSandboxResponse:
        """End a pod."""
        await self._node.sandboxes.stop(request.pod_sandbox_id)
        return pb.StopPodSandboxResponse()

    async def RemovePodSandbox(self, request: pb.RemovePodSandboxRequest, context: Any) -> pb.RemovePodSandboxResponse:
        """Remove a pod."""
        await self._node.sandboxes.remove(request.pod_sandbox_id)
        return pb.RemovePodSandboxResponse()

    async def PodSandboxStatus(self, request: pb.PodSandboxStatusRequest, context: Any) -> pb.PodSandboxStatusResponse:
        """State of a pod and of its containers."""
        record = self._node.core.records.sandbox(request.pod_sandbox_id)
        return pb.PodSandboxStatusResponse(
            status=convert.sandbox_status(record, self._boot),
            containers_statuses=[
                convert.container_status(c, self._boot) for c in self._node.core.records.containers_of(record.id) if c.made_at
            ],
            timestamp=self._node.now(),
            info=await self._node.describe_sandbox(record) if request.verbose else {},
        )

    async def ListPodSandbox(self, request: pb.ListPodSandboxRequest, context: Any) -> pb.ListPodSandboxResponse:
        """Pods that pass a filter."""
        return pb.ListPodSandboxResponse(items=self._pod_lines.of(self._sandboxes(request.filter)))

    async def StreamPodSandboxes(self, request: pb.StreamPodSandboxesRequest, context: Any) -> AsyncIterator[pb.StreamPodSandboxesResponse]:
        """Pods that pass a filter, each once."""
        for batch in _batches(list(self._sandboxes(request.filter))):
            yield pb.StreamPodSandboxesResponse(pod_sandboxes=self._pod_lines.of(batch))

    def _sandboxes(self, wanted: pb.PodSandboxFilter) -> Iterable[SandboxRecord]:
        for record in self._node.core.records.sandboxes.values():
            if not record.started_at or not record.id.startswith(wanted.id):
                continue
            if wanted.HasField("state") and int(wanted.state.state) != int(sandbox_state(record, self._boot)):
                continue
            if convert.labels_match(record.config.labels, wanted.label_selector):
                yield record

    async def CreateContainer(self, request: pb.CreateContainerRequest, context: Any) -> pb.CreateContainerResponse:
        """A new container in a pod."""
        config = _read(ContainerConfig, request.config)
        return pb.CreateContainerResponse(container_id=(await self._node.containers.create(request.pod_sandbox_id, config)).id)

    async def StartContainer(self, request: pb.StartContainerRequest, context: Any) -> pb.StartContainerResponse:
        """Let a container run."""
        await self._node.containers.start(request.container_id)
        return pb.StartContainerResponse()

    async def StopContainer(self, request: pb.StopContainerRequest, context: Any) -> pb.StopContainerResponse:
        """End a container, gracefully first."""
        await self._node.containers.stop(request.container_id, max(0, request.timeout))
        return pb.StopContainerResponse()

    async def RemoveContainer(self, request: pb.RemoveContainerRequest, context: Any) -> pb.RemoveContainerResponse:
        """Remove a container, running or not."""
        await self._node.containers.remove(request.container_id)
        return pb.RemoveContainerResponse()

    async def ListContainers(self, request: pb.ListContainersRequest, context: Any) -> pb.ListContainersResponse:
        """Containers that pass a filter."""
        return pb.ListContainersResponse(containers=self._container_lines.of(self._containers(request.filter)))

    async def StreamContainers(self, request: pb.StreamContainersRequest, context: Any) -> AsyncIterator[pb.StreamContainersResponse]:
        """Containers that pass a filter, each once."""
        for batch in _batches(list(self._containers(request.filter))):
            yield pb.StreamContainersResponse(containers=self._container_lines.of(batch))

    def _containers(self, wanted: pb.ContainerFilter) -> Iterable[ContainerRecord]:
        for record in self._node.core.records.containers.values():
            if not record.made_at or not record.id.startswith(wanted.id) or not record.sandbox_id.startswith(wanted.pod_sandbox_id):
                continue
            if wanted.HasField("state") and int(wanted.state.state) != int(container_state(record, self._boot)):
                continue
            if convert.labels_match(record.config.labels, wanted.label_selector):
                yield record

    async def ContainerStatus(self, request: pb.ContainerStatusRequest, context: Any) -> pb.ContainerStatusResponse:
        """State of a container."""
        record = self._node.core.records.container(request.container_id)
        info = self._node.describe_container(record) if request.verbose else {}
        return pb.ContainerStatusResponse(status=convert.container_status(record, self._boot), info=info)

    async def UpdateContainerResources(
        self, request: pb.UpdateContainerResourcesRequest, context: Any
    ) -> pb.UpdateContainerResourcesResponse:
        """Change limits in place."""
        resources = from_proto(LinuxContainerResources, request.linux) if request.HasField("linux") else None
        await self._node.containers.update(request.container_id, resources)
        return pb.UpdateContainerResourcesResponse()

    async def UpdatePodSandboxResources(
        self, request: pb.UpdatePodSandboxResourcesRequest, context: Any
    ) -> pb.UpdatePodSandboxResourcesResponse:
        """New limits of a pod; see Sandboxes.update_resources."""
        overhead = from_proto(LinuxContainerResources, request.overhead) if request.HasField("overhead") else None
        resources = from_proto(LinuxContainerResources, request.resources) if request.HasField("resources") else None
        await self._node.sandboxes.update_resources(request.pod_sandbox_id, overhead, resources)
        return pb.UpdatePodSandboxResourcesResponse()

    async def ReopenContainerLog(self, request: pb.ReopenContainerLogRequest, context: Any) -> pb.ReopenContainerLogResponse:
        """After a rotation."""
        await self._node.containers.reopen_log(request.container_id)
        return pb.ReopenContainerLogResponse()

    async def ExecSync(self, request: pb.ExecSyncRequest, context: Any) -> pb.ExecSyncResponse:
        """Run a command and wait for it."""
        record = self._running(request.container_id)
        if not request.cmd:
            raise InvalidArgument("no command to execute")
        result = await self._node.core.runtime_of(record).exec_sync(record.id, tuple(request.cmd), max(0, request.timeout))
        return pb.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    async def Exec(self, request: pb.ExecRequest, context: Any) -> pb.ExecResponse:
        """A URL to run a command at."""
        record = self._running(request.container_id)
        if not request.cmd:
            raise InvalidArgument("no command to execute")
        target = self._node.core.runtime_of(record).exec_target(record.id, tuple(request.cmd), terminal=request.tty)
        wants = StreamWants(request.stdin, request.stdout, request.stderr, request.tty)
        return pb.ExecResponse(url=self._stream_server().exec_url(target, wants))

    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachResponse:
        """A URL to attach at."""
        record = self._running(request.container_id)
        wants = StreamWants(request.stdin, request.stdout, request.stderr, record.config.tty)
        target = self._node.core.runtime_of(record).attach_target(record.id)
        return pb.AttachResponse(url=self._stream_server().attach_url(target, wants))

    async def PortForward(self, request: pb.PortForwardRequest, context: Any) -> pb.PortForwardResponse:
        """A URL to forward ports at."""
        netns = self._node.pod_netns(request.pod_sandbox_id)
        return pb.PortForwardResponse(url=self._stream_server().port_forward_url(PodPorts(netns), list(request.port)))

    def _running(self, container_id: str) -> ContainerRecord:
        record = self._node.core.records.container(container_id)
        require_running(record, self._boot)
        return record

    def _stream_server(self) -> StreamServer:
        if self._streams is None:
            raise Unimplemented("the streaming server is off")
        return self._streams

    async def ContainerStats(self, request: pb.ContainerStatsRequest, context: Any) -> pb.ContainerStatsResponse:
        """Numbers of one container."""
        record = self._node.core.records.container(request.container_id)
        return pb.ContainerStatsResponse(stats=(await self._node.stats.containers([record]))[0])

    async def ListContainerStats(self, request: pb.ListContainerStatsRequest, context: Any) -> pb.ListContainerStatsResponse:
        """Numbers of all running containers that pass a filter."""
        return pb.ListContainerStatsResponse(stats=await self._node.stats.containers(self._measurable(request.filter)))

    async def StreamContainerStats(
        self, request: pb.StreamContainerStatsRequest, context: Any
    ) -> AsyncIterator[pb.StreamContainerStatsResponse]:
        """As ListContainerStats, each once."""
        for batch in _batches(self._measurable(request.filter)):
            yield pb.StreamContainerStatsResponse(container_stats=await self._node.stats.containers(batch))

    def _measurable(self, wanted: pb.ContainerStatsFilter) -> list[ContainerRecord]:
        return [
            record
            for record in self._node.core.records.containers.values()
            if container_state(record, self._boot) in (ContainerState.CREATED, ContainerState.RUNNING)
            and record.id.startswith(wanted.id)
            and record.sandbox_id.startswith(wanted.pod_sandbox_id)
            and convert.labels_match(record.config.labels, wanted.label_selector)
        ]

    async def PodSandboxStats(self, request: pb.PodSandboxStatsRequest, context: Any) -> pb.PodSandboxStatsResponse:
        """Numbers of one pod."""
        record = self._node.core.records.sandbox(request.pod_sandbox_id)
        return pb.PodSandboxStatsResponse(stats=(await self._node.stats.sandboxes([record]))[0])

    async def ListPodSandboxStats(self, request: pb.ListPodSandboxStatsRequest, context: Any) -> pb.ListPodSandboxStatsResponse:
        """Numbers of all ready pods that pass a filter."""
        return pb.ListPodSandboxStatsResponse(stats=await self._node.stats.sandboxes(self._measurable_pods(request.filter)))

    async def StreamPodSandboxStats(
        self, request: pb.StreamPodSandboxStatsRequest, context: Any
    ) -> AsyncIterator[pb.StreamPodSandboxStatsResponse]:
        """As ListPodSandboxStats, each once."""
        for batch in _batches(self._measurable_pods(request.filter)):
            yield pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=await self._node.stats.sandboxes(batch))

    def _measurable_pods(self, wanted: pb.PodSandboxStatsFilter | None = None) -> list[SandboxRecord]:
        return [
            record
            for record in self._node.core.records.sandboxes.values()
            if sandbox_state(record, self._boot) is SandboxState.READY
            and (wanted is None or (record.id.startswith(wanted.id) and convert.labels_match(record.config.labels, wanted.label_selector)))
        ]

    async def ListMetricDescriptors(self, request: pb.ListMetricDescriptorsRequest, context: Any) -> pb.ListMetricDescriptorsResponse:
        """Which metrics there are."""
        return pb.ListMetricDescriptorsResponse(descriptors=descriptors())

    async def ListPodSandboxMetrics(self, request: pb.ListPodSandboxMetricsRequest, context: Any) -> pb.ListPodSandboxMetricsResponse:
        """Metrics of all ready pods."""
        return pb.ListPodSandboxMetricsResponse(pod_metrics=await self._node.metrics.sandboxes(self._measurable_pods()))

    async def StreamPodSandboxMetrics(
        self, request: pb.StreamPodSandboxMetricsRequest, context: Any
    ) -> AsyncIterator[pb.StreamPodSandboxMetricsResponse]:
        """As ListPodSandboxMetrics, each once."""
        for batch in _batches(self._measurable_pods()):
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=await self._node.metrics.sandboxes(batch))

    async def CheckpointContainer(self, request: pb.CheckpointContainerRequest, context: Any) -> pb.CheckpointContainerResponse:
        """A running container's state in an archive."""
        await checkpoint(self._node.core, request.container_id, request.location, max(0, request.timeout))
        return pb.CheckpointContainerResponse()

    async def CheckpointPod(self, request: pb.CheckpointPodRequest, context: Any) -> pb.CheckpointPodResponse:
        """Not here."""
        raise Unimplemented("checkpoints of whole pods are not supported", hint="CheckpointContainer is")

    async def RestorePod(self, request: pb.RestorePodRequest, context: Any) -> pb.RestorePodResponse:
        """Not here."""
        raise Unimplemented("checkpoints of whole pods are not supported", hint="CheckpointContainer is")

    async def GetContainerEvents(self, request: pb.GetEventsRequest, context: Any) -> AsyncIterator[pb.ContainerEventResponse]:
        """Events from now on."""
        async for item in self._node.core.events.listen():
            yield convert.event(item, self._boot)


def _read(cls: type[Any], message: Any) -> Any:
    try:
        return from_proto(cls, message)
    except ValueError as error:
        raise InvalidArgument(f"the request has a value this imgsvc does not know: {error}") from error


def _batches(items: list[Any]) -> Iterable[list[Any]]:
    for start in range(0, len(items), _STREAM_BATCH):
        yield items[start : start + _STREAM_BATCH]


def _configuration(notes: Sequence[str]) -> pb.RuntimeCondition:
    """As containerd's condition on deprecations: the kubelet does not mind it, `crictl info` shows it."""
    return pb.RuntimeCondition(
        type="ConfigurationHasNoWarnings", status=not notes, reason="ConfigurationHasWarnings" if notes else "", message="\n".join(notes)
    )
