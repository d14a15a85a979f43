"""CRI config + image config -> OCI runtime specification. Pure: everything that was looked up arrives in ContainerPlan.

Source: OCI runtime-spec config.md, config-linux.md; cri-api api.proto for what each field means.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from imgsvc.base.errors import FailedPrecondition, InvalidArgument, printable
from imgsvc.base.oci import ImageConfig
from imgsvc.runtime.host import Host
from imgsvc.runtime.model import (
    ContainerConfig,
    KeyValue,
    LinuxContainerResources,
    NamespaceMode,
    PodSandboxConfig,
    User,
    UserNamespace,
)
from imgsvc.runtime.spec.devices import DeviceNode
from imgsvc.runtime.spec.security import process_capabilities
from imgsvc.runtime.spec.volumes import BoundMount, clean, in_mount_order

OCI_VERSION: Final = "1.0.2"
DEFAULT_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEFAULT_SHM: Final = 64 * 1024 * 1024
STANDARD_MOUNTS: Final = frozenset({"/proc", "/sys", "/sys/fs/cgroup", "/dev", "/dev/pts", "/dev/mqueue", "/dev/shm"})
_OURS: Final = "io.kubernetes.cri."


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """What a specification is made from.

    Attributes:
        cwd: the working directory, with links of the image resolved, so that the runtime can make it where one leads nowhere.
        namespaces: type -> path to join, "" for a new one; absent types are the host's.
        cgroups_path: as the OCI runtime's cgroup driver wants it.
        files: what we provide unless the pod mounts something there: container path -> host path.
        selinux, file_label: SELinux labels of processes and of files, "" for none.
        ambient, granted: capabilities. profile: linux.seccomp. hidden: maskedPaths, readonlyPaths.
        annotation_globs: what the handler's configuration lets through from the pod and from the container.
    """

    container_id: str
    sandbox_id: str
    config: ContainerConfig
    pod: PodSandboxConfig
    image: ImageConfig
    image_name: str
    handler: str
    user: User
    host: Host
    rootfs: Path
    cwd: str
    namespaces: Mapping[str, str]
    user_namespace: UserNamespace | None
    cgroups_path: str
    shm: str
    files: Mapping[str, str]
    mounts: Sequence[BoundMount]
    devices: Sequence[DeviceNode]
    all_devices: bool
    granted: frozenset[str]
    ambient: frozenset[str]
    profile: Mapping[str, Any] | None
    apparmor: str
    selinux: str
    file_label: str
    hidden: Mapping[str, list[str]]
    root_propagation: str
    device_owner: User | None = None
    cgroup_writable: bool = False
    restrict_oom_score_adj: bool = False
    tolerate_missing_hugetlb: bool = True
    annotation_globs: tuple[Sequence[str], Sequence[str]] = ((), ())
    base: Mapping[str, Any] = field(default_factory=dict)


def build(plan: ContainerPlan) -> dict[str, Any]:
    """The content of config.json. Raises: InvalidArgument, FailedPrecondition."""
    mounts = _mounts(plan)
    base_linux = dict(plan.base.get("linux", {}))
    if plan.config.security.privileged:
        for hidden in ("maskedPaths", "readonlyPaths"):
            base_linux.pop(hidden, None)
    spec: dict[str, Any] = {
        **plan.base,
        "ociVersion": plan.base.get("ociVersion", OCI_VERSION),
        "process": {**plan.base.get("process", {}), **_process(plan)},
        "root": {"path": str(plan.rootfs), "readonly": plan.config.security.readonly_rootfs},
        "mounts": in_mount_order([*mounts, *_base_mounts(plan, mounts)]),
        "annotations": {**plan.base.get("annotations", {}), **allowed_annotations(plan)},
        "linux": {**base_linux, **_linux(plan)},
    }
    if "uts" in plan.namespaces and plan.pod.hostname:
        spec["hostname"] = plan.pod.hostname  # of the pod's namespace already; runtimes that cannot join one read it here
    return spec


def _base_mounts(plan: ContainerPlan, ours: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the handler's base specification mounts beyond that."""
    taken = {clean(m["destination"]) for m in ours}
    return [dict(m) for m in plan.base.get("mounts", ()) if clean(m["destination"]) not in taken]


