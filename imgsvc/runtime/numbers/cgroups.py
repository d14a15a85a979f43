"""Where containers live in the cgroup tree, with either driver and either version; making and removing pod cgroups.

A container's cgroup is a child of the pod's, which the kubelet makes and names (`cgroup_parent`). Without a name we make
one per pod, and remove it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imgsvc.base import procfs
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, printable
from imgsvc.runtime.host import Host

ROOT: Final = Path("/sys/fs/cgroup")
_OWN_PARENT: Final = "/imgsvc"
_KILL_S: Final = 10.0


def pod_cgroup(parent: str, sandbox_id: str) -> str:
    """The pod's cgroup as the driver names it: the kubelet's, else one of ours."""
    return parent or f"{_OWN_PARENT}/{sandbox_id}"


def runtime_path(parent: str, sandbox_id: str, container_id: str, *, systemd: bool) -> str:
    """`linux.cgroupsPath` of a container: a path, or slice:prefix:name for systemd. Raises: InvalidArgument."""
    if not systemd:
        return f"{pod_cgroup(parent, sandbox_id).rstrip('/')}/{container_id}"
    slice_name = os.path.basename(parent.rstrip("/")) or "system.slice"
    if not slice_name.endswith(".slice"):
        raise InvalidArgument(
            f'cgroup_parent "{printable(parent, 120)}" is not a systemd slice', hint="kubelet and imgsvc need the same cgroup driver"
        )
    return f"{slice_name}:imgsvc:{container_id}"


def tree_path(cgroups_path: str) -> str:
    """The directory of a `cgroupsPath`, below a cgroup root."""
    if cgroups_path.count(":") != 2:
        return cgroups_path
    slice_name, prefix, name = cgroups_path.split(":")
    return f"{expand_slice(slice_name)}/{prefix}-{name}.scope"


def expand_slice(name: str) -> str:
    """a-b.slice is the directory a.slice/a-b.slice. Source: systemd.slice(5)."""
    stem = name.removesuffix(".slice")
    parts = stem.split("-")
    return "/" + "/".join("-".join(parts[: n + 1]) + ".slice" for n in range(len(parts)))


def directories(host: Host, path: str) -> Iterator[tuple[str, Path]]:
    """(controller, directory) of a cgroup: one per controller on version 1, one ("") on version 2."""
    relative = path.lstrip("/")
    if host.unified:
        yield "", ROOT / relative
        return
    for controller in [*sorted(host.controllers), "systemd", "unified"]:
        yield controller, ROOT / controller / relative


def exists(host: Host, path: str) -> bool:
    """Whether a cgroup is there in any hierarchy."""
    return any(directory.is_dir() for _, directory in directories(host, path))


def kill(path: str) -> None:
    """SIGKILL every process in a cgroup, in whatever hierarchies it is, until none is left, for seconds at most. Blocking.

    Raises: FailedPrecondition when some do not die.
    """
    relative = path.strip("/")
    if not relative:
        raise InvalidArgument("the root of the cgroup tree must not be killed")
    groups = [base / relative for base in (ROOT, *ROOT.iterdir()) if (base / relative / "cgroup.procs").exists()]
    deadline = time.monotonic() + _KILL_S
    while members := {pid for group in groups for pid in _members(group)}:
        if time.monotonic() > deadline:
            raise FailedPrecondition(f"{len(members)} processes do not die", where=path, hint="they hang in the kernel")
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _members(group: Path) -> list[int]:
    """Pids of those that can still run: a zombie stays a member until it is reaped."""
    try:
        pids = [int(pid) for directory, _, _ in os.walk(group) for pid in Path(directory, "cgroup.procs").read_text().split()]
    except OSError:
        return []
    return [pid for pid in pids if (found := procfs.process(pid)) is not None and not found.ended]


def remove(host: Host, path: str) -> None:
    """Remove an empty cgroup and empty parents of ours in every hierarchy. Idempotent; a busy one stays. Blocking."""
    for _, directory in directories(host, path):
        for child in list(_children(directory)):
            _rmdir(child)
        _rmdir(directory)


def _children(directory: Path) -> list[Path]:
    try:
        return [Path(e.path) for e in os.scandir(directory) if e.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _rmdir(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return
