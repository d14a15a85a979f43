"""Two limits on downloads, one per node and one per image, and turns between images: a huge image does not hold the rest."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """At most `per_node` holders, at most `per_group` of one group; groups that wait are served in turn."""

    def __init__(self, per_node: int, per_group: int) -> None:
        self._per_node = self._free = per_node
        self._per_group = per_group
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def resize(self, per_node: int, per_group: int) -> None:
        """Other limits from now on. Who holds a slot keeps it, also beyond them."""
        self._free += per_node - self._per_node
        self._per_node, self._per_group = per_node, per_group
        self._serve()

    @asynccontextmanager
    async def slot(self, group: str) -> AsyncIterator[None]:
        """Hold a slot for an `async with` block."""
        await self._acquire(group)
        try:
            yield
        finally:
            self._give_back(group)

    async def _acquire(self, group: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append(turn)
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(group)  # served and cancelled at once
            elif turn in self._waiting.get(group, ()):
                self._waiting[group].remove(turn)
            raise

    def _give_back(self, group: str) -> None:
        self._free += 1
        self._held[group] -= 1
        if not self._held[group]:
            del self._held[group]
        self._serve()

    def _serve(self) -> None:
        for group in list(self._waiting):
            if self._free <= 0:
                return
            turns = self._waiting[group]
            while turns and turns[0].done():
                turns.popleft()
            if turns and self._held[group] < self._per_group:
                self._free -= 1
                self._held[group] += 1
                turns.popleft().set_result(None)
                self._waiting.move_to_end(group)
            if not turns:
                del self._waiting[group]
        if self._free > 0 and any(turns and self._held[group] < self._per_group for group, turns in self._waiting.items()):
            self._serve()
