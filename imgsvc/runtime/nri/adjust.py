"""An adjustment applied to an OCI specification, and limits of NRI as an OCI `linux.resources` object. Pure.

Source: OCI runtime-spec config.md, config-linux.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from imgsvc.api import nri_pb2 as nri
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, printable
from imgsvc.runtime.host import Host
from imgsvc.runtime.nri.merge import REMOVAL
from imgsvc.runtime.spec.build import oom_score, unified_limits
from imgsvc.runtime.spec.cdi import rdt_class
from imgsvc.runtime.spec.volumes import clean, in_mount_order

Spec = dict[str, Any]

HOOKS: Final = {
    "prestart": "prestart",
    "create_runtime": "createRuntime",
    "create_container": "createContainer",
    "start_container": "startContainer",
    "poststart": "poststart",
    "poststop": "poststop",
}
MEMORY: Final = {
    "limit": "limit",
    "reservation": "reservation",
    "swap": "swap",
    "kernel": "kernel",
    "kernel_tcp": "kernelTCP",
    "swappiness": "swappiness",
    "disable_oom_killer": "disableOOMKiller",
    "use_hierarchy": "useHierarchy",
}
CPU: Final = {
    "shares": "shares",
    "quota": "quota",
    "period": "period",
    "realtime_runtime": "realtimeRuntime",
    "realtime_period": "realtimePeriod",
}
_NAMESPACES: Final = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")
_DEVICES: Final = ("b", "c", "u", "p")
_PROPAGATION: Final = ("private", "slave", "shared")  # of the root, from the tightest to the most open


@dataclass(frozen=True, slots=True)
class Node:
    """What an adjustment must agree with. restrict_oom_score_adj: never below the daemon's own."""

    host: Host
    restrict_oom_score_adj: bool = False


def apply(spec: Spec, wanted: nri.ContainerAdjustment, node: Node) -> None:
    """Change a specification in place; all but CDI devices, whose files must be read first.

    Raises: InvalidArgument (malformed), FailedPrecondition (the node cannot).
    """
    linux = wanted.linux
    _annotations(spec, wanted.annotations)
    _env(spec["process"], wanted.env)
    if wanted.args:
        spec["process"]["args"] = list(wanted.args)
    _hooks(spec, wanted.hooks)
    _rlimits(spec["process"], wanted.rlimits)
    _devices(spec["linux"], linux.devices)
    _namespaces(spec["linux"], linux.namespaces)
    _sysctls(spec["linux"], linux.sysctl)
    _net_devices(spec["linux"], linux.net_devices)
    _resources(spec["linux"], linux.resources, node.host)
    if linux.cgroups_path:
        spec["linux"]["cgroupsPath"] = linux.cgroups_path
    if linux.HasField("oom_score_adj"):
        spec["process"]["oomScoreAdj"] = oom_score(linux.oom_score_adj.value, node.host, restrict=node.restrict_oom_score_adj)
    if linux.HasField("seccomp_policy"):
        spec["linux"]["seccomp"] = _seccomp(linux.seccomp_policy)
    _priorities(spec["process"], linux)
    _rdt(spec["linux"], linux.rdt)
    if linux.HasField("memory_policy"):
        spec["linux"]["memoryPolicy"] = _memory_policy(linux.memory_policy)
    _mounts(spec, wanted.mounts)


def _split(values: Sequence[Any], key: str) -> tuple[set[str], list[Any]]:
    """Keys that are to go, and what is to come."""
    gone = {getattr(v, key)[1:] for v in values if getattr(v, key).startswith(REMOVAL)}
    return gone, [v for v in values if not getattr(v, key).startswith(REMOVAL)]


def _change(table: dict[str, Any], values: Mapping[str, Any], to_spec: Callable[[Any], Any]) -> None:
    for key in values:
        if key.startswith(REMOVAL):
            table.pop(key[1:], None)
    table.update({key: to_spec(value) for key, value in values.items() if not key.startswith(REMOVAL)})


