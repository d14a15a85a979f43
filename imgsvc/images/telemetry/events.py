"""Image events, sent to current listeners. Nothing is kept; a late listener has missed them.

Everything belongs to the event loop's thread. A listener that is too slow loses the oldest events and is told how many.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

MAX_WAITING: Final = 1000  # events kept for one listener that is slower than they come


@dataclass(frozen=True, slots=True)
class Event:
    """kind: "pull-started", "pull-done", "pull-failed", "image-added", "image-removed", "lost" …; at [s since the epoch]."""

    kind: str
    subject: str
    details: dict[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """What `imgsvc events` prints."""
        return {"time": self.at, "event": self.kind, "subject": self.subject, **self.details}


class EventBus:
    """Fan-out of events."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()

    def close(self) -> None:
        """Let every listener end after what it has waiting."""
        for listener in self._listeners:
            listener.put(None)

    def publish(self, kind: str, subject: str, **details: Any) -> None:
        """Send to every listener. Never waits."""
        if self._listeners:
            event = Event(kind, subject, details)
            for listener in self._listeners:
                listener.put(event)

    async def listen(self) -> AsyncIterator[Event]:
        """Events from now on, until the caller has enough."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            while (event := await listener.next()) is not None:
                yield event
        finally:
            self._listeners.discard(listener)


class _Listener:
    def __init__(self) -> None:
        self._waiting: deque[Event | None] = deque()
        self._lost = 0
        self._news = asyncio.Event()

    def put(self, event: Event | None) -> None:
        if len(self._waiting) == MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._news.set()

    async def next(self) -> Event | None:
        while not self._waiting:
            self._news.clear()
            await self._news.wait()
        if self._lost:
            lost, self._lost = self._lost, 0
            return Event("lost", "", {"count": lost})
        return self._waiting.popleft()
