"""ListMetricDescriptors and ListPodSandboxMetrics: what cAdvisor calls these numbers, so that dashboards keep working.

The descriptors are static: the kubelet reads them once. Every metric carries BASE_LABELS; some have more of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from imgsvc.api import cri_pb2 as pb
from imgsvc.base.concurrency import in_thread
from imgsvc.runtime.core import Core
from imgsvc.runtime.numbers import cgroups, usage
from imgsvc.runtime.numbers.stats import Stats, network_counters, pod_cgroup_path, running_containers
from imgsvc.runtime.numbers.usage import Usage
from imgsvc.runtime.processes.exits import now_ns
from imgsvc.runtime.records import ContainerRecord, SandboxRecord

BASE_LABELS: Final = ("container", "id", "image", "name", "namespace", "pod")
_COUNTER: Final = 0
_GAUGE: Final = 1
_SECOND_NS: Final = 10**9
_SECOND_US: Final = 10**6


@dataclass(frozen=True, slots=True)
class Look:
    """Everything the metrics of one container or pod are computed from."""

    usage: Usage
    record: ContainerRecord | None
    layer: tuple[int, int]
    processes: Sequence[int]
    threads: int
    descriptors: int
    sockets: int
    soft_limit: int
    io: Sequence[tuple[str, str, int, int]]
    filesystem: tuple[int, int, int]
    interfaces: Mapping[str, Sequence[int]]


Value = tuple[Sequence[str], int]  # values of the metric's own labels, and the number


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. of_pod: it belongs to the pod, not to each container."""

    name: str
    help: str
    kind: int
    labels: tuple[str, ...]
    read: Callable[[Look], Iterator[Value]]
    of_pod: bool = False


def _one(name: str, text: str, kind: int, number: Callable[[Look], int]) -> Metric:
    return Metric(name, text, kind, (), lambda look: iter([((), number(look))]))


def _stall(name: str, text: str, resource: str, *, full: bool) -> Metric:
    def number(look: Look) -> int:
        stalls = look.usage.stalls.get(resource, usage.Stalls())
        return (stalls.full if full else stalls.some).total // _SECOND_US

    return _one(name, text, _COUNTER, number)


def _network(name: str, text: str, column: int) -> Metric:
    return Metric(
        name,
        text,
        _COUNTER,
        ("interface",),
        lambda look: (((interface,), counters[column]) for interface, counters in look.interfaces.items()),
        of_pod=True,
    )


def _io(name: str, text: str, way: str, column: int) -> Metric:
    return Metric(name, text, _COUNTER, ("device",), lambda look: (((row[0],), int(row[column])) for row in look.io if row[1] == way))


def _blkio(look: Look) -> Iterator[Value]:
    for device, way, size, _ in look.io:
        major, _, minor = device.partition(":")
        yield (device, major, minor, way), size


def _failures(look: Look) -> Iterator[Value]:
    for kind, name in (("pgfault", "pgfault"), ("pgmajfault", "pgmajfault")):
        number = look.usage.line(f"total_{name}", name)
        yield (kind, "container"), number
        yield (kind, "hierarchy"), number


def _hugetlb(look: Look) -> Iterator[Value]:
    return iter(())  # no container's huge pages are accounted unless the controller is there


def _resource(name: str) -> Callable[[Look], int]:
    def number(look: Look) -> int:
        resources = look.record.resources if look.record else None
        return max(0, int(getattr(resources, name))) if resources else 0

    return number


