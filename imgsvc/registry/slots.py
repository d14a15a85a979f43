"""Places for downloads: limits per node, per registry and per image, and turns between them.

A huge image does not hold up the rest. A registry that is slow, or wants to be, does not either: some places are kept for
registries that hold none, and a transfer that trickles loses its place, not its progress, to those that wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from imgsvc.base.concurrency import trickles

_KEPT: Final = 2  # places beyond the node's limit, for registries that hold none
_BEYOND: Final = 2  # times the node's limit, that one registry may have under way with those that lost their places

_Group = tuple[str, str]  # registry and image


class FairSlots:
    """At most `per_node` holders, at most `per_image` of one image; registries with fewer come first, images take turns."""

    def __init__(self, per_node: int, per_image: int) -> None:
        self._per_node = self._free = per_node
        self._per_image = per_image
        self._held: Counter[str] = Counter()  # places by registry
        self._running: Counter[str] = Counter()  # the same, and those that lost them
        self._of_image: Counter[_Group] = Counter()
        self._waiting: OrderedDict[_Group, deque[asyncio.Future[None]]] = OrderedDict()

    def resize(self, per_node: int, per_image: int) -> None:
        """Change the limits. A holder keeps its slot, also beyond them."""
        self._free += per_node - self._per_node
        self._per_node, self._per_image = per_node, per_image
        self._serve()

    @asynccontextmanager
    async def slot(self, registry: str, image: str, received: Callable[[], int] | None = None) -> AsyncIterator[None]:
        """Hold a slot for an `async with` block. received: bytes so far, to tell whether the transfer trickles; None: it does not."""
        group = (registry, image)
        await self._acquire(group)
        watch = asyncio.create_task(self._give_way(registry, received)) if received else None
        try:
            yield
        finally:
            has_place = watch is None or not watch.done()
            if watch:
                watch.cancel()
            if has_place:
                self._leave(registry)
            self._running[registry] -= 1
            self._of_image[group] -= 1
            # Counters keep what is zero.
            self._held, self._running, self._of_image = +self._held, +self._running, +self._of_image
            self._serve()

    async def _give_way(self, registry: str, received: Callable[[], int]) -> None:
        """Ends when the place is lost."""
        await trickles(received, lambda: self._next(self._free + 1) is not None)
        self._leave(registry)
        self._serve()

    def _leave(self, registry: str) -> None:
        self._free += 1
        self._held[registry] -= 1

    async def _acquire(self, group: _Group) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append(turn)
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._take(group, -1)  # served and cancelled at once
                self._serve()
            elif turn in self._waiting.get(group, ()):
                self._waiting[group].remove(turn)
            raise

    def _take(self, group: _Group, count: int) -> None:
        self._free -= count
        self._held[group[0]] += count
        self._running[group[0]] += count
        self._of_image[group] += count

    def _serve(self) -> None:
        while group := self._next(self._free):
            turns = self._waiting[group]
            self._take(group, 1)
            turns.popleft().set_result(None)
            self._waiting.move_to_end(group)

    def _next(self, free: int) -> _Group | None:
        """Whose turn it is, with so many places free."""
        for group in list(self._waiting):
            turns = self._waiting[group]
            while turns and turns[0].done():
                turns.popleft()
            if not turns:
                del self._waiting[group]
        able = [group for group in self._waiting if self._may_have(group, free)]
        return min(able, key=lambda group: self._held[group[0]], default=None)

    def _may_have(self, group: _Group, free: int) -> bool:
        kept = 0 if self._held[group[0]] else _KEPT
        most = _BEYOND * self._per_node
        return free + kept > 0 and self._running[group[0]] < most and self._of_image[group] < self._per_image