def _annotations(spec: Spec, values: Mapping[str, str]) -> None:
    if values:
        _change(spec.setdefault("annotations", {}), values, str)


def _sysctls(linux: Spec, values: Mapping[str, str]) -> None:
    if values:
        _change(linux.setdefault("sysctl", {}), values, str)


def _net_devices(linux: Spec, values: Mapping[str, nri.LinuxNetDevice]) -> None:
    if values:
        _change(linux.setdefault("netDevices", {}), values, lambda device: {"name": device.name} if device.name else {})


def _env(process: Spec, values: Sequence[nri.KeyValue]) -> None:
    """A variable that changes keeps its place."""
    gone, new = _split(values, "key")
    for entry in new:
        if not entry.key or "=" in entry.key or "\0" in entry.key + entry.value:
            raise InvalidArgument(f'an NRI plugin sets "{printable(entry.key, 80)}", which is not a name of an environment variable')
    changed = {entry.key: entry.value for entry in new}
    merged = {}
    for text in process.get("env", ()):
        key, _, value = text.partition("=")
        if key in changed or key not in gone:
            merged[key] = changed.get(key, value)
    process["env"] = [f"{key}={value}" for key, value in {**merged, **changed}.items()]


def _hooks(spec: Spec, hooks: nri.Hooks) -> None:
    for name, key in HOOKS.items():
        for hook in getattr(hooks, name):
            _require_path(hook.path, "a hook")
            entry: Spec = {"path": hook.path}
            if hook.args:
                entry["args"] = list(hook.args)
            if hook.env:
                entry["env"] = list(hook.env)
            if hook.HasField("timeout"):
                entry["timeout"] = hook.timeout.value
            spec.setdefault("hooks", {}).setdefault(key, []).append(entry)


def _require_path(path: str, what: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f'an NRI plugin sets {what} at "{printable(path, 120)}", which is not an absolute path')


def _rlimits(process: Spec, values: Sequence[nri.POSIXRlimit]) -> None:
    if values:
        new = [{"type": limit.type, "hard": limit.hard, "soft": limit.soft} for limit in values]
        types = {limit["type"] for limit in new}
        process["rlimits"] = [limit for limit in process.get("rlimits", ()) if limit["type"] not in types] + new


def _devices(linux: Spec, values: Sequence[nri.LinuxDevice]) -> None:
    gone, new = _split(values, "path")
    gone |= {device.path for device in new}
    linux["devices"] = [device for device in linux.get("devices", ()) if device["path"] not in gone]
    for device in new:
        _require_path(device.path, "a device")
        if device.type not in _DEVICES:
            raise InvalidArgument(f'an NRI plugin sets a device of type "{printable(device.type, 20)}"', where=device.path)
        node = {"path": device.path, "type": device.type, "major": device.major, "minor": device.minor}
        for name, key in (("file_mode", "fileMode"), ("uid", "uid"), ("gid", "gid")):
            if device.HasField(name):
                node[key] = getattr(device, name).value
        linux["devices"].append(node)
        if device.type != "p":
            rule = {"allow": True, "type": device.type, "major": device.major, "minor": device.minor, "access": "rwm"}
            linux.setdefault("resources", {}).setdefault("devices", []).append(rule)


def _namespaces(linux: Spec, values: Sequence[nri.LinuxNamespace]) -> None:
    gone, new = _split(values, "type")
    for namespace in new:
        if namespace.type not in _NAMESPACES:
            raise InvalidArgument(f'an NRI plugin sets a namespace of type "{printable(namespace.type, 20)}"')
    gone |= {namespace.type for namespace in new}
    kept = [namespace for namespace in linux.get("namespaces", ()) if namespace["type"] not in gone]
    linux["namespaces"] = kept + [{"type": n.type, **({"path": n.path} if n.path else {})} for n in new]