METRICS: Final[tuple[Metric, ...]] = (
    Metric(
        "container_blkio_device_usage_total",
        "Bytes moved to and from block devices",
        _COUNTER,
        ("device", "major", "minor", "operation"),
        _blkio,
    ),
    _one("container_cpu_cfs_periods_total", "Enforcement periods that have passed", _COUNTER, lambda k: k.usage.periods),
    _one(
        "container_cpu_cfs_throttled_periods_total", "Periods in which the quota was used up", _COUNTER, lambda k: k.usage.throttled_periods
    ),
    _one("container_cpu_cfs_throttled_seconds_total", "Time spent throttled", _COUNTER, lambda k: k.usage.throttled // _SECOND_NS),
    _one("container_cpu_system_seconds_total", "CPU time in the kernel", _COUNTER, lambda k: k.usage.cpu_system // _SECOND_NS),
    Metric("container_cpu_usage_seconds_total", "CPU time", _COUNTER, ("cpu",), lambda k: iter([(("total",), k.usage.cpu // _SECOND_NS)])),
    _one("container_cpu_user_seconds_total", "CPU time in user mode", _COUNTER, lambda k: k.usage.cpu_user // _SECOND_NS),
    _one("container_file_descriptors", "Open file descriptors", _GAUGE, lambda k: k.descriptors),
    Metric("container_fs_inodes_free", "Free inodes of the file system", _GAUGE, ("device",), lambda k: iter([(("",), k.filesystem[2])])),
    Metric("container_fs_inodes_total", "Inodes of the file system", _GAUGE, ("device",), lambda k: iter([(("",), k.filesystem[1])])),
    Metric("container_fs_limit_bytes", "Size of the file system", _GAUGE, ("device",), lambda k: iter([(("",), k.filesystem[0])])),
    _io("container_fs_reads_bytes_total", "Bytes read", "Read", 2),
    _io("container_fs_reads_total", "Reads", "Read", 3),
    Metric("container_fs_usage_bytes", "Size of the writable layer", _GAUGE, ("device",), lambda k: iter([(("",), k.layer[0])])),
    _io("container_fs_writes_bytes_total", "Bytes written", "Write", 2),
    _io("container_fs_writes_total", "Writes", "Write", 3),
    Metric("container_hugetlb_max_usage_bytes", "Highest use of huge pages", _GAUGE, ("pagesize",), _hugetlb),
    Metric("container_hugetlb_usage_bytes", "Use of huge pages", _GAUGE, ("pagesize",), _hugetlb),
    _one("container_last_seen", "When these numbers were read, seconds since the epoch", _GAUGE, lambda k: k.usage.at // _SECOND_NS),
    _one("container_memory_cache", "Page cache", _GAUGE, lambda k: k.usage.line("total_cache", "file")),
    _one("container_memory_failcnt", "How often the memory limit was hit", _COUNTER, lambda k: k.usage.failures),
    Metric("container_memory_failures_total", "Page faults", _COUNTER, ("failure_type", "scope"), _failures),
    _one("container_memory_kernel_usage", "Memory of the kernel", _GAUGE, lambda k: k.usage.kernel),
    _one("container_memory_mapped_file", "Mapped files", _GAUGE, lambda k: k.usage.line("total_mapped_file", "file_mapped")),
    _one("container_memory_max_usage_bytes", "Highest memory use", _GAUGE, lambda k: k.usage.max_usage),
    _one("container_memory_rss", "Anonymous memory", _GAUGE, lambda k: k.usage.rss),
    _one("container_memory_swap", "Swap", _GAUGE, lambda k: k.usage.swap),
    _one(
        "container_memory_total_active_file_bytes", "Page cache in use", _GAUGE, lambda k: k.usage.line("total_active_file", "active_file")
    ),
    _one(
        "container_memory_total_inactive_file_bytes",
        "Page cache that can be given up",
        _GAUGE,
        lambda k: k.usage.line("total_inactive_file", "inactive_file"),
    ),
    _one("container_memory_usage_bytes", "Memory", _GAUGE, lambda k: k.usage.usage),
    _one("container_memory_working_set_bytes", "Memory without inactive page cache", _GAUGE, lambda k: k.usage.working_set),
    _network("container_network_receive_bytes_total", "Bytes received", 0),
    _network("container_network_receive_errors_total", "Errors while receiving", 2),
    _network("container_network_receive_packets_dropped_total", "Packets dropped while receiving", 3),
    _network("container_network_receive_packets_total", "Packets received", 1),
    _network("container_network_transmit_bytes_total", "Bytes sent", 8),
    _network("container_network_transmit_errors_total", "Errors while sending", 10),
    _network("container_network_transmit_packets_dropped_total", "Packets dropped while sending", 11),
    _network("container_network_transmit_packets_total", "Packets sent", 9),
    _one("container_oom_events_total", "Processes killed for memory", _COUNTER, lambda k: k.usage.oom_kills),
    _stall("container_pressure_cpu_stalled_seconds_total", "Time all tasks waited for CPU", "cpu", full=True),
    _stall("container_pressure_cpu_waiting_seconds_total", "Time some task waited for CPU", "cpu", full=False),
    _stall("container_pressure_io_stalled_seconds_total", "Time all tasks waited for I/O", "io", full=True),
    _stall("container_pressure_io_waiting_seconds_total", "Time some task waited for I/O", "io", full=False),
    _stall("container_pressure_memory_stalled_seconds_total", "Time all tasks waited for memory", "memory", full=True),
    _stall("container_pressure_memory_waiting_seconds_total", "Time some task waited for memory", "memory", full=False),
    _one("container_processes", "Processes", _GAUGE, lambda k: len(k.processes)),
    _one("container_sockets", "Open sockets", _GAUGE, lambda k: k.sockets),
    _one("container_spec_cpu_period", "CPU period [µs]", _GAUGE, _resource("cpu_period")),
    _one("container_spec_cpu_quota", "CPU quota [µs]", _GAUGE, _resource("cpu_quota")),
    _one("container_spec_cpu_shares", "CPU shares", _GAUGE, _resource("cpu_shares")),
    _one("container_spec_memory_limit_bytes", "Memory limit", _GAUGE, _resource("memory_limit_in_bytes")),
    _one("container_spec_memory_reservation_limit_bytes", "Memory reservation", _GAUGE, lambda _: 0),
    _one("container_spec_memory_swap_limit_bytes", "Memory and swap limit", _GAUGE, _resource("memory_swap_limit_in_bytes")),
    _one(
        "container_start_time_seconds",
        "Start, seconds since the epoch",
        _GAUGE,
        lambda k: (k.record.started_at if k.record else 0) // _SECOND_NS,
    ),
    _one("container_threads", "Threads", _GAUGE, lambda k: k.threads),
    _one("container_threads_max", "Most threads allowed, 0 without a limit", _GAUGE, lambda k: k.usage.pids_limit),
    Metric(
        "container_ulimits_soft",
        "Soft limits of the first process",
        _GAUGE,
        ("ulimit",),
        lambda k: iter([(("max_open_files",), k.soft_limit)]),
    ),
)


def descriptors() -> list[pb.MetricDescriptor]:
    """What there is; the same for the daemon's whole life."""
    return [pb.MetricDescriptor(name=m.name, help=m.help, label_keys=[*BASE_LABELS, *m.labels]) for m in METRICS]


class Metrics:
    """Reads all metrics of all ready pods."""

    def __init__(self, core: Core, stats: Stats) -> None:
        self._core = core
        self._stats = stats

    async def sandboxes(self, records: Sequence[SandboxRecord]) -> list[pb.PodSandboxMetrics]:
        """Metrics of pods with all their running containers."""
        members = running_containers(self._core.records, records)
        layers = {c.id: self._stats.layer_size(c.id) for group in members.values() for c in group}
        return await in_thread(lambda: [self._sandbox(record, members[record.id], layers) for record in records])

    def _sandbox(
        self, record: SandboxRecord, containers: Sequence[ContainerRecord], layers: Mapping[str, tuple[int, int]]
    ) -> pb.PodSandboxMetrics:
        m = record.config.metadata
        labels = ["POD", pod_cgroup_path(record), "", record.id, m.namespace, m.name]
        message = pb.PodSandboxMetrics(pod_sandbox_id=record.id)
        interfaces = network_counters(record, containers, self._core.paths.pins(record.id))
        message.metrics.extend(_values(self._look(None, pod_cgroup_path(record), interfaces=interfaces), labels, of_pod=True))
        for container in containers:
            path = cgroups.tree_path(container.cgroup)
            own = [container.config.metadata.name, path, container.image_name, container.id, m.namespace, m.name]
            values = _values(self._look(container, path, layer=layers[container.id]), own, of_pod=False)
            message.container_metrics.add(container_id=container.id).metrics.extend(values)
        return message

    def _look(
        self,
        record: ContainerRecord | None,
        path: str,
        *,
        interfaces: Mapping[str, Sequence[int]] = MappingProxyType({}),
        layer: tuple[int, int] = (0, 0),
    ) -> Look:
        host = self._core.host
        pids = usage.processes(host, path) if record else []
        threads, descriptors_, sockets = _count(pids)
        return Look(
            usage=usage.read(host, path, details=True) or Usage(now_ns()),
            record=record,
            layer=layer,
            processes=pids,
            threads=threads,
            descriptors=descriptors_,
            sockets=sockets,
            soft_limit=_open_files_limit(record.pid) if record else 0,
            io=usage.block_io(host, path) if record else (),
            filesystem=_filesystem(self._core.paths.root),
            interfaces=interfaces,
        )


def _values(look: Look, labels: Sequence[str], *, of_pod: bool) -> Iterator[pb.Metric]:
    for metric in METRICS:
        if metric.of_pod == of_pod:
            for own, number in metric.read(look):
                yield pb.Metric(
                    name=metric.name,
                    timestamp=look.usage.at,
                    metric_type=metric.kind,  # type: ignore[arg-type]
                    label_values=[*labels, *own],
                    value=pb.UInt64Value(value=max(0, number)),
                )


def _count(pids: Sequence[int]) -> tuple[int, int, int]:
    """Threads, open descriptors and sockets of some processes; those that end meanwhile count as nothing."""
    threads = files = sockets = 0
    for pid in pids:
        try:
            threads += len(os.listdir(f"/proc/{pid}/task"))
            names = os.listdir(f"/proc/{pid}/fd")
            files += len(names)
            sockets += sum(os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:") for name in names)
        except OSError:
            continue
    return threads, files, sockets


def _open_files_limit(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/limits", "rb") as stream:
            soft = next(line for line in stream if line.startswith(b"Max open files")).split()[3]
    except (OSError, StopIteration):
        return 0
    return int(soft) if soft.isdigit() else 0


def _filesystem(path: Path) -> tuple[int, int, int]:
    """Size [bytes], inodes, free inodes."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize, status.f_files, status.f_ffree
