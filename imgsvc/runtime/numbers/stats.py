"""Statistics of containers and pods: cgroup numbers, writable layers, network counters, as CRI messages.

A listing reads all cgroups in one go on a worker thread, which is handed the records it needs: they belong to the event loop. Sizes of writable layers come from the image side, may mean a
walk over many files, and are therefore remembered and renewed in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.api import cri_pb2 as pb
from imgsvc.base import kernel, procfs
from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import ImgsvcError
from imgsvc.runtime.codec import fill_proto
from imgsvc.runtime.core import Core
from imgsvc.runtime.holder.choice import holder_of
from imgsvc.runtime.model import NamespaceMode
from imgsvc.runtime.numbers import cgroups, usage
from imgsvc.runtime.numbers.usage import Stalls, Usage
from imgsvc.runtime.processes.exits import now_ns
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord

_LAYER_TTL_NS: Final = 60 * 10**9  # as old as the size of a writable layer may be
_RATE_WINDOW_NS: Final = 10**9  # a CPU rate over less than this is noise

Members = Mapping[str, Sequence[ContainerRecord]]  # by the pod's ID


@dataclass(frozen=True, slots=True)
class _Layer:
    at: int
    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class _CpuMark:
    at: int
    used: int
    rate: int


class Stats:
    """One per daemon. Remembers the last sample of each container, for rates."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._layers: dict[str, _Layer] = {}
        self._marks: dict[str, _CpuMark] = {}
        self._renewal: asyncio.Task[None] | None = None

    async def containers(self, records: Sequence[ContainerRecord]) -> list[pb.ContainerStats]:
        """Statistics of containers, in their order."""
        await self._layer_sizes(records)
        looks = await in_thread(self._look, [(r.id, r.cgroup) for r in records])
        for record in records:
            runtime = self._core.find_runtime(record)
            if runtime and (looks[record.id] is None or runtime.features.own_figures):  # in a virtual machine, say
                looks[record.id] = await runtime.usage(record.id) or looks[record.id]
        self._forget()
        return [self._container(record, looks[record.id]) for record in records]

    def _look(self, wanted: Iterable[tuple[str, str]]) -> dict[str, Usage | None]:
        host = self._core.host
        return {key: usage.read(host, cgroups.tree_path(path)) if path else None for key, path in wanted}

    async def _layer_sizes(self, records: Sequence[ContainerRecord]) -> None:
        """Measure what was never measured now, and renew what is old later."""
        for record in records:
            if record.id not in self._layers:
                await self._measure(record.id)
        stale = [r.id for r in records if r.id in self._layers and now_ns() - self._layers[r.id].at > _LAYER_TTL_NS]
        if stale and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.create_task(self._renew(stale), name="layer-sizes")

    async def _renew(self, ids: Sequence[str]) -> None:
        for container_id in ids:
            await self._measure(container_id)

    async def _measure(self, container_id: str) -> None:
        with contextlib.suppress(ImgsvcError):  # it may be removed meanwhile
            size, inodes = await self._core.images.root_usage(container_id)
            self._layers[container_id] = _Layer(now_ns(), size, inodes)

    def layer_size(self, container_id: str) -> tuple[int, int]:
        """Bytes and inodes of a writable layer as measured last."""
        layer = self._layers.get(container_id)
        return (layer.size, layer.inodes) if layer else (0, 0)

    def _forget(self) -> None:
        known = self._core.records
        for gone in self._layers.keys() - known.containers.keys():
            del self._layers[gone]
        for gone in self._marks.keys() - known.containers.keys() - known.sandboxes.keys():
            del self._marks[gone]

    def _rate(self, key: str, look: Usage) -> int | None:
        """CPU use in billionths of a core since the last look that is long enough ago."""
        mark = self._marks.get(key)
        if mark is None or look.cpu < mark.used:
            self._marks[key] = _CpuMark(look.at, look.cpu, -1)
            return None
        elapsed = look.at - mark.at
        if elapsed < _RATE_WINDOW_NS:
            return mark.rate if mark.rate >= 0 else None
        rate = (look.cpu - mark.used) * 10**9 // elapsed
        self._marks[key] = _CpuMark(look.at, look.cpu, rate)
        return rate

    def _container(self, record: ContainerRecord, look: Usage | None) -> pb.ContainerStats:
        stats = pb.ContainerStats(
            attributes=pb.ContainerAttributes(id=record.id, labels=record.config.labels, annotations=record.config.annotations)
        )
        fill_proto(stats.attributes.metadata, record.config.metadata)
        layer = self._layers.get(record.id)
        if layer:
            stats.writable_layer.CopyFrom(
                pb.FilesystemUsage(
                    timestamp=layer.at,
                    fs_id=pb.FilesystemIdentifier(mountpoint=self._core.settings.image_filesystem),
                    used_bytes=_value(layer.size),
                    inodes_used=_value(layer.inodes),
                )
            )
        if look:
            stats.cpu.CopyFrom(cpu_usage(look, self._rate(record.id, look)))
            stats.memory.CopyFrom(memory_usage(look))
            stats.swap.CopyFrom(swap_usage(look))
            if "io" in look.stalls:
                stats.io.CopyFrom(pb.IoUsage(timestamp=look.at, psi=psi(look.stalls["io"])))
        return stats

    async def sandboxes(self, records: Sequence[SandboxRecord]) -> list[pb.PodSandboxStats]:
        """Statistics of pods with all their containers, in their order."""
        core = self._core
        members = running_containers(core.records, records)
        containers = await self.containers([c for group in members.values() for c in group])
        by_id = {c.attributes.id: c for c in containers}
        looks, networks = await in_thread(self._look_at_pods, records, members)
        for record in records:
            if used := await holder_of(core, record).usage(record):
                looks[record.id] = used
        return [self._sandbox(r, looks[r.id], networks[r.id], [by_id[c.id] for c in members[r.id]]) for r in records]

    def _look_at_pods(
        self, records: Sequence[SandboxRecord], members: Members
    ) -> tuple[dict[str, Usage | None], dict[str, list[pb.NetworkInterfaceUsage]]]:
        looks = self._look((r.id, pod_cgroup_path(r)) for r in records)
        return looks, {r.id: self._network(r, members[r.id]) for r in records}

    def _network(self, record: SandboxRecord, containers: Sequence[ContainerRecord]) -> list[pb.NetworkInterfaceUsage]:
        return [
            pb.NetworkInterfaceUsage(
                name=name, rx_bytes=_value(c[0]), rx_errors=_value(c[2]), tx_bytes=_value(c[8]), tx_errors=_value(c[10])
            )
            for name, c in network_counters(record, containers, self._core.paths.pins(record.id)).items()
        ]

    def _sandbox(
        self,
        record: SandboxRecord,
        look: Usage | None,
        interfaces: Sequence[pb.NetworkInterfaceUsage],
        containers: Sequence[pb.ContainerStats],
    ) -> pb.PodSandboxStats:
        stats = pb.PodSandboxStats(
            attributes=pb.PodSandboxAttributes(id=record.id, labels=record.config.labels, annotations=record.config.annotations)
        )
        fill_proto(stats.attributes.metadata, record.config.metadata)
        linux = stats.linux
        linux.containers.extend(containers)
        if look:
            linux.cpu.CopyFrom(cpu_usage(look, self._rate(record.id, look)))
            linux.memory.CopyFrom(memory_usage(look))
            linux.process.CopyFrom(pb.ProcessUsage(timestamp=look.at, process_count=_value(look.pids)))
            if "io" in look.stalls:
                linux.io.CopyFrom(pb.IoUsage(timestamp=look.at, psi=psi(look.stalls["io"])))
        if interfaces:
            default = next((i for i in interfaces if i.name == "eth0"), interfaces[0])
            rest = [i for i in interfaces if i is not default]
            linux.network.CopyFrom(pb.NetworkUsage(timestamp=now_ns(), default_interface=default, interfaces=rest))
        return stats