def _resources(linux: Spec, wanted: nri.LinuxResources, host: Host) -> None:
    known = linux.setdefault("resources", {})
    new = resources_spec(wanted, host)
    memory = new.get("memory", {})
    if "limit" in memory and "swap" not in memory and known.get("memory", {}).get("swap"):
        memory["swap"] = memory["limit"]  # as without a plugin: no swap beyond the memory limit, unless asked for
    for part in ("cpu", "memory", "pids", "unified"):
        if part in new:
            known[part] = {**known.get(part, {}), **new[part]}
    if pages := new.get("hugepageLimits"):
        sizes = {limit["pageSize"] for limit in pages}
        known["hugepageLimits"] = [limit for limit in known.get("hugepageLimits", ()) if limit["pageSize"] not in sizes] + pages
    if devices := new.get("devices"):
        known["devices"] = [*known.get("devices", ()), *devices]
    if wanted.HasField("blockio_class"):
        known.pop("blockIO", None)
    if wanted.HasField("rdt_class"):
        linux.pop("intelRdt", None)
        if wanted.rdt_class.value:
            linux["intelRdt"] = {"closID": rdt_class(wanted.rdt_class.value)}


def resources_spec(wanted: nri.LinuxResources, host: Host) -> Spec:
    """A `linux.resources` object of what was set. Raises: FailedPrecondition (this node cannot), InvalidArgument."""
    if wanted.blockio_class.value:
        raise FailedPrecondition(
            f'an NRI plugin asks for block I/O class "{printable(wanted.blockio_class.value, 80)}", and this runtime has none'
        )
    out: Spec = {}
    memory, cpu = wanted.memory, wanted.cpu
    if found := {key: getattr(memory, name).value for name, key in MEMORY.items() if memory.HasField(name)}:  # type: ignore[arg-type]
        out["memory"] = found
    numbers = {key: getattr(cpu, name).value for name, key in CPU.items() if cpu.HasField(name)}  # type: ignore[arg-type]
    sets = {name: getattr(cpu, name) for name in ("cpus", "mems") if getattr(cpu, name)}
    if numbers or sets:
        out["cpu"] = numbers | sets
    if pages := [{"pageSize": limit.page_size, "limit": limit.limit} for limit in wanted.hugepage_limits]:
        if "hugetlb" not in host.controllers:
            raise FailedPrecondition("an NRI plugin limits huge pages, but this node has no hugetlb cgroup controller")
        out["hugepageLimits"] = pages
    if wanted.unified:
        if not host.unified:
            raise FailedPrecondition("an NRI plugin sets `unified` resources, which need cgroup version 2")
        out["unified"] = unified_limits(wanted.unified)
    if wanted.HasField("pids"):
        out["pids"] = {"limit": wanted.pids.limit}
    if rules := [_rule(device) for device in wanted.devices]:
        out["devices"] = rules
    return out


def update_spec(wanted: nri.LinuxResources, host: Host) -> Spec:
    """As resources_spec, for a container that is there. Raises: FailedPrecondition, InvalidArgument."""
    if wanted.HasField("rdt_class"):
        raise FailedPrecondition("an NRI plugin changes the RDT class of a container that is there, which cannot be done")
    out = resources_spec(wanted, host)
    memory = out.get("memory", {})
    if host.memory_swap and "limit" in memory:
        memory.setdefault("swap", memory["limit"])
    return out


def _rule(device: nri.LinuxDeviceCgroup) -> Spec:
    rule: Spec = {"allow": device.allow}
    if device.type:
        rule["type"] = device.type
    if device.HasField("major"):
        rule["major"] = device.major.value
    if device.HasField("minor"):
        rule["minor"] = device.minor.value
    if device.access:
        rule["access"] = device.access
    return rule


