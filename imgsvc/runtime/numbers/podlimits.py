"""Limits of a whole pod, written to the pod's cgroup where it is ours. The kubelet looks after those it has made itself.

Source: CRI UpdatePodSandboxResources (overhead, and the sum of the containers' resources); kernel documentation of cgroup
versions 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imgsvc.runtime.host import Host
from imgsvc.runtime.model import LinuxContainerResources
from imgsvc.runtime.numbers import cgroups

_DEFAULT_PERIOD_US: Final = 100_000
_MAX_SHARES: Final = 262_144


def total(overhead: LinuxContainerResources | None, resources: LinuxContainerResources | None) -> LinuxContainerResources:
    """What the pod may use: its containers and what it costs itself. No limit for the containers is none for the pod."""
    if resources is None:
        return LinuxContainerResources()
    extra = overhead or LinuxContainerResources()
    period = resources.cpu_period or _DEFAULT_PERIOD_US
    quota = resources.cpu_quota
    if quota > 0 and extra.cpu_quota > 0:
        quota += extra.cpu_quota * period // (extra.cpu_period or _DEFAULT_PERIOD_US)
    memory = resources.memory_limit_in_bytes
    return LinuxContainerResources(
        cpu_period=period if quota else 0,
        cpu_quota=quota,
        cpu_shares=min(resources.cpu_shares + extra.cpu_shares, _MAX_SHARES) if resources.cpu_shares else 0,
        memory_limit_in_bytes=memory + extra.memory_limit_in_bytes if memory else 0,
        cpuset_cpus=resources.cpuset_cpus,
        cpuset_mems=resources.cpuset_mems,
    )


def apply(host: Host, path: str, limits: LinuxContainerResources) -> list[str]:
    """Write what is given into the pod's cgroup, made where it is missing; why parts of it could not be. Blocking."""
    problems = []
    places = dict(cgroups.directories(host, path))
    for controller, name, value in _unified(limits) if host.unified else _separate(limits):
        directory = places.get("" if host.unified else controller)
        if directory is None:
            problems.append(f"{name}: no {controller} controller")
            continue
        try:
            directory.mkdir(parents=True, exist_ok=True)
            Path(directory / name).write_text(value)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


def _separate(limits: LinuxContainerResources) -> Iterator[tuple[str, str, str]]:
    """(controller, file, value) for version 1."""
    if limits.cpu_shares:
        yield "cpu", "cpu.shares", str(limits.cpu_shares)
    if limits.cpu_quota:
        # Lifted first: the kernel refuses a period that would make the old quota more than the parent's.
        yield "cpu", "cpu.cfs_quota_us", "-1"
        yield "cpu", "cpu.cfs_period_us", str(limits.cpu_period)
        yield "cpu", "cpu.cfs_quota_us", str(limits.cpu_quota)
    if limits.memory_limit_in_bytes:
        yield "memory", "memory.limit_in_bytes", str(limits.memory_limit_in_bytes)
    for name, value in (("cpuset.cpus", limits.cpuset_cpus), ("cpuset.mems", limits.cpuset_mems)):
        if value:
            yield "cpuset", name, value


def _unified(limits: LinuxContainerResources) -> Iterator[tuple[str, str, str]]:
    """(controller, file, value) for version 2."""
    if limits.cpu_shares:
        # From 2..262144 to 1..10000, as OCI runtimes do it.
        yield "cpu", "cpu.weight", str(1 + (max(limits.cpu_shares, 2) - 2) * 9999 // 262142)
    if limits.cpu_quota:
        yield "cpu", "cpu.max", f"{limits.cpu_quota if limits.cpu_quota > 0 else 'max'} {limits.cpu_period}"
    if limits.memory_limit_in_bytes:
        yield "memory", "memory.max", str(limits.memory_limit_in_bytes if limits.memory_limit_in_bytes > 0 else "max")
    for name, value in (("cpuset.cpus", limits.cpuset_cpus), ("cpuset.mems", limits.cpuset_mems)):
        if value:
            yield "cpuset", name, value
