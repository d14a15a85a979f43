"""Whether the kernel killed for memory in a container's cgroup, also when that cgroup is removed before it is read.

On version 2 conmon reads the count from the container's own cgroup, but with the systemd driver systemd removes that as
soon as it is empty, and on a busy node it often wins. The pod's cgroup stays, and keeps the counts of what vanished below.
Kills while the daemon is down are conmon's alone to see.

Source: cgroup-v2.rst, memory.events (hierarchical) and memory.events.local.
"""

from __future__ import annotations

from pathlib import Path


class OomLedger:
    """Counts kills in vanished cgroups, per pod. Blocking, a few small reads below /sys; one thread."""

    def __init__(self) -> None:
        self._known: dict[Path, int] = {}

    def begin(self, group: Path) -> None:
        """A container runs in this cgroup from now on; what vanished before was not its doing."""
        self._known = {pod: kills for pod, kills in self._known.items() if pod.is_dir()}  # others were removed since
        self._known.setdefault(group.parent, _vanished(group.parent))

    def ended(self, group: Path) -> bool:
        """Whether the kernel killed something in this cgroup; ask once, after the container ended."""
        own, vanished = _kills(group / "memory.events"), _vanished(group.parent)
        known = self._known.get(group.parent, vanished)
        if group.parent.is_dir():
            self._known[group.parent] = vanished + own
        else:
            self._known.pop(group.parent, None)
        return own > 0 or vanished > known


def _vanished(parent: Path) -> int:
    """Kills below a cgroup, except in it itself and in children that are there."""
    children = sum(_kills(events) for events in parent.glob("*/memory.events"))
    return max(0, _kills(parent / "memory.events") - _kills(parent / "memory.events.local") - children)


def _kills(file: Path) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:  # not there, or removed while it was read
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
