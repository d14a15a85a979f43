"""Leases in memory: nothing is durable, everything else is as promised."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from imgsvc.base.errors import FailedPrecondition, InvalidArgument, NotFound
from imgsvc.images.leases import Lease, LeaseManager, Node


class MemoryLeases:
    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._all: dict[str, Lease] = {}
        self._removing: list[Node] = []
        self._changed = asyncio.Condition()
        self._named: list[Node] | None = None

    async def hold(
        self,
        resources: Iterable[tuple[str, str]],
        *,
        lease_id: str | None = None,
        expires_in: timedelta | None = None,
        permanent: bool = False,
        purpose: str = "",
    ) -> str:
        lease_id = lease_id if lease_id is not None else uuid.uuid4().hex
        if not lease_id or (expires_in is not None and expires_in <= timedelta(0)):
            raise InvalidArgument("bad lease")
        if lease_id not in self._all:
            now = self._clock()
            self._all[lease_id] = Lease(lease_id, frozenset(), now, now + expires_in if expires_in else None, permanent, purpose)
        await self.add(lease_id, resources)
        return lease_id

    async def add(self, lease_id: str, resources: Iterable[tuple[str, str]]) -> None:
        nodes = frozenset(Node(*resource) for resource in resources)
        lease = self._get(lease_id)
        self._all[lease_id] = replace(lease, resources=lease.resources | nodes)
        if self._named is not None:
            self._named.extend(nodes)
        async with self._changed:
            await self._changed.wait_for(lambda: not nodes.intersection(self._removing))

    async def renew(self, lease_id: str, expires_in: timedelta | None) -> None:
        ends = None if expires_in is None else self._clock() + expires_in
        self._all[lease_id] = replace(self._get(lease_id), expires_at=ends)

    async def release(self, lease_id: str) -> None:
        self._all.pop(lease_id, None)

    @contextlib.asynccontextmanager
    async def held(self, resources: Iterable[tuple[str, str]], *, purpose: str) -> AsyncIterator[str]:
        lease_id = await self.hold(resources, purpose=purpose)
        try:
            yield lease_id
        finally:
            await self.release(lease_id)

    def leases(self) -> list[Lease]:
        return list(self._all.values())

    def holders(self, node: Node) -> list[str]:
        return sorted(lease.id for lease in self._all.values() if node in lease.resources)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        if self._named is not None:
            raise FailedPrecondition("collecting already")
        self._named = []
        try:
            yield
        finally:
            self._named = None

    @contextlib.asynccontextmanager
    async def removal(self, nodes: Sequence[Node]) -> AsyncIterator[list[Node]]:
        free = [node for node in nodes if not self.holders(node) and node not in (self._named or ())]
        self._removing += free
        try:
            yield free
        finally:
            self._removing = [node for node in self._removing if node not in free]
            async with self._changed:
                self._changed.notify_all()

    def _get(self, lease_id: str) -> Lease:
        if lease_id not in self._all:
            raise NotFound("no such lease")
        return self._all[lease_id]


def as_lease_manager(leases: MemoryLeases) -> LeaseManager:
    return leases
