"""Records and OCI specifications as NRI's messages, and limits in their three forms. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from imgsvc.api import nri_pb2 as nri
from imgsvc.runtime.model import HugepageLimit, LinuxContainerResources, NamespaceMode
from imgsvc.runtime.nri.adjust import CPU, HOOKS, MEMORY
from imgsvc.runtime.numbers import cgroups
from imgsvc.runtime.records import ContainerRecord, SandboxRecord
from imgsvc.runtime.state import ContainerState, container_state

Spec = Mapping[str, Any]

_OVERHEAD: Final = 8  # [bytes] at most, of a message within another
_STATES: Final = {
    ContainerState.CREATED: nri.CONTAINER_CREATED,
    ContainerState.RUNNING: nri.CONTAINER_RUNNING,
    ContainerState.EXITED: nri.CONTAINER_STOPPED,
    ContainerState.UNKNOWN: nri.CONTAINER_UNKNOWN,
}


def pod(record: SandboxRecord, pins: Path) -> nri.PodSandbox:
    """A pod. pins: where its namespaces are bound."""
    metadata, linux = record.config.metadata, record.config.linux
    parent = cgroups.pod_cgroup(linux.cgroup_parent, record.id)
    message = nri.PodSandbox(
        id=record.id,
        name=metadata.name,
        uid=metadata.uid,
        namespace=metadata.namespace,
        labels=record.config.labels,
        annotations=record.config.annotations,
        runtime_handler=record.runtime_handler,
        linux=nri.LinuxPodSandbox(cgroup_parent=linux.cgroup_parent, cgroups_path=parent, namespaces=_pod_namespaces(record, pins)),
        pid=record.holder_pid,
        ips=record.ips,
    )
    if linux.overhead:
        message.linux.pod_overhead.CopyFrom(of_cri(linux.overhead))
    if linux.resources:
        message.linux.pod_resources.CopyFrom(of_cri(linux.resources))
    return message


def _pod_namespaces(record: SandboxRecord, pins: Path) -> list[nri.LinuxNamespace]:
    options = record.config.namespaces
    found = {"user": pins / "user"} if options.user else {}
    if options.network != NamespaceMode.NODE:
        found |= {"network": pins / "net", "uts": pins / "uts"}
    if options.ipc != NamespaceMode.NODE:
        found["ipc"] = pins / "ipc"
    if options.pid == NamespaceMode.POD and record.holder_pid:
        found["pid"] = Path(f"/proc/{record.holder_pid}/ns/pid")
    return [nri.LinuxNamespace(type=kind, path=str(path)) for kind, path in found.items()]


def container(record: ContainerRecord, boot_id: str, spec: Spec) -> nri.Container:
    """A container. spec: its OCI specification, {} when that is gone."""
    process, linux = spec.get("process", {}), spec.get("linux", {})
    message = nri.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        name=record.config.metadata.name,
        state=_STATES[container_state(record, boot_id)],
        labels=record.config.labels,
        annotations={**record.config.annotations, **spec.get("annotations", {})},
        args=process.get("args", ()),
        env=process.get("env", ()),
        mounts=[_mount(mount) for mount in spec.get("mounts", ())],
        hooks=_hooks(spec.get("hooks", {})),
        linux=_linux(process, linux),
        pid=record.pid,
        rlimits=[nri.POSIXRlimit(type=r["type"], hard=r["hard"], soft=r["soft"]) for r in process.get("rlimits", ())],
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        status_reason=record.reason,
        status_message=record.message,
        cdi_devices=[nri.CDIDevice(name=device.name) for device in record.config.CDI_devices],
    )
    if user := process.get("user"):
        message.user.CopyFrom(nri.User(uid=user["uid"], gid=user["gid"], additional_gids=user.get("additionalGids", ())))
    return message


def _mount(mount: Spec) -> nri.Mount:
    return nri.Mount(
        destination=mount["destination"], type=mount.get("type", ""), source=mount.get("source", ""), options=mount.get("options", ())
    )


def _hooks(hooks: Spec) -> nri.Hooks:
    message = nri.Hooks()
    for name, key in HOOKS.items():
        for hook in hooks.get(key, ()):
            made = getattr(message, name).add(path=hook["path"], args=hook.get("args", ()), env=hook.get("env", ()))
            if "timeout" in hook:
                made.timeout.value = hook["timeout"]
    return message


def _linux(process: Spec, linux: Spec) -> nri.LinuxContainer:
    message = nri.LinuxContainer(
        namespaces=[nri.LinuxNamespace(type=n["type"], path=n.get("path", "")) for n in linux.get("namespaces", ())],
        devices=[_device(device) for device in linux.get("devices", ())],
        resources=of_oci(linux.get("resources", {})),
        cgroups_path=linux.get("cgroupsPath", ""),
        sysctl=linux.get("sysctl", {}),
        net_devices={name: nri.LinuxNetDevice(name=device.get("name", "")) for name, device in linux.get("netDevices", {}).items()},
    )
    if "oomScoreAdj" in process:
        message.oom_score_adj.value = process["oomScoreAdj"]
    if priority := process.get("ioPriority"):
        kind = nri.IOPrioClass.Value(priority["class"])
        message.io_priority.CopyFrom(nri.LinuxIOPriority(**{"class": kind, "priority": priority.get("priority", 0)}))
    if scheduler := process.get("scheduler"):
        message.scheduler.CopyFrom(_scheduler(scheduler))
    if policy := linux.get("seccomp"):
        message.seccomp_policy.CopyFrom(_seccomp(policy))
    if rdt := linux.get("intelRdt"):
        message.rdt.CopyFrom(_rdt(rdt))
    return message


def _device(device: Spec) -> nri.LinuxDevice:
    message = nri.LinuxDevice(path=device["path"], type=device["type"], major=device.get("major", 0), minor=device.get("minor", 0))
    for name, key in (("file_mode", "fileMode"), ("uid", "uid"), ("gid", "gid")):
        if device.get(key) is not None:
            getattr(message, name).value = device[key]
    return message


def _scheduler(scheduler: Spec) -> nri.LinuxScheduler:
    values = {name: scheduler[name] for name in ("nice", "priority", "runtime", "deadline", "period") if name in scheduler}
    flags = [nri.LinuxSchedulerFlag.Value(flag) for flag in scheduler.get("flags", ())]
    return nri.LinuxScheduler(policy=nri.LinuxSchedulerPolicy.Value(scheduler["policy"]), flags=flags, **values)


def _seccomp(policy: Spec) -> nri.LinuxSeccomp:
    message = nri.LinuxSeccomp(
        default_action=policy.get("defaultAction", ""),
        architectures=policy.get("architectures", ()),
        flags=policy.get("flags", ()),
        listener_path=policy.get("listenerPath", ""),
        listener_metadata=policy.get("listenerMetadata", ""),
    )
    if "defaultErrnoRet" in policy:
        message.default_errno.value = policy["defaultErrnoRet"]
    for call in policy.get("syscalls", ()):
        made = message.syscalls.add(names=call["names"], action=call["action"])
        if "errnoRet" in call:
            made.errno_ret.value = call["errnoRet"]
        for arg in call.get("args", ()):
            made.args.add(index=arg["index"], value=arg["value"], value_two=arg.get("valueTwo", 0), op=arg["op"])
    return message


def _rdt(rdt: Spec) -> nri.LinuxRdt:
    message = nri.LinuxRdt()
    if "closID" in rdt:
        message.clos_id.value = rdt["closID"]
    if "schemata" in rdt:
        message.schemata.value.extend(rdt["schemata"])
    if "enableMonitoring" in rdt:
        message.enable_monitoring.value = rdt["enableMonitoring"]
    return message


def of_oci(resources: Spec) -> nri.LinuxResources:
    """A `linux.resources` object."""
    message = nri.LinuxResources(unified=resources.get("unified", {}))
    memory, cpu = resources.get("memory", {}), resources.get("cpu", {})
    for name, key in MEMORY.items():
        if memory.get(key) is not None:
            getattr(message.memory, name).value = memory[key]
    for name, key in CPU.items():
        if cpu.get(key) is not None:
            getattr(message.cpu, name).value = cpu[key]
    message.cpu.cpus, message.cpu.mems = cpu.get("cpus", ""), cpu.get("mems", "")
    for limit in resources.get("hugepageLimits", ()):
        message.hugepage_limits.add(page_size=limit["pageSize"], limit=limit["limit"])
    if "pids" in resources:
        message.pids.limit = resources["pids"]["limit"]
    for rule in resources.get("devices", ()):
        made = message.devices.add(allow=rule["allow"], type=rule.get("type", ""), access=rule.get("access", ""))
        for name in ("major", "minor"):
            if rule.get(name) is not None:
                getattr(made, name).value = rule[name]
    return message


def of_cri(resources: LinuxContainerResources) -> nri.LinuxResources:
    """What CRI asks for, 0 and "" left out."""
    message = nri.LinuxResources(unified=resources.unified)
    message.cpu.cpus, message.cpu.mems = resources.cpuset_cpus, resources.cpuset_mems
    for part, name, value in (
        (message.cpu, "shares", resources.cpu_shares),
        (message.cpu, "quota", resources.cpu_quota),
        (message.cpu, "period", resources.cpu_period),
        (message.memory, "limit", resources.memory_limit_in_bytes),
        (message.memory, "swap", resources.memory_swap_limit_in_bytes),
    ):
        if value:
            getattr(part, name).value = value
    for limit in resources.hugepage_limits:
        message.hugepage_limits.add(page_size=limit.page_size, limit=limit.limit)
    return message


def to_cri(resources: nri.LinuxResources) -> LinuxContainerResources:
    """What CRI can tell of limits; not given is 0 and ""."""
    memory, cpu = resources.memory, resources.cpu
    return LinuxContainerResources(
        cpu_period=cpu.period.value,
        cpu_quota=cpu.quota.value,
        cpu_shares=cpu.shares.value,
        memory_limit_in_bytes=memory.limit.value,
        memory_swap_limit_in_bytes=memory.swap.value,
        cpuset_cpus=cpu.cpus,
        cpuset_mems=cpu.mems,
        hugepage_limits=tuple(HugepageLimit(limit.page_size, limit.limit) for limit in resources.hugepage_limits),
        unified=dict(resources.unified),
    )


def adjusted_resources(asked: LinuxContainerResources | None, spec: Spec) -> LinuxContainerResources:
    """What ContainerStatus tells of a container whose specification plugins have changed."""
    found = to_cri(of_oci(spec.get("linux", {}).get("resources", {})))
    return replace(found, oom_score_adj=spec["process"].get("oomScoreAdj", asked.oom_score_adj if asked else 0))


def batches(
    pods: Sequence[nri.PodSandbox], containers: Sequence[nri.Container], limit: int
) -> list[tuple[list[nri.PodSandbox], list[nri.Container]]]:
    """Pods, then containers, in portions of at most `limit` [bytes], and at least one portion."""
    found: list[tuple[list[nri.PodSandbox], list[nri.Container]]] = [([], [])]
    size = 0

    def room(length: int) -> tuple[list[nri.PodSandbox], list[nri.Container]]:
        nonlocal size
        if size and size + length > limit:
            found.append(([], []))
            size = 0
        size += length
        return found[-1]

    for sandbox in pods:
        room(sandbox.ByteSize() + _OVERHEAD)[0].append(sandbox)
    for made in containers:
        room(made.ByteSize() + _OVERHEAD)[1].append(made)
    return found


def plugin_name(file_name: str) -> tuple[str, str] | None:
    """("10", "name") of a plugin's program "10-name"; None when it is not one."""
    index, separator, name = os.path.basename(file_name).partition("-")
    return (index, name) if separator and is_index(index) and name else None


def is_index(text: str) -> bool:
    """Two digits, which order the plugins."""
    return len(text) == 2 and text.isascii() and text.isdigit()
