"""SELinux: the labels of pods, of their processes and of their files. Labels are `user:role:type:level`.

Every pod has a pair of categories of its own in its level, so that a process that gets out reaches no other pod's files.
What we make for a pod gets the pod's file label when it is made. A volume is relabelled only when the kubelet asks for it
(`selinux_relabel`), and a directory of the system never (CVE-2021-43816).

Source: SELinux Notebook (security contexts, MCS); selinux contexts(5) for lxc_contexts.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.errors import InvalidArgument, ResourceExhausted, printable
from imgsvc.runtime.model import SELinuxOption

ATTRIBUTE: Final = "security.selinux"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)
_LEVEL = re.compile(r"[A-Za-z0-9_:.,-]{1,200}", re.ASCII)
# Relabelling one of these, or what holds it, would lock the node's own programs out.
SYSTEM: Final = frozenset(
    [
        "/",
        "/bin",
        "/boot",
        "/dev",
        "/etc",
        "/etc/group",
        "/etc/hosts",
        "/etc/passwd",
        "/etc/pki",
        "/etc/shadow",
        "/home",
        "/lib",
        "/lib64",
        "/media",
        "/opt",
        "/proc",
        "/root",
        "/run",
        "/sbin",
        "/srv",
        "/sys",
        "/tmp",
        "/usr",
        "/var",
        "/var/lib",
        "/var/log",
    ]
)


@dataclass(frozen=True, slots=True)
class Contexts:
    """What the node's policy calls containers. process, machine: domains of a container and of a virtual machine; file: type of their files."""

    process: str = "system_u:system_r:container_t:s0"
    machine: str = "system_u:system_r:container_kvm_t:s0"
    file: str = "system_u:object_r:container_file_t:s0"


def read_contexts(etc: Path = Path("/etc/selinux")) -> Contexts:
    """Those of the node's policy, or the usual ones where it names none. Blocking."""
    try:
        policy = _pairs((etc / "config").read_text(errors="replace")).get("SELINUXTYPE", "targeted")
        found = _pairs((etc / policy / "contexts/lxc_contexts").read_text(errors="replace"))
    except OSError:
        return Contexts()
    usual = Contexts()
    return Contexts(found.get("process", usual.process), found.get("kvm_process", usual.machine), found.get("file", usual.file))


def _pairs(text: str) -> dict[str, str]:
    lines = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {key.strip(): value.strip().strip('"') for key, separator, value in lines if separator}


def new_level(taken: AbstractSet[str], categories: int) -> str:
    """A level with two categories below `categories` that no label in `taken` has. Raises: ResourceExhausted."""
    used = {label.split(":", 3)[3] for label in taken if label.count(":") >= 3}
    pairs = categories * (categories - 1) // 2
    if len(used) >= pairs:
        raise ResourceExhausted(f"all {pairs} pairs of SELinux categories are in use", hint="raise selinux_category_range")
    while True:
        low, high = sorted((secrets.randbelow(categories), secrets.randbelow(categories)))
        if low != high and (level := f"s0:c{low},c{high}") not in used:
            return level


def process_label(context: str, option: SELinuxOption | None, level: str) -> str:
    """The label of a process: a context, with what the pod asks for instead, at its level or else this one.

    Raises: InvalidArgument (not parts of a label).
    """
    user, role, kind, _ = context.split(":", 3)
    if option is None:
        return f"{user}:{role}:{kind}:{level}"
    for text, pattern, what in (
        (option.user, _NAME, "user"),
        (option.role, _NAME, "role"),
        (option.type, _NAME, "type"),
        (option.level, _LEVEL, "level"),
    ):
        if text and not pattern.fullmatch(text):
            raise InvalidArgument(f'"{printable(text, 80)}" is not an SELinux {what}')
    return f"{option.user or user}:{option.role or role}:{option.type or kind}:{option.level or level}"


def level_of(label: str) -> str:
    """The level of a label."""
    return label.split(":", 3)[3]


def file_label(context: str, process: str) -> str:
    """The label of files that a process with this label may use; "" for "" (SELinux is off)."""
    if not process:
        return ""
    _, role, kind, _ = context.split(":", 3)
    return f"{process.split(':', 1)[0]}:{role}:{kind}:{level_of(process)}"


def mount_option(label: str) -> tuple[str, ...]:
    """For mounting a file system all of whose files have this label. The quotes keep its comma together."""
    return (f'context="{label}"',) if label else ()


def relabel_volume(path: str, label: str) -> None:
    """Give a volume and all below it a label, as the kubelet asked. Blocking. Raises: InvalidArgument (a system directory), OSError."""
    if path in SYSTEM or path == os.path.expanduser("~"):
        raise InvalidArgument(f"{path} belongs to the system and is not relabelled", hint="mount a directory of your own")
    relabel(path, label)


def relabel(path: str, label: str) -> None:
    """Give a file, or a directory with all below it, a label; no symlink is followed. Nothing for "". Blocking.

    A file system without labels is left as it is. Raises: OSError.
    """
    if not label:
        return
    try:
        _set(path, label.encode())
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for _, directories, files, fd in os.fwalk(path):
        for name in (*directories, *files):
            try:
                _set(f"/proc/self/fd/{fd}/{name}", label.encode())
            except FileNotFoundError:  # a volume in use changes meanwhile
                continue


def _set(path: str, value: bytes) -> None:
    try:
        if os.getxattr(path, ATTRIBUTE, follow_symlinks=False).rstrip(b"\0") == value:
            return
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
    os.setxattr(path, ATTRIBUTE, value, follow_symlinks=False)
