"""Fan-out of container events to any number of listeners, in order, none of whom can hold up the others.

A listener that does not read loses its stream (with an error that says so) instead of events from the middle: the
kubelet then lists everything anew, which is what evented PLEG expects.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from imgsvc.errors import ResourceExhausted
from imgsvc.runtime.exits import now_ns
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord

MAX_WAITING: Final = 4096  # events one listener may lag behind: some ten per container of a full node


class EventType(IntEnum):
    """Numbers as in CRI."""

    CREATED = 0
    STARTED = 1
    STOPPED = 2
    DELETED = 3


@dataclass(frozen=True, slots=True)
class ContainerEvent:
    """Something happened to a container, or to a sandbox (then container_id is the sandbox's).

    sandbox and containers are as they were then: the whole pod, so that a listener needs no further question.
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

    def emit(self, kind: EventType, container_id: str, sandbox_id: str) -> None:
        """Tell every listener. Never waits."""
        if not self._listeners:
            return
        sandbox = self._records.sandboxes.get(sandbox_id)
        event = ContainerEvent(container_id, kind, now_ns(), sandbox, tuple(self._records.containers_of(sandbox_id)))
        for queue in list(self._listeners):
            if queue.qsize() >= MAX_WAITING:
                self._listeners.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    async def listen(self) -> AsyncIterator[ContainerEvent]:
        """Events from now on, without end. Raises: ResourceExhausted when the listener lags too far behind."""
        queue: asyncio.Queue[ContainerEvent | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
            raise ResourceExhausted(f"more than {MAX_WAITING} events were not read", hint="list the containers and listen again")
        finally:
            self._listeners.discard(queue)
