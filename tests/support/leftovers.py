"""What pods leave behind on a node: mounts, processes, cgroups, network ports, address leases, directories."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imgsvc.base import procfs

CGROUPS: Final = Path("/sys/fs/cgroup")
_CONTAINER_ID = re.compile(r"[0-9a-f]{32,64}")
_PRUNED: Final = frozenset({"blobs", "ingest", "snapshots"})  # named by digest, or full of image files: no pod's


def of_pods(directory: Path, cgroup_parent: str, bridge: str | None) -> list[str]:
    """Everything that a pod of the daemon in `directory` may have made and that still exists, one line each."""
    found = [f"mount {m}" for m in mounts_below(directory)]
    found += [f"process {pid}: {what}" for pid, what in processes_of(directory, cgroup_parent)]
    found += [f"cgroup {path}" for path in cgroups_below(cgroup_parent)]
    found += [f"directory or file {path}" for path in _named_by_id(directory)]
    if bridge:
        found += [f"network port {port}" for port in _ports(bridge)]
        found += [f"address lease {lease.name}" for lease in sorted((directory / "addresses").glob("*/[0-9]*"))]
    return found


def mounts_below(directory: Path) -> list[str]:
    """Mount points at or below a directory, innermost last."""
    return [os.fsdecode(m.point) for m in procfs.mounts() if procfs.is_within(m.point, os.fsencode(directory))]


def processes_of(directory: Path, cgroup_parent: str) -> list[tuple[int, str]]:
    """Processes that name the directory in their arguments or sit in the test's cgroups, except the daemon itself."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            groups = Path(f"/proc/{pid}/cgroup").read_text(errors="replace")
            state, parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ("imgsvc.cli" in words and "serve" in words) or (state, parent) == ("Z", "1"):
            continue  # the daemon itself; what init has not got round to collecting
        if any(str(directory) in word for word in words) or f":{cgroup_parent}/" in groups:
            found.append((pid, " ".join(words).strip()[:160]))
    return found


def cgroups_below(parent: str) -> Iterator[Path]:
    """Control groups inside a pod's parent group, deepest first, in every hierarchy; the parent is its maker's."""
    for base in sorted({CGROUPS / parent[1:], *CGROUPS.glob(f"*{parent}")}):
        for current, children, _ in os.walk(base, topdown=False):
            yield from (Path(current, child) for child in children)


def _named_by_id(directory: Path) -> list[Path]:
    found = []
    for top in (directory / "root", directory / "state"):
        for current, directories, files in os.walk(top):
            directories[:] = [d for d in directories if d not in _PRUNED]
            found += [Path(current, name) for name in (*directories, *files) if _CONTAINER_ID.search(name)]
    return found


def _ports(bridge: str) -> list[str]:
    ports = Path("/sys/class/net", bridge, "brif")
    return sorted(os.listdir(ports)) if ports.exists() else []


def clean_up(directory: Path, cgroup_parent: str) -> None:
    """Kill, unmount and remove by force, for the end of a test that failed half-way."""
    deadline = time.monotonic() + 60
    while (left := processes_of(directory, cgroup_parent)) and time.monotonic() < deadline:
        for pid, _ in left:
            _kill(pid)
        time.sleep(0.05)
    for point in reversed(mounts_below(directory)):
        subprocess.run(["umount", "--lazy", point], check=False, timeout=10)
    for base in cgroups_below(cgroup_parent):
        base.rmdir()
    for base in CGROUPS.glob(f"*{cgroup_parent}"):
        base.rmdir()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
