"""States of sandboxes and containers, derived from their records, and what each state allows. Pure.

::

    sandbox     half-made --started_at--> READY --stopped_at--> NOTREADY
    container   half-made --made_at--> CREATED --started_at--> RUNNING --finished_at--> EXITED
                                          `------------- finished_at ------------------^
    A record written before the last boot describes things that are gone: NOTREADY, UNKNOWN until recovery finishes it.
"""

from __future__ import annotations

from enum import IntEnum

from imgsvc.base.errors import FailedPrecondition
from imgsvc.runtime.records import ContainerRecord, SandboxRecord


class SandboxState(IntEnum):
    """Numbers as in CRI."""

    READY = 0
    NOTREADY = 1


class ContainerState(IntEnum):
    """Numbers as in CRI."""

    CREATED = 0
    RUNNING = 1
    EXITED = 2
    UNKNOWN = 3


def sandbox_state(record: SandboxRecord, boot_id: str) -> SandboxState:
    """READY exactly between started_at and stopped_at, in the boot it was started in."""
    ready = record.started_at and not record.stopped_at and record.boot_id == boot_id
    return SandboxState.READY if ready else SandboxState.NOTREADY


def container_state(record: ContainerRecord, boot_id: str) -> ContainerState:
    """The state CRI shows."""
    if record.finished_at:
        return ContainerState.EXITED
    if record.boot_id != boot_id or not record.made_at:
        return ContainerState.UNKNOWN
    return ContainerState.RUNNING if record.started_at else ContainerState.CREATED


def require_ready(record: SandboxRecord, boot_id: str) -> None:
    """Raises: FailedPrecondition unless containers can be made in the pod."""
    if sandbox_state(record, boot_id) is not SandboxState.READY:
        raise FailedPrecondition(f"pod sandbox {record.id} is not ready", hint="run a new sandbox for the pod")


def require_startable(record: ContainerRecord, boot_id: str) -> None:
    """Raises: FailedPrecondition unless the container was created and never started."""
    state = container_state(record, boot_id)
    if state is not ContainerState.CREATED:
        raise FailedPrecondition(f"container {record.id} is {state.name}, only a CREATED one can be started")


def require_running(record: ContainerRecord, boot_id: str) -> None:
    """Raises: FailedPrecondition unless the container runs."""
    state = container_state(record, boot_id)
    if state is not ContainerState.RUNNING:
        raise FailedPrecondition(f"container {record.id} is {state.name}, not RUNNING")


def require_alive(record: ContainerRecord, boot_id: str) -> None:
    """Raises: FailedPrecondition unless the container is created or runs."""
    state = container_state(record, boot_id)
    if state not in (ContainerState.CREATED, ContainerState.RUNNING):
        raise FailedPrecondition(f"container {record.id} is {state.name}")
