"""Children whose exit status somebody here will ask for later, long after their end if need be.

The reaper of orphans (imgsvc.runtime.reaper) takes what has been a zombie for a while. Whoever does not wait for a child at
once, such as a server that is looked after only when it is needed, says so here; otherwise its status would be lost, which
`subprocess` reports as success.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

# Process IDs. None of them can be given anew before its owner has waited for it. Added and removed by any thread.
_owed: set[int] = set()


def started(pid: int) -> None:
    """A child that its starter will wait for; call waited() after that."""
    _owed.add(pid)


def waited(pid: int) -> None:
    """Its status was taken. Idempotent."""
    _owed.discard(pid)


def owed() -> AbstractSet[int]:
    """Children that are not to be reaped by anybody else."""
    return _owed
