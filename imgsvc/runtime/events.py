"""Fan-out of container events to any number of listeners, in order; a slow listener does not hold up the others.

A listener that does not read loses its stream (with an error that says so) instead of events from the middle: the
kubelet then lists everything again, which is what evented PLEG expects.

Events without a listener are kept for the next one, for five minutes, as containerd does: a kubelet that starts lists
first and listens later. What it did not hear of in between would stay as it was listed, for as long as nothing else happens
in that pod, and it would ask for the container that it has just made once more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from imgsvc.base.errors import ResourceExhausted
from imgsvc.runtime.processes.exits import now_ns
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord

MAX_WAITING: Final = 4096  # events one listener may lag behind, or that are kept: some ten per container of a full node
KEPT_NS: Final = 300 * 10**9  # how long events are kept without a listener


class EventType(IntEnum):
    """Numbers as in CRI."""

    CREATED = 0
    STARTED = 1
    STOPPED = 2
    DELETED = 3


@dataclass(frozen=True, slots=True)
class ContainerEvent:
    """Something happened to a container, or to a sandbox (then container_id is the sandbox's).

    sandbox and containers are as they were then: the whole pod, so that a listener needs no further question. A container that is
    still being made is no part of it.
    """

    container_id: str
    type: EventType
    created_at: int
    sandbox: SandboxRecord | None
    containers: tuple[ContainerRecord, ...]


class Events:
    """One per daemon. Belongs to the event loop."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._listeners: set[asyncio.Queue[ContainerEvent | None]] = set()
        self._kept: deque[ContainerEvent] = deque(maxlen=MAX_WAITING)

    def emit(self, kind: EventType, container_id: str, sandbox_id: str) -> None:
        """Send to every listener, or keep it for the next one. Never waits."""
        sandbox = self._records.sandboxes.get(sandbox_id)
        containers = tuple(c for c in self._records.containers_of(sandbox_id) if c.made_at)
        event = ContainerEvent(container_id, kind, now_ns(), sandbox, containers)
        if not self._listeners:
            self._keep(event)
        for queue in list(self._listeners):
            if queue.qsize() >= MAX_WAITING:
                self._listeners.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    def _keep(self, event: ContainerEvent) -> None:
        self._kept.append(event)
        while self._kept[0].created_at < now_ns() - KEPT_NS:
            self._kept.popleft()

    async def listen(self) -> AsyncIterator[ContainerEvent]:
        """Events that were kept and those from now on, without end. Raises: ResourceExhausted when the listener lags too far behind."""
        queue: asyncio.Queue[ContainerEvent | None] = asyncio.Queue()
        for kept in self._kept:
            if kept.created_at >= now_ns() - KEPT_NS:
                queue.put_nowait(kept)
        self._kept.clear()
        self._listeners.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
            raise ResourceExhausted(f"more than {MAX_WAITING} events were not read", hint="list the containers and listen again")
        finally:
            self._listeners.discard(queue)
            while not self._listeners and not queue.empty():
                if (unread := queue.get_nowait()) is not None:
                    self._keep(unread)