def command_line(config: ContainerConfig, image: ImageConfig) -> list[str]:
    """CRI: command replaces the entrypoint and, unless args are given, the image's cmd, too; args replace cmd."""
    entrypoint = () if image.entrypoint == ("",) else image.entrypoint  # how builders write that there is none
    argv = [*config.command, *config.args] if config.command else [*entrypoint, *(config.args or image.cmd)]
    if not argv:
        raise InvalidArgument("neither the pod nor the image says what to run", where=config.metadata.name)
    return argv


def environment(
    envs: Sequence[KeyValue], image: ImageConfig, *, hostname: str = "", tty: bool = False, base: Sequence[str] = ()
) -> list[str]:
    """The handler's base first, image and pod over it; the last of a name wins and keeps its first place."""
    merged: dict[str, str] = {}
    key, _, value = DEFAULT_PATH.partition("=")
    merged[key] = value
    if hostname:
        merged["HOSTNAME"] = hostname
    if tty:
        merged["TERM"] = "xterm"
    for text in (*base, *image.env):
        key, separator, value = text.partition("=")
        if key and separator and "\0" not in text:
            merged[key] = value
    for env in envs:
        merged[env.key] = env.value.decode("utf-8", "surrogateescape")
    return [f"{k}={v}" for k, v in merged.items()]


def working_dir(config: ContainerConfig, image: ImageConfig) -> str:
    """Where the process starts, as it was asked for."""
    path = config.working_dir or image.working_dir or "/"
    return checked_cwd(path if path.startswith("/") else "/" + path)


def checked_cwd(path: str) -> str:
    """The path itself. A descriptor of the runtime must not be reachable by it (CVE-2024-21626). Raises: InvalidArgument."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if parts[:1] == ["proc"] and ("fd" in parts or ".." in parts):
        raise InvalidArgument(f'"{printable(path, 120)}" cannot be a working directory')
    return path


def _process(plan: ContainerPlan) -> dict[str, Any]:
    security = plan.config.security
    process: dict[str, Any] = {
        "terminal": plan.config.tty,
        "user": {"uid": plan.user.uid, "gid": plan.user.gid, "additionalGids": list(plan.user.groups)},
        "args": command_line(plan.config, plan.image),
        "env": environment(
            plan.config.envs, plan.image, hostname=plan.pod.hostname, tty=plan.config.tty, base=plan.base.get("process", {}).get("env", ())
        ),
        "cwd": checked_cwd(plan.cwd),
        "capabilities": process_capabilities(plan.granted, plan.ambient),
        "noNewPrivileges": security.no_new_privs,
    }
    resources = plan.config.linux.resources
    process["oomScoreAdj"] = oom_score(resources.oom_score_adj if resources else 0, plan.host, restrict=plan.restrict_oom_score_adj)
    if plan.apparmor:
        process["apparmorProfile"] = plan.apparmor
    if plan.selinux and not security.privileged:
        process["selinuxLabel"] = plan.selinux
    return process


def process_user(spec: Mapping[str, Any]) -> User:
    """The user that a finished specification runs the process as."""
    user = spec["process"]["user"]
    return User(user["uid"], user["gid"], tuple(user["additionalGids"]))


def oom_score(wanted: int, host: Host, *, restrict: bool) -> int:
    """The nearest score the kernel lets this daemon give. restrict: never below the daemon's own."""
    if not -1000 <= wanted <= 1000:
        raise InvalidArgument(f"oom_score_adj {wanted} is not between -1000 and 1000")
    return max(wanted, host.oom_score_min) if host.oom_score_min > -1000 or restrict else wanted


def _mounts(plan: ContainerPlan) -> list[dict[str, Any]]:
    taken = {clean(m.destination) for m in plan.mounts}
    standard = [m for m in _standard_mounts(plan) if m["destination"] not in taken]
    access = "ro" if plan.config.security.readonly_rootfs else "rw"
    provided = [
        BoundMount(path, source, ("rbind", "rprivate", access)).to_spec() for path, source in plan.files.items() if path not in taken
    ]
    return in_mount_order([*standard, *provided, *(m.to_spec() for m in plan.mounts)])