def _seccomp(policy: nri.LinuxSeccomp) -> Spec:
    out: Spec = {"defaultAction": policy.default_action}
    if policy.HasField("default_errno"):
        out["defaultErrnoRet"] = policy.default_errno.value
    for name, key in (("architectures", "architectures"), ("flags", "flags")):
        if values := list(getattr(policy, name)):
            out[key] = values
    for name, key in (("listener_path", "listenerPath"), ("listener_metadata", "listenerMetadata")):
        if value := getattr(policy, name):
            out[key] = value
    if policy.syscalls:
        out["syscalls"] = [_syscall(call) for call in policy.syscalls]
    return out


def _syscall(call: nri.LinuxSyscall) -> Spec:
    out: Spec = {"names": list(call.names), "action": call.action}
    if call.HasField("errno_ret"):
        out["errnoRet"] = call.errno_ret.value
    if call.args:
        out["args"] = [{"index": a.index, "value": a.value, "valueTwo": a.value_two, "op": a.op} for a in call.args]
    return out


def _priorities(process: Spec, linux: nri.LinuxContainerAdjustment) -> None:
    """I/O priority and scheduler; NONE takes away what was set."""
    if linux.HasField("io_priority"):
        process.pop("ioPriority", None)
        kind = getattr(linux.io_priority, "class")
        if kind != nri.IOPRIO_CLASS_NONE:
            process["ioPriority"] = {"class": nri.IOPrioClass.Name(kind), "priority": linux.io_priority.priority}
    if linux.HasField("scheduler"):
        process.pop("scheduler", None)
        if linux.scheduler.policy != nri.SCHED_NONE:
            process["scheduler"] = _scheduler(linux.scheduler)


def _scheduler(wanted: nri.LinuxScheduler) -> Spec:
    out: Spec = {"policy": nri.LinuxSchedulerPolicy.Name(wanted.policy)}
    for name in ("nice", "priority", "runtime", "deadline", "period"):
        if value := getattr(wanted, name):
            out[name] = value
    if wanted.flags:
        out["flags"] = [nri.LinuxSchedulerFlag.Name(flag) for flag in wanted.flags]
    return out


def _rdt(linux: Spec, wanted: nri.LinuxRdt) -> None:
    if wanted.remove:
        linux.pop("intelRdt", None)
    new: Spec = {}
    if wanted.HasField("clos_id"):
        new["closID"] = rdt_class(wanted.clos_id.value)
    if wanted.HasField("schemata"):
        new["schemata"] = list(wanted.schemata.value)
    if wanted.HasField("enable_monitoring"):
        new["enableMonitoring"] = wanted.enable_monitoring.value
    if new:
        linux["intelRdt"] = {**linux.get("intelRdt", {}), **new}


def _memory_policy(wanted: nri.LinuxMemoryPolicy) -> Spec:
    out: Spec = {"mode": nri.MpolMode.Name(wanted.mode)}
    if wanted.nodes:
        out["nodes"] = wanted.nodes
    if wanted.flags:
        out["flags"] = [nri.MpolFlag.Name(flag) for flag in wanted.flags]
    return out


def _mounts(spec: Spec, values: Sequence[nri.Mount]) -> None:
    if not values:
        return
    gone, new = _split(values, "destination")
    for mount in new:
        _require_path(mount.destination, "a mount")
    places = {clean(path) for path in gone} | {clean(mount.destination) for mount in new}
    kept = [mount for mount in spec["mounts"] if clean(mount["destination"]) not in places]
    added = [{"destination": m.destination, "type": m.type, "source": m.source, "options": list(m.options)} for m in new]
    spec["mounts"] = in_mount_order([*kept, *added])
    for option in (option for mount in new for option in mount.options):
        _open_root(spec["linux"], option.removeprefix("r"))


def _open_root(linux: Spec, needed: str) -> None:
    """The root must propagate at least what a mount in it does."""
    now = linux.get("rootfsPropagation", "private").removeprefix("r")
    if needed in _PROPAGATION and _PROPAGATION.index(needed) > (_PROPAGATION.index(now) if now in _PROPAGATION else 0):
        linux["rootfsPropagation"] = needed
