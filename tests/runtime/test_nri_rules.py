"""NRI without plugins: adjustments merged, told of, and applied to a specification."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

import pytest
from google.protobuf.descriptor import Descriptor

from imgsvc.api import nri_pb2 as nri
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument
from imgsvc.runtime.host import Host
from imgsvc.runtime.model import HugepageLimit, LinuxContainerResources
from imgsvc.runtime.nri import messages
from imgsvc.runtime.nri.adjust import Node, apply, update_spec
from imgsvc.runtime.nri.merge import ADJUSTMENT, RESOURCES, Kind, Merged, overlay
from imgsvc.runtime.records import ContainerRecord

HOST: Final = Host(
    unified=True,
    controllers=frozenset({"memory", "hugetlb"}),
    memory_swap=True,
    capabilities=frozenset(),
    apparmor=False,
    selinux=False,
    seccomp=True,
    oom_score_min=-1000,
)
ID: Final = "c" * 64


def blank() -> dict[str, Any]:
    return {
        "process": {
            "args": ["old"],
            "env": ["A=1", "B=2"],
            "user": {"uid": 1, "gid": 2, "additionalGids": [2]},
            "rlimits": [{"type": "RLIMIT_CORE", "hard": 1, "soft": 1}],
        },
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": []}],
        "annotations": {"old": "1"},
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}],
            "devices": [{"path": "/dev/old", "type": "c", "major": 9, "minor": 9}],
            "resources": {"memory": {"limit": 100, "swap": 100}, "cpu": {"shares": 5}},
            "cgroupsPath": "/old",
            "rootfsPropagation": "slave",
        },
    }


def wanted(**fields: Any) -> nri.ContainerAdjustment:
    return nri.ContainerAdjustment(**fields)


def linux(**fields: Any) -> nri.ContainerAdjustment:
    return nri.ContainerAdjustment(linux=nri.LinuxContainerAdjustment(**fields))


def limits(**fields: Any) -> nri.ContainerAdjustment:
    return linux(resources=nri.LinuxResources(**fields))


def memory(**fields: Any) -> nri.ContainerAdjustment:
    values: Any = {k: {"value": v} for k, v in fields.items()}
    return limits(memory=nri.LinuxMemory(**values))


def cpu(**fields: Any) -> nri.ContainerAdjustment:
    values: Any = {k: v if isinstance(v, str) else {"value": v} for k, v in fields.items()}
    return limits(cpu=nri.LinuxCPU(**values))


def hook(kind: str) -> nri.ContainerAdjustment:
    return wanted(hooks=nri.Hooks(**{kind: [nri.Hook(path="/h", args=["h"], env=["X=1"], timeout=nri.OptionalInt(value=3))]}))


HOOK: Final = [{"path": "/h", "args": ["h"], "env": ["X=1"], "timeout": 3}]
SECCOMP: Final = nri.LinuxSeccomp(
    default_action="SCMP_ACT_ERRNO",
    default_errno=nri.OptionalUInt32(value=38),
    architectures=["SCMP_ARCH_X86_64"],
    flags=["SECCOMP_FILTER_FLAG_LOG"],
    listener_path="/l",
    listener_metadata="m",
    syscalls=[
        nri.LinuxSyscall(
            names=["read"],
            action="SCMP_ACT_ALLOW",
            errno_ret=nri.OptionalUInt32(value=1),
            args=[nri.LinuxSeccompArg(index=1, value=2, value_two=3, op="SCMP_CMP_EQ")],
        )
    ],
)
PRIORITY: Final = nri.LinuxIOPriority(**{"class": nri.IOPRIO_CLASS_BE, "priority": 4})
# path: what is asked for, where in the specification it is looked for, what is there then
EFFECTS: Final[dict[str, tuple[nri.ContainerAdjustment, str, Any]]] = {
    "annotations": (wanted(annotations={"-old": "", "new": "2"}), "annotations", {"new": "2"}),
    "mounts": (
        wanted(mounts=[nri.Mount(destination="/data", type="bind", source="/src", options=["rbind", "rshared"])]),
        "mounts.1",
        {"destination": "/data", "type": "bind", "source": "/src", "options": ["rbind", "rshared"]},
    ),
    "env": (
        wanted(env=[nri.KeyValue(key="-B"), nri.KeyValue(key="A", value="3"), nri.KeyValue(key="C", value="4=5")]),
        "process.env",
        ["A=3", "C=4=5"],
    ),
    "hooks.prestart": (hook("prestart"), "hooks.prestart", HOOK),
    "hooks.create_runtime": (hook("create_runtime"), "hooks.createRuntime", HOOK),
    "hooks.create_container": (hook("create_container"), "hooks.createContainer", HOOK),
    "hooks.start_container": (hook("start_container"), "hooks.startContainer", HOOK),
    "hooks.poststart": (hook("poststart"), "hooks.poststart", HOOK),
    "hooks.poststop": (hook("poststop"), "hooks.poststop", HOOK),
    "rlimits": (
        wanted(rlimits=[nri.POSIXRlimit(type="RLIMIT_NOFILE", hard=8, soft=7)]),
        "process.rlimits.1",
        {"type": "RLIMIT_NOFILE", "hard": 8, "soft": 7},
    ),
    "cdi_devices": (wanted(cdi_devices=[nri.CDIDevice(name="v/c=d")]), "linux.devices.0.path", "/dev/old"),  # by its files, later
    "args": (wanted(args=["new", "x"]), "process.args", ["new", "x"]),
    "linux.devices": (
        linux(
            devices=[
                nri.LinuxDevice(
                    path="/dev/n",
                    type="b",
                    major=1,
                    minor=2,
                    file_mode=nri.OptionalFileMode(value=0o600),
                    uid=nri.OptionalUInt32(value=5),
                    gid=nri.OptionalUInt32(value=6),
                )
            ]
        ),
        "linux.devices.1",
        {"path": "/dev/n", "type": "b", "major": 1, "minor": 2, "fileMode": 0o600, "uid": 5, "gid": 6},
    ),
    "linux.resources.memory.limit": (memory(limit=50), "linux.resources.memory", {"limit": 50, "swap": 50}),
    "linux.resources.memory.reservation": (memory(reservation=1), "linux.resources.memory.reservation", 1),
    "linux.resources.memory.swap": (memory(swap=300), "linux.resources.memory.swap", 300),
    "linux.resources.memory.kernel": (memory(kernel=3), "linux.resources.memory.kernel", 3),
    "linux.resources.memory.kernel_tcp": (memory(kernel_tcp=4), "linux.resources.memory.kernelTCP", 4),
    "linux.resources.memory.swappiness": (memory(swappiness=0), "linux.resources.memory.swappiness", 0),
    "linux.resources.memory.disable_oom_killer": (memory(disable_oom_killer=True), "linux.resources.memory.disableOOMKiller", True),
    "linux.resources.memory.use_hierarchy": (memory(use_hierarchy=False), "linux.resources.memory.useHierarchy", False),
    "linux.resources.cpu.shares": (cpu(shares=7), "linux.resources.cpu.shares", 7),
    "linux.resources.cpu.quota": (cpu(quota=-1), "linux.resources.cpu.quota", -1),
    "linux.resources.cpu.period": (cpu(period=9), "linux.resources.cpu.period", 9),
    "linux.resources.cpu.realtime_runtime": (cpu(realtime_runtime=1), "linux.resources.cpu.realtimeRuntime", 1),
    "linux.resources.cpu.realtime_period": (cpu(realtime_period=2), "linux.resources.cpu.realtimePeriod", 2),
    "linux.resources.cpu.cpus": (cpu(cpus="0-1"), "linux.resources.cpu.cpus", "0-1"),
    "linux.resources.cpu.mems": (cpu(mems="0"), "linux.resources.cpu.mems", "0"),
    "linux.resources.hugepage_limits": (
        limits(hugepage_limits=[nri.HugepageLimit(page_size="2MB", limit=4)]),
        "linux.resources.hugepageLimits",
        [{"pageSize": "2MB", "limit": 4}],
    ),
    "linux.resources.blockio_class": (limits(blockio_class=nri.OptionalString(value="")), "linux.cgroupsPath", "/old"),  # there are none
    "linux.resources.rdt_class": (limits(rdt_class=nri.OptionalString(value="gold")), "linux.intelRdt", {"closID": "gold"}),
    "linux.resources.unified": (limits(unified={"memory.high": "1"}), "linux.resources.unified", {"memory.high": "1"}),
    "linux.resources.devices": (
        limits(
            devices=[
                nri.LinuxDeviceCgroup(allow=True, type="c", major=nri.OptionalInt64(value=1), minor=nri.OptionalInt64(value=3), access="rw")
            ]
        ),
        "linux.resources.devices",
        [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}],
    ),
    "linux.resources.pids": (limits(pids=nri.LinuxPids(limit=9)), "linux.resources.pids", {"limit": 9}),
    "linux.cgroups_path": (linux(cgroups_path="/new"), "linux.cgroupsPath", "/new"),
    "linux.oom_score_adj": (linux(oom_score_adj=nri.OptionalInt(value=-5)), "process.oomScoreAdj", -5),
    "linux.io_priority": (linux(io_priority=PRIORITY), "process.ioPriority", {"class": "IOPRIO_CLASS_BE", "priority": 4}),
    "linux.seccomp_policy": (
        linux(seccomp_policy=SECCOMP),
        "linux.seccomp",
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/l",
            "listenerMetadata": "m",
            "syscalls": [
                {
                    "names": ["read"],
                    "action": "SCMP_ACT_ALLOW",
                    "errnoRet": 1,
                    "args": [{"index": 1, "value": 2, "valueTwo": 3, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
    ),
    "linux.namespaces": (
        linux(namespaces=[nri.LinuxNamespace(type="-pid"), nri.LinuxNamespace(type="ipc", path="/n")]),
        "linux.namespaces",
        [{"type": "mount"}, {"type": "ipc", "path": "/n"}],
    ),
    "linux.sysctl": (linux(sysctl={"net.x": "1", "-gone": ""}), "linux.sysctl", {"net.x": "1"}),
    "linux.net_devices": (linux(net_devices={"eth7": nri.LinuxNetDevice(name="in0")}), "linux.netDevices", {"eth7": {"name": "in0"}}),
    "linux.scheduler": (
        linux(
            scheduler=nri.LinuxScheduler(
                policy=nri.SCHED_DEADLINE, nice=1, priority=2, flags=[nri.SCHED_FLAG_RECLAIM], runtime=3, deadline=4, period=5
            )
        ),
        "process.scheduler",
        {
            "policy": "SCHED_DEADLINE",
            "nice": 1,
            "priority": 2,
            "flags": ["SCHED_FLAG_RECLAIM"],
            "runtime": 3,
            "deadline": 4,
            "period": 5,
        },
    ),
    "linux.rdt.remove": (linux(rdt=nri.LinuxRdt(remove=True)), "linux.cgroupsPath", "/old"),
    "linux.rdt.clos_id": (linux(rdt=nri.LinuxRdt(clos_id=nri.OptionalString(value="c"))), "linux.intelRdt", {"closID": "c"}),
    "linux.rdt.schemata": (
        linux(rdt=nri.LinuxRdt(schemata=nri.OptionalRepeatedString(value=["L3:0=1"]))),
        "linux.intelRdt",
        {"schemata": ["L3:0=1"]},
    ),
    "linux.rdt.enable_monitoring": (
        linux(rdt=nri.LinuxRdt(enable_monitoring=nri.OptionalBool(value=True))),
        "linux.intelRdt",
        {"enableMonitoring": True},
    ),
    "linux.memory_policy": (
        linux(memory_policy=nri.LinuxMemoryPolicy(mode=nri.MPOL_BIND, nodes="0", flags=[nri.MPOL_F_STATIC_NODES])),
        "linux.memoryPolicy",
        {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]},
    ),
}
# Messages that are one value, whatever is in them.
WHOLE: Final = {"LinuxIOPriority", "LinuxSeccomp", "LinuxScheduler", "LinuxMemoryPolicy", "LinuxPids"}


def leaves(message: Descriptor, path: str = "") -> Iterator[str]:
    for field in message.fields:
        kind = field.message_type
        if kind is None or field.is_repeated or kind.name.startswith("Optional") or kind.name in WHOLE:
            yield path + field.name
        else:
            yield from leaves(kind, f"{path}{field.name}.")


def applied(adjustment: nri.ContainerAdjustment) -> dict[str, Any]:
    spec = blank()
    apply(spec, adjustment, Node(HOST))
    return spec


def reach(spec: Any, path: str) -> Any:
    for step in path.split("."):
        spec = spec[int(step)] if step.isdigit() else spec[step]
    return spec


def test_every_field_of_an_adjustment_has_a_rule_and_an_effect() -> None:
    fields = set(leaves(nri.ContainerAdjustment.DESCRIPTOR))
    assert fields == ADJUSTMENT.keys() == EFFECTS.keys()
    owners = {rule.owner for rule in ADJUSTMENT.values()} - {0}
    assert owners == set(nri.Field.values()) - {nri.FIELD_NONE}


@pytest.mark.parametrize("path", EFFECTS)
def test_an_adjustment_has_its_effect_through_the_merge(path: str) -> None:
    adjustment, where, expected = EFFECTS[path]
    merged = Merged(ID)
    merged.adjust(adjustment, "10-a")
    assert reach(applied(merged.adjustment), where) == expected
    rule = ADJUSTMENT[path]
    if rule.kind in (Kind.SINGLE, Kind.MAP, Kind.LIST):
        again = nri.ContainerAdjustment()
        again.CopyFrom(adjustment)
        for values in (again.annotations, again.linux.sysctl):  # what is removed first may be set
            for key in [key for key in values if key.startswith("-")]:
                del values[key]
        with pytest.raises(FailedPrecondition, match="NRI plugins 10-a and 20-b both set"):
            merged.adjust(again, "20-b")


def test_a_plugin_takes_over_what_it_removes_first() -> None:
    merged = Merged(ID)
    first = wanted(
        annotations={"a": "1"}, env=[nri.KeyValue(key="E", value="1")], mounts=[nri.Mount(destination="/m", source="/1")], args=["one"]
    )
    second = wanted(
        annotations={"-a": "", "a": "2"},
        env=[nri.KeyValue(key="-E"), nri.KeyValue(key="E", value="2")],
        mounts=[nri.Mount(destination="-/m"), nri.Mount(destination="/m", source="/2")],
        args=["", "two"],
    )
    merged.adjust(first, "10-a")
    merged.adjust(second, "20-b")
    spec = applied(merged.adjustment)
    assert spec["annotations"]["a"] == "2"
    assert "E=2" in spec["process"]["env"]
    assert [m["source"] for m in spec["mounts"] if m["destination"] == "/m"] == ["/2"]
    assert spec["process"]["args"] == ["two"]
    assert merged.owners.owners[ID].simple[nri.FIELD_ARGS] == "20-b"
    assert merged.owners.owners[ID].compound[nri.FIELD_MOUNTS].owners["/m"] == "20-b"


def test_a_removed_rdt_class_can_be_set_by_another() -> None:
    merged = Merged(ID)
    merged.adjust(linux(rdt=nri.LinuxRdt(clos_id=nri.OptionalString(value="a"), enable_monitoring=nri.OptionalBool(value=True))), "10-a")
    merged.adjust(linux(rdt=nri.LinuxRdt(remove=True, clos_id=nri.OptionalString(value="b"))), "20-b")
    assert applied(merged.adjustment)["linux"]["intelRdt"] == {"closID": "b"}


def test_hooks_have_all_their_owners() -> None:
    merged = Merged(ID)
    for plugin in ("10-a", "20-b", "20-b"):
        merged.adjust(hook("poststop"), plugin)
    assert merged.owners.owners[ID].simple[nri.FIELD_OCI_HOOKS] == "10-a,20-b"
    assert len(applied(merged.adjustment)["hooks"]["poststop"]) == 3


def test_updates_conflict_by_container_and_whole() -> None:
    def update(container: str, *, shares: int = 0, cpus: str = "", tolerant: bool = False) -> nri.ContainerUpdate:
        resources = nri.LinuxResources(cpu=nri.LinuxCPU(cpus=cpus))
        if shares:
            resources.cpu.shares.value = shares
        return nri.ContainerUpdate(container_id=container, linux=nri.LinuxContainerUpdate(resources=resources), ignore_failure=tolerant)

    merged = Merged(ID)
    merged.update([update("x", shares=1), update("y", shares=2)], "10-a")
    merged.update([update("x", cpus="0"), update("y", shares=9, cpus="1", tolerant=True)], "20-b")
    assert (merged.updates["x"].linux.resources.cpu.shares.value, merged.updates["x"].linux.resources.cpu.cpus) == (1, "0")
    assert (merged.updates["y"].linux.resources.cpu.shares.value, merged.updates["y"].linux.resources.cpu.cpus) == (2, "")
    with pytest.raises(FailedPrecondition, match="10-a and 20-b both set cpu shares of container y"):
        merged.update([update("y", shares=3)], "20-b")
    with pytest.raises(InvalidArgument, match="while it is being made"):
        merged.update([update(ID, shares=3)], "20-b", made=False)


def test_every_limit_can_be_updated_or_is_refused() -> None:
    assert set(leaves(nri.LinuxResources.DESCRIPTOR)) == RESOURCES.keys()
    new = update_spec(nri.LinuxResources(memory=nri.LinuxMemory(limit=nri.OptionalInt64(value=5))), HOST)
    assert new == {"memory": {"limit": 5, "swap": 5}}
    for refused in (
        nri.LinuxResources(rdt_class=nri.OptionalString(value="x")),
        nri.LinuxResources(blockio_class=nri.OptionalString(value="x")),
    ):
        with pytest.raises(FailedPrecondition):
            update_spec(refused, HOST)
    base = messages.of_cri(LinuxContainerResources(memory_limit_in_bytes=1, memory_swap_limit_in_bytes=2, cpu_shares=3))
    over = nri.LinuxResources(memory=nri.LinuxMemory(limit=nri.OptionalInt64(value=9)))
    assert messages.to_cri(overlay(base, over)) == LinuxContainerResources(
        memory_limit_in_bytes=9, memory_swap_limit_in_bytes=9, cpu_shares=3
    )


@pytest.mark.parametrize(
    "malformed",
    [
        wanted(mounts=[nri.Mount(destination="relative")]),
        wanted(env=[nri.KeyValue(key="A=B", value="x")]),
        wanted(env=[nri.KeyValue(key="A", value="x\0y")]),
        wanted(hooks=nri.Hooks(prestart=[nri.Hook(path="h")])),
        linux(devices=[nri.LinuxDevice(path="/dev/x", type="z")]),
        linux(namespaces=[nri.LinuxNamespace(type="net")]),
        linux(oom_score_adj=nri.OptionalInt(value=1001)),
        limits(unified={"cgroup.procs": "1"}),
        limits(blockio_class=nri.OptionalString(value="fast")),
        linux(rdt=nri.LinuxRdt(clos_id=nri.OptionalString(value="../x"))),
    ],
    ids=str,
)
def test_what_is_malformed_or_cannot_be_is_refused(malformed: nri.ContainerAdjustment) -> None:
    with pytest.raises(ImgsvcError):
        applied(malformed)


def test_none_takes_priorities_away() -> None:
    spec = applied(linux(io_priority=PRIORITY, scheduler=nri.LinuxScheduler(policy=nri.SCHED_BATCH)))
    apply(spec, linux(io_priority=nri.LinuxIOPriority(), scheduler=nri.LinuxScheduler()), Node(HOST))
    assert not spec["process"].keys() & {"ioPriority", "scheduler"}


def test_the_root_propagates_what_a_mount_needs() -> None:
    assert applied(EFFECTS["mounts"][0])["linux"]["rootfsPropagation"] == "shared"


def test_a_plugin_is_told_what_those_before_it_have_changed() -> None:
    everything = Merged(ID)
    for path, (adjustment, _, _) in EFFECTS.items():
        if path not in ("linux.resources.rdt_class", "linux.rdt.remove"):
            everything.adjust(adjustment, path)
    spec = applied(everything.adjustment)
    before = copy.deepcopy(spec)
    message = messages.container(ContainerRecord(ID), "boot", spec)
    assert list(message.args) == ["new", "x"]
    assert list(message.env) == ["A=3", "C=4=5"]
    assert message.hooks == nri.Hooks(**{name: hook(name).hooks.prestart or getattr(hook(name).hooks, name) for name in HOOK_KINDS})
    assert message.linux.seccomp_policy == SECCOMP
    assert message.linux.scheduler == EFFECTS["linux.scheduler"][0].linux.scheduler
    assert message.linux.io_priority == PRIORITY
    assert message.linux.oom_score_adj.value == -5
    assert message.linux.net_devices["eth7"].name == "in0"
    assert message.linux.rdt.clos_id.value == "c"
    assert message.linux.resources.pids.limit == 9
    assert message.linux.resources.memory.disable_oom_killer.value
    assert (message.user.uid, message.user.gid, list(message.user.additional_gids)) == (1, 2, [2])
    assert spec == before


HOOK_KINDS: Final = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")


def test_limits_survive_their_three_forms() -> None:
    asked = LinuxContainerResources(
        cpu_period=1,
        cpu_quota=2,
        cpu_shares=3,
        memory_limit_in_bytes=4,
        memory_swap_limit_in_bytes=5,
        cpuset_cpus="0",
        cpuset_mems="0",
        hugepage_limits=(HugepageLimit("2MB", 6),),
        unified={"a.b": "c"},
    )
    assert messages.to_cri(messages.of_cri(asked)) == asked
    assert messages.to_cri(messages.of_oci(update_spec(messages.of_cri(asked), HOST))) == asked


def test_much_is_told_in_portions() -> None:
    pods = [nri.PodSandbox(id=str(n), name="x" * 90) for n in range(10)]
    containers = [nri.Container(id=str(n), name="x" * 90) for n in range(5)]
    parts = messages.batches(pods, containers, 350)
    assert [p for part in parts for p in part[0]] == pods
    assert [c for part in parts for c in part[1]] == containers
    assert all(nri.SynchronizeRequest(pods=p, containers=c).ByteSize() <= 350 for p, c in parts)
    assert len(parts) == 5
    assert messages.batches([], [], 350) == [([], [])]


def test_names_of_programs() -> None:
    assert messages.plugin_name("/opt/nri/plugins/10-a-b") == ("10", "a-b")
    assert [messages.plugin_name(n) for n in ("a", "1-a", "10-", "x0-a", "100-a")] == [None] * 5