def _standard_mounts(plan: ContainerPlan) -> list[dict[str, Any]]:
    privileged = plan.config.security.privileged
    access = "rw" if privileged else "ro"
    # Without a cgroup namespace, writable would mean those of others, too.
    cgroups = "rw" if plan.cgroup_writable and "cgroup" in plan.namespaces else access
    kernel_views = ["nosuid", "noexec", "nodev"]
    mounts: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": kernel_views},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": _devpts(plan)},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": kernel_views},
        _sysfs(plan, [*kernel_views, access]),
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*kernel_views, "relatime", cgroups]},
    ]
    if plan.namespaces.get("ipc") is None and plan.user_namespace:
        mounts[3] = {"destination": "/dev/mqueue", "type": "bind", "source": "/dev/mqueue", "options": ["rbind", *kernel_views]}
    if plan.shm:
        mounts.append(BoundMount("/dev/shm", plan.shm, ("rbind", "rprivate", "nosuid", "nodev", "noexec", "rw")).to_spec())
    else:
        shm = [*kernel_views, "mode=1777", f"size={_DEFAULT_SHM}"]
        mounts.append({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": shm})
    return mounts


def _devpts(plan: ContainerPlan) -> list[str]:
    options = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    mapped = plan.user_namespace is None or any(m.container_id <= 5 < m.container_id + m.length for m in plan.user_namespace.gids)
    return [*options, "gid=5"] if mapped else options


def _sysfs(plan: ContainerPlan, options: list[str]) -> dict[str, Any]:
    if plan.user_namespace and plan.namespaces.get("network") is None:
        # A new sysfs belongs to the host's network namespace there, which the pod's root may not mount.
        return {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", *options]}
    return {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": options}


def _linux(plan: ContainerPlan) -> dict[str, Any]:
    linux: dict[str, Any] = {
        "namespaces": [{"type": t, **({"path": p} if p else {})} for t, p in plan.namespaces.items()],
        "cgroupsPath": plan.cgroups_path,
        "resources": {**resources(plan.config.linux.resources, plan.host, tolerate=plan.tolerate_missing_hugetlb), **_device_rules(plan)},
        "devices": [device.node(plan.device_owner) for device in plan.devices],
        "rootfsPropagation": plan.root_propagation,
        **plan.hidden,
    }
    if plan.profile is not None:
        linux["seccomp"] = dict(plan.profile)
    if plan.file_label:
        linux["mountLabel"] = plan.file_label
    if user := plan.user_namespace:
        for name, mappings in (("uidMappings", user.uids), ("gidMappings", user.gids)):
            linux[name] = [{"containerID": m.container_id, "hostID": m.host_id, "size": m.length} for m in mappings]
    return linux


def _device_rules(plan: ContainerPlan) -> dict[str, Any]:
    if plan.all_devices:
        return {"devices": [{"allow": True, "access": "rwm"}]}
    return {"devices": [{"allow": False, "access": "rwm"}, *(device.rule() for device in plan.devices)]}


def resources(wanted: LinuxContainerResources | None, host: Host, *, tolerate: bool = True) -> dict[str, Any]:
    """A `linux.resources` object; what is 0 or "" stays out. Also used for updates.

    Raises: FailedPrecondition (a limit this node's cgroups cannot hold).
    """
    if wanted is None:
        return {}
    out: dict[str, Any] = {}
    cpu = {
        "shares": wanted.cpu_shares,
        "quota": wanted.cpu_quota,
        "period": wanted.cpu_period,
        "cpus": wanted.cpuset_cpus,
        "mems": wanted.cpuset_mems,
    }
    if cpu := {k: v for k, v in cpu.items() if v}:
        out["cpu"] = cpu
    if memory := _memory(wanted, host):
        out["memory"] = memory
    if pages := [{"pageSize": h.page_size, "limit": h.limit} for h in wanted.hugepage_limits]:
        if "hugetlb" in host.controllers:
            out["hugepageLimits"] = pages
        elif not tolerate and any(p["limit"] for p in pages):
            raise FailedPrecondition("huge pages are limited, but this node has no hugetlb cgroup controller")
    if wanted.unified:
        if not host.unified:
            raise FailedPrecondition("`unified` resources need cgroup version 2")
        out["unified"] = unified_limits(wanted.unified)
    return out


def _memory(wanted: LinuxContainerResources, host: Host) -> dict[str, int]:
    memory: dict[str, int] = {}
    if wanted.memory_limit_in_bytes:
        memory["limit"] = wanted.memory_limit_in_bytes
    if host.memory_swap and wanted.memory_limit_in_bytes:
        # Without a swap limit of its own a container gets no swap beyond its memory limit.
        memory["swap"] = wanted.memory_swap_limit_in_bytes or wanted.memory_limit_in_bytes
    return memory


def unified_limits(values: Mapping[str, str]) -> dict[str, str]:
    """Files of a cgroup directory and what is written to them. Raises: InvalidArgument."""
    for key in values:
        if "/" in key or key.startswith(".") or key.split(".")[0] == "cgroup":
            raise InvalidArgument(f'"{printable(key, 80)}" is not a cgroup limit')
    return dict(values)


def allowed_annotations(plan: ContainerPlan) -> dict[str, str]:
    """Annotations of the specification: ours, and those the handler's configuration allows.

    Nothing an image says arrives here (CVE-2026-53488).
    """
    pod_globs, container_globs = plan.annotation_globs
    passed = {k: v for k, v in plan.pod.annotations.items() if _matches(k, pod_globs)}
    passed |= {k: v for k, v in plan.config.annotations.items() if _matches(k, container_globs)}
    m = plan.pod.metadata
    return passed | {
        _OURS + "container-type": "container",
        _OURS + "sandbox-id": plan.sandbox_id,
        _OURS + "sandbox-name": m.name,
        _OURS + "sandbox-namespace": m.namespace,
        _OURS + "sandbox-uid": m.uid,
        _OURS + "container-name": plan.config.metadata.name,
        _OURS + "image-name": plan.image_name,
    }


def sandbox_annotations(sandbox_id: str, pod: PodSandboxConfig, globs: Sequence[str]) -> dict[str, str]:
    """Annotations of what holds a pod, as shims expect them; a shim that makes machines sizes them by the numbers."""
    passed = {k: v for k, v in pod.annotations.items() if _matches(k, globs)}
    m = pod.metadata
    known = {
        "container-type": "sandbox",
        "sandbox-id": sandbox_id,
        "sandbox-name": m.name,
        "sandbox-namespace": m.namespace,
        "sandbox-uid": m.uid,
        "sandbox-log-directory": pod.log_directory,
    }
    if resources := pod.linux.resources:
        known |= {
            "sandbox-cpu-period": str(resources.cpu_period),
            "sandbox-cpu-quota": str(resources.cpu_quota),
            "sandbox-cpu-shares": str(resources.cpu_shares),
            "sandbox-memory": str(resources.memory_limit_in_bytes),
        }
    return passed | {_OURS + name: value for name, value in known.items()}


def _matches(key: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, glob) for glob in globs)


def namespaces(config: ContainerConfig, pod: PodSandboxConfig, pins: Path, pid_path: str, host: Host) -> dict[str, str]:
    """Namespace types of a container and what to join. pins: the pod's; pid_path: of the pause or the target container.

    On cgroup version 2 a container sees its own cgroup as the root of all, unless it is privileged.
    """
    options = pod.namespaces
    found = {"mount": ""}
    if options.user:
        found["user"] = str(pins / "user")
    for kind, name, mode in (("network", "net", options.network), ("uts", "uts", options.network), ("ipc", "ipc", options.ipc)):
        if mode != NamespaceMode.NODE:
            found[kind] = str(pins / name)
    if host.unified and not config.security.privileged:
        found["cgroup"] = ""
    own = config.security.namespace_options.pid
    if own == NamespaceMode.CONTAINER:
        found["pid"] = ""
    elif own in (NamespaceMode.POD, NamespaceMode.TARGET):
        found["pid"] = pid_path
    return found
