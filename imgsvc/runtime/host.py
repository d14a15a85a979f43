"""What this kernel and this daemon can give to containers; looked up once, when the daemon starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imgsvc.base import kernel
from imgsvc.runtime.spec.selinux import Contexts, read_contexts

# Capability names in the order of their numbers. Source: capabilities(7), linux/capability.h.
CAPABILITIES: Final = tuple(
    "CAP_" + name
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ]
)


@dataclass(frozen=True, slots=True)
class Host:
    """Facts about the node.

    Attributes:
        unified: cgroup version 2 only.
        controllers: cgroup controllers that can be used.
        memory_swap: the kernel accounts swap per cgroup.
        capabilities: what the daemon, and so a container, can have at most.
        apparmor_profile: name of the default profile that is loaded, "" for none.
        contexts: what the SELinux policy calls containers.
        oom_score_min: the lowest oom_score_adj a container can get from this daemon.
    """

    unified: bool
    controllers: frozenset[str]
    memory_swap: bool
    capabilities: frozenset[str]
    oom_score_min: int
    apparmor: bool
    selinux: bool
    seccomp: bool
    apparmor_profile: str = ""
    contexts: Contexts = field(default_factory=Contexts)


def look(*, hugetlb: bool = True) -> Host:
    """The facts of this node. Blocking, well under a millisecond. hugetlb False: behave as if that controller were absent."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    bounding = kernel.bounding_set()
    capabilities = frozenset(name for number, name in enumerate(CAPABILITIES) if number in bounding)
    own_score = int(Path("/proc/self/oom_score_adj").read_text())
    return Host(
        unified=unified,
        controllers=_controllers(unified) - (frozenset() if hugetlb else {"hugetlb"}),
        memory_swap=unified or os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"),
        capabilities=capabilities,
        oom_score_min=-1000 if "CAP_SYS_RESOURCE" in capabilities else own_score,
        apparmor=_first("/sys/module/apparmor/parameters/enabled") == "Y",
        selinux=os.path.exists("/sys/fs/selinux/enforce"),
        seccomp=os.path.exists("/proc/sys/kernel/seccomp/actions_avail"),
        contexts=read_contexts(),
    )


def _controllers(unified: bool) -> frozenset[str]:
    if unified:
        return frozenset(_first("/sys/fs/cgroup/cgroup.controllers").split())
    return frozenset(name for name in _listdir("/sys/fs/cgroup") if name not in ("unified", "systemd"))


def _first(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
