"""Capabilities, seccomp, AppArmor, SELinux, masked and read-only paths of one container."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from imgsvc.base.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, printable
from imgsvc.base.oci import MIB
from imgsvc.runtime.host import CAPABILITIES, Host
from imgsvc.runtime.model import Capability, LinuxContainerSecurityContext, ProfileType, SecurityProfile
from imgsvc.runtime.settings import RuntimeSettings
from imgsvc.runtime.spec import selinux
from imgsvc.runtime.spec.seccomp import default_profile

DEFAULT_CAPABILITIES: Final = frozenset(
    "CAP_" + name
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]
)
# Hidden from every container that is not privileged, whatever else was asked for (GHSA-7ww5-4wqc-m92c).
ALWAYS_MASKED: Final = ("/sys/devices/virtual/powercap", "/sys/firmware")
# The paths of Kubernetes' procMount: Default.
USUALLY_MASKED: Final = tuple(
    "/proc/" + name
    for name in ["asound", "acpi", "interrupts", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi"]
)
USUALLY_READONLY: Final = tuple("/proc/" + name for name in ["bus", "fs", "irq", "sys", "sysrq-trigger"])
_MAX_PROFILE: Final = 4 * MIB
_SECCOMP_KEYS: Final = frozenset({"defaultAction", "defaultErrnoRet", "architectures", "flags", "syscalls"})


def capability_set(wanted: Capability | None, *, privileged: bool, host: Host) -> frozenset[str]:
    """The capabilities of a process. Raises: InvalidArgument (no such capability), FailedPrecondition (the daemon lacks it)."""
    if privileged:
        return host.capabilities
    add, drop = (_names(wanted.add_capabilities), _names(wanted.drop_capabilities)) if wanted else (frozenset[str](), frozenset[str]())
    base = frozenset[str]() if "CAP_ALL" in drop else DEFAULT_CAPABILITIES & host.capabilities
    if "CAP_ALL" in add:
        base = host.capabilities
    explicit = add - {"CAP_ALL"}
    if missing := explicit - host.capabilities:
        raise FailedPrecondition(f"this daemon cannot grant {', '.join(sorted(missing))}", hint="it does not have it itself")
    return (base - drop) | explicit


def ambient_set(wanted: Capability | None, granted: frozenset[str]) -> frozenset[str]:
    """Ambient capabilities: those asked for, which must be granted, too."""
    return _names(wanted.add_ambient_capabilities) & granted if wanted else frozenset()


def _names(names: Sequence[str]) -> frozenset[str]:
    found = set()
    for name in names:
        full = name.upper() if name.upper().startswith("CAP_") else "CAP_" + name.upper()
        if full != "CAP_ALL" and full not in CAPABILITIES:
            raise InvalidArgument(f'no capability "{printable(name, 60)}"')
        found.add(full)
    return frozenset(found)


def process_capabilities(granted: frozenset[str], ambient: frozenset[str]) -> dict[str, list[str]]:
    """The `process.capabilities` object. Inheritable holds the ambient ones only, as the kernel demands (CVE-2022-24769)."""
    listed = sorted(granted)
    object_: dict[str, list[str]] = {"bounding": listed, "effective": listed, "permitted": listed}
    if ambient:
        object_ |= {"inheritable": sorted(ambient), "ambient": sorted(ambient)}
    return object_


def seccomp(
    security: LinuxContainerSecurityContext, granted: frozenset[str], host: Host, settings: RuntimeSettings
) -> dict[str, Any] | None:
    """The `linux.seccomp` object, None for unconfined. Raises: InvalidArgument, NotFound, FailedPrecondition."""
    if security.privileged:
        return None
    profile = security.seccomp or _from_path(security.seccomp_profile_path or settings.unset_seccomp_profile)
    if profile is None or profile.profile_type == ProfileType.Unconfined:
        return None
    if not host.seccomp:
        if profile.profile_type == ProfileType.RuntimeDefault:
            return None
        raise FailedPrecondition("this kernel has no seccomp")
    if profile.profile_type == ProfileType.RuntimeDefault:
        return default_profile(granted)
    return load_profile(profile.localhost_ref)


def _from_path(text: str) -> SecurityProfile | None:
    """The deprecated spelling: "", "unconfined", "runtime/default", "docker/default", "localhost/PATH"."""
    if text in ("", "unconfined"):
        return None
    if text in ("runtime/default", "docker/default"):
        return SecurityProfile(ProfileType.RuntimeDefault)
    if text.startswith("localhost/"):
        return SecurityProfile(ProfileType.Localhost, text.removeprefix("localhost/"))
    raise InvalidArgument(f'"{printable(text, 120)}" is not a seccomp profile', hint="use unconfined, runtime/default or localhost/PATH")


def load_profile(path: str) -> dict[str, Any]:
    """A seccomp profile of the node. The path must be absolute and plain (CVE-2023-2431). Blocking."""
    if not path.startswith("/") or os.path.normpath(path) != path:
        raise InvalidArgument(f'"{printable(path, 200)}" is not an absolute path of a seccomp profile')
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_PROFILE + 1)
    except OSError as error:
        raise NotFound(f"the seccomp profile cannot be read: {error.strerror}", where=path) from error
    if len(data) > _MAX_PROFILE:
        raise ResourceExhausted(f"a seccomp profile of more than {_MAX_PROFILE} bytes", where=path)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidArgument(f"not a seccomp profile: {error}", where=path) from error
    if not isinstance(value, dict) or not isinstance(value.get("defaultAction"), str):
        raise InvalidArgument("not a seccomp profile: it has no defaultAction", where=path)
    return {k: v for k, v in value.items() if k in _SECCOMP_KEYS}


def apparmor(security: LinuxContainerSecurityContext, host: Host, settings: RuntimeSettings) -> str:
    """Name of the AppArmor profile, "" for none. Raises: FailedPrecondition when a named one is not available."""
    profile = security.apparmor or _apparmor_name(security.apparmor_profile)
    named = profile is not None and profile.profile_type == ProfileType.Localhost
    if security.privileged and not named:
        return ""
    if not host.apparmor or settings.disable_apparmor:
        if named:
            raise FailedPrecondition("an AppArmor profile is asked for, but AppArmor is off on this node")
        return ""
    if profile is None or profile.profile_type == ProfileType.RuntimeDefault:
        return host.apparmor_profile
    if profile.profile_type == ProfileType.Unconfined:
        return ""
    name = profile.localhost_ref.removeprefix("localhost/")
    if name not in loaded_apparmor_profiles():
        raise FailedPrecondition(f'the AppArmor profile "{printable(name, 120)}" is not loaded on this node')
    return name


def _apparmor_name(text: str) -> SecurityProfile | None:
    if text in ("", "runtime/default"):
        return None
    if text == "unconfined":
        return SecurityProfile(ProfileType.Unconfined)
    if text.startswith("localhost/"):
        return SecurityProfile(ProfileType.Localhost, text)
    raise InvalidArgument(f'"{printable(text, 120)}" is not an AppArmor profile', hint="use unconfined, runtime/default or localhost/NAME")


def loaded_apparmor_profiles() -> frozenset[str]:
    """Names the kernel knows."""
    try:
        text = Path("/sys/kernel/security/apparmor/profiles").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return frozenset()
    return frozenset(line.rpartition(" (")[0] for line in text.splitlines())


def container_label(security: LinuxContainerSecurityContext, pod_label: str) -> str:
    """The label of a container's processes, "" for none: its own, or what it leaves out as the pod's. Raises: InvalidArgument.

    A privileged container has none; its files are still labelled like those of others.
    """
    return selinux.process_label(pod_label, security.selinux_options, selinux.level_of(pod_label)) if pod_label else ""


def hidden_paths(security: LinuxContainerSecurityContext, settings: RuntimeSettings, *, user_namespace: bool) -> Mapping[str, list[str]]:
    """`maskedPaths` and `readonlyPaths`: what the kubelet asks for, what is never shown, and the usual ones by default.

    Two empty lists are procMount: Unmasked, which Kubernetes allows in user namespaces only; elsewhere they were forgotten.
    """
    if security.privileged:
        return {}
    masked, readonly = list(security.masked_paths), list(security.readonly_paths)
    if not masked and not readonly and not user_namespace:
        masked, readonly = list(USUALLY_MASKED), list(USUALLY_READONLY)
    if settings.disable_proc_mount:
        masked, readonly = [], []
    return {"maskedPaths": [*masked, *(p for p in ALWAYS_MASKED if p not in masked)], "readonlyPaths": readonly}