def running_containers(records: Records, pods: Iterable[SandboxRecord]) -> Members:
    """The running containers of pods by the pod's ID: what threads may look at, taken on the event loop, which records belong to."""
    return {pod.id: tuple(c for c in records.containers_of(pod.id) if c.started_at and not c.finished_at) for pod in pods}


def network_counters(record: SandboxRecord, containers: Iterable[ContainerRecord], pins: Path) -> Mapping[str, list[int]]:
    """The columns of /proc/net/dev by interface, without lo; {} for pods in the host's network. Blocking.

    Args: containers: the pod's, running; pins: where its namespaces are bound.
    """
    if record.stopped_at or record.config.namespaces.network == NamespaceMode.NODE:
        return {}
    for container in containers:
        if container.pid:
            with contextlib.suppress(OSError):
                return procfs.interfaces(container.pid)
    with contextlib.suppress(OSError):
        return kernel.in_fresh_thread(lambda: _net_dev_of(pins / "net"))
    return {}


def pod_cgroup_path(record: SandboxRecord) -> str:
    """The directory of a pod's cgroup below the cgroup root."""
    parent = cgroups.pod_cgroup(record.config.linux.cgroup_parent, record.id)
    name = os.path.basename(parent.rstrip("/"))
    return cgroups.expand_slice(name) if name.endswith(".slice") else parent


def cpu_usage(look: Usage, rate: int | None) -> pb.CpuUsage:
    """CPU as CRI wants it."""
    message = pb.CpuUsage(timestamp=look.at, usage_core_nano_seconds=_value(look.cpu))
    if rate is not None:
        message.usage_nano_cores.value = rate
    if "cpu" in look.stalls:
        message.psi.CopyFrom(psi(look.stalls["cpu"]))
    return message


def memory_usage(look: Usage) -> pb.MemoryUsage:
    """Memory as CRI wants it."""
    message = pb.MemoryUsage(
        timestamp=look.at,
        working_set_bytes=_value(look.working_set),
        usage_bytes=_value(look.usage),
        rss_bytes=_value(look.rss),
        page_faults=_value(look.line("total_pgfault", "pgfault")),
        major_page_faults=_value(look.line("total_pgmajfault", "pgmajfault")),
    )
    if look.available is not None:
        message.available_bytes.value = look.available
    if "memory" in look.stalls:
        message.psi.CopyFrom(psi(look.stalls["memory"]))
    return message


def swap_usage(look: Usage) -> pb.SwapUsage:
    """Swap as CRI wants it."""
    available = max(0, look.swap_limit - look.swap) if look.swap_limit else 0
    return pb.SwapUsage(timestamp=look.at, swap_available_bytes=_value(available), swap_usage_bytes=_value(look.swap))


def psi(stalls: Stalls) -> pb.PsiStats:
    """Pressure as CRI wants it."""
    message = pb.PsiStats()
    for target, line in ((message.Some, stalls.some), (message.Full, stalls.full)):
        target.Total, target.Avg10, target.Avg60, target.Avg300 = line.total, line.avg10, line.avg60, line.avg300
    return message


def _net_dev_of(netns: Path) -> dict[str, list[int]]:
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kernel.setns(fd, kernel.CLONE_NEWNET)
    finally:
        os.close(fd)
    return procfs.interfaces("thread-self")


def _value(number: int) -> pb.UInt64Value:
    return pb.UInt64Value(value=number)
