"""Small asyncio tools: one lock per key, one flight per key, a cancel token for work in threads.

A cancelled await does not stop its thread: long work in a thread checks a CancelToken per chunk.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from imgsvc.errors import Cancelled

T = TypeVar("T")


class CancelToken:
    """Set on one thread, checked on another."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop. Idempotent."""
        self._event.set()

    def check(self) -> None:
        """Raises: Cancelled once cancel() was called."""
        if self._event.is_set():
            raise Cancelled("cancelled")


class KeyedLock:
    """Mutual exclusion per key; keys nobody holds or awaits cost nothing."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the key's lock for an `async with` block."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)

    def busy(self, key: str) -> bool:
        """Whether anybody holds or awaits the key."""
        return key in self._locks


class SingleFlight(Generic[T]):
    """Callers with one key share one run. A caller that leaves does not disturb the rest; the last to leave cancels it."""

    def __init__(self) -> None:
        self._flights: dict[str, tuple[asyncio.Task[T], int]] = {}

    async def run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """Join the flight for `key`, starting it with `work` when there is none."""
        if key in self._flights and not self._flights[key][0].done():
            task, users = self._flights[key]
        else:
            task, users = asyncio.ensure_future(_call(work)), 0
        self._flights[key] = (task, users + 1)
        try:
            return await asyncio.shield(task)
        finally:
            await self._leave(key, task)

    async def _leave(self, key: str, task: asyncio.Task[T]) -> None:
        current, users = self._flights.get(key, (task, 0))
        if current is not task:
            return
        if users > 1:
            self._flights[key] = (task, users - 1)
            return
        del self._flights[key]
        if not task.done():
            task.cancel()
            # The work gives back what it holds before the last caller's call ends.
            await asyncio.wait([task])


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
