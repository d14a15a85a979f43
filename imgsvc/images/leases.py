"""Leases: what is needed, and for how long. What a lease names is not collected, whether it exists yet or not.

The order that makes a pull safe beside a collection: name everything in a lease *first*, then look for what exists. Adding
waits for a removal of the same thing that has begun, and a removal passes over what a lease names or has named since
the collection looked around; so the holder of a lease sees a thing whole or not at all, and it stays like that, also
when the lease is released right after something else (an image record) has taken over.

A lease is an argument, never hidden context. Its record is durable before hold() returns. Three ways to end:

    release()      its holder is done
    expires_at     fires by itself (expire_forever), also when nothing else happens
    a restart      holders of ordinary leases are gone; theirs go RESTART_GRACE later, so that a pull that is tried again
                   finds its bytes. A permanent lease (a container's) stays until it is released.

All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, Protocol

from imgsvc.base.concurrency import KeyedLock, time_limit, to_the_end
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument, NotFound, printable
from imgsvc.base.failpoints import afailpoint
from imgsvc.base.metadb.database import MetaDB, Record

log = logging.getLogger(__name__)

TABLE: Final = "leases"
RESTART_GRACE: Final = timedelta(hours=1)
_RETRY: Final = 1.0  # [s] before a disk that failed is tried again
_LONGEST_SLEEP: Final = 60.0  # [s] between two looks at the clock, which may be set meanwhile


class Node(NamedTuple):
    """Anything that can be kept or collected. kind: "content", "snapshot", "image" …; id: unique within its kind."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Lease:
    """One holder's claim. expires_at: None while nothing ends it. purpose: for people, e.g. "pull docker.io/…"."""

    id: str
    resources: frozenset[Node]
    created_at: datetime
    expires_at: datetime | None = None
    permanent: bool = False
    purpose: str = ""


class LeaseManager(Protocol):
    """See the module for what a lease promises."""

    async def hold(
        self,
        resources: Iterable[tuple[str, str]],
        *,
        lease_id: str | None = None,
        expires_in: timedelta | None = None,
        permanent: bool = False,
        purpose: str = "",
    ) -> str:
        """A new lease over (kind, id) pairs that may not exist yet; returns its ID. Durable on return.

        With the lease_id of a lease that exists: as add. Raises: InvalidArgument, ResourceExhausted.
        """

    async def add(self, lease_id: str, resources: Iterable[tuple[str, str]]) -> None:
        """Name more things. Durable on return. Raises: NotFound."""

    async def renew(self, lease_id: str, expires_in: timedelta | None) -> None:
        """Let it end that much later from now, or never. Raises: NotFound."""

    async def release(self, lease_id: str) -> None:
        """Drop a lease. Absent is a success."""

    def held(self, resources: Iterable[tuple[str, str]], *, purpose: str) -> contextlib.AbstractAsyncContextManager[str]:
        """A new lease for an `async with` block, which is handed its ID. A failing release is logged; it fails nothing else."""

    def leases(self) -> list[Lease]:
        """All leases."""

    def holders(self, node: Node) -> list[str]:
        """IDs of the leases that name `node`."""

    def collecting(self) -> contextlib.AbstractContextManager[None]:
        """What a lease comes to name until the block ends counts as named until then, also when it is released.

        One collection at a time. Raises: FailedPrecondition when there is one already.
        """

    def removal(self, nodes: Sequence[Node]) -> contextlib.AbstractAsyncContextManager[list[Node]]:
        """Yields those of `nodes` that no lease names. Until the block ends, leases that want one of them wait."""


class LeaseBook:
    """The leases of one daemon: in memory for fast answers, in the metadata table "leases" for the next start."""

    def __init__(self, db: MetaDB, clock: Callable[[], datetime] = _utc_now) -> None:
        """Load what the last daemon left; its ordinary leases get RESTART_GRACE. Raises: DataLoss."""
        self._db = db
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._holders: dict[Node, set[str]] = {}
        self._removing: set[Node] = set()
        self._named: set[Node] | None = None  # while a collection runs: what leases have come to name since it began
        self._changed = asyncio.Condition()
        self._locks = KeyedLock()  # by lease ID: changes of one lease follow one another
        grace = clock() + RESTART_GRACE
        with db.read() as txn:
            for lease_id, record in txn.items(TABLE):
                lease = _decode(lease_id, record)
                self._show(lease if lease.permanent else replace(lease, expires_at=min(lease.expires_at or grace, grace)))

    async def hold(
        self,
        resources: Iterable[tuple[str, str]],
        *,
        lease_id: str | None = None,
        expires_in: timedelta | None = None,
        permanent: bool = False,
        purpose: str = "",
    ) -> str:
        """See LeaseManager."""
        lease_id = uuid.uuid4().hex if lease_id is None else lease_id
        if not lease_id or (expires_in is not None and expires_in <= timedelta(0)):
            raise InvalidArgument("a lease needs an ID, and a time to live above zero")
        nodes = frozenset(Node(*resource) for resource in resources)
        async with self._locks.hold(lease_id):
            await afailpoint("lease.create")
            old = self._leases.get(lease_id)
            if old is not None:
                await self._enter(replace(old, resources=old.resources | nodes))
            else:
                now = self._clock()
                await self._enter(Lease(lease_id, nodes, now, now + expires_in if expires_in else None, permanent, purpose))
        return lease_id

    async def add(self, lease_id: str, resources: Iterable[tuple[str, str]]) -> None:
        """See LeaseManager."""
        nodes = frozenset(Node(*resource) for resource in resources)
        async with self._locks.hold(lease_id):
            await afailpoint("lease.add")
            old = self._get(lease_id)
            await self._enter(replace(old, resources=old.resources | nodes))

    async def renew(self, lease_id: str, expires_in: timedelta | None) -> None:
        """See LeaseManager."""
        async with self._locks.hold(lease_id):
            ends = None if expires_in is None else self._clock() + expires_in
            await self._enter(replace(self._get(lease_id), expires_at=ends))

    async def release(self, lease_id: str) -> None:
        """See LeaseManager."""
        async with self._locks.hold(lease_id):
            # Memory first: if the disk fails now, or the caller leaves, the lease is over and only its record waits.
            self._hide(lease_id)
            await afailpoint("lease.delete")
            await self._write(lease_id, None)

    @contextlib.asynccontextmanager
    async def held(self, resources: Iterable[tuple[str, str]], *, purpose: str) -> AsyncIterator[str]:
        """See LeaseManager."""
        lease_id = await self.hold(resources, purpose=purpose)
        try:
            yield lease_id
        finally:
            try:
                await to_the_end(self.release(lease_id))
            except (ImgsvcError, OSError) as error:  # it is over; its record goes some time after the next start
                log.warning("the record of the lease for %s could not be dropped: %s", purpose, error)

    def leases(self) -> list[Lease]:
        """See LeaseManager."""
        return list(self._leases.values())

    def holders(self, node: Node) -> list[str]:
        """See LeaseManager."""
        return sorted(self._holders.get(node, ()))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """See LeaseManager."""
        if self._named is not None:
            raise FailedPrecondition("a collection is running already")
        self._named = set()
        try:
            yield
        finally:
            self._named = None

    @contextlib.asynccontextmanager
    async def removal(self, nodes: Sequence[Node]) -> AsyncIterator[list[Node]]:
        """See LeaseManager."""
        named = self._named or ()
        free = [node for node in nodes if node not in self._holders and node not in named]
        self._removing.update(free)
        try:
            yield free
        finally:
            self._removing.difference_update(free)
            async with self._changed:
                self._changed.notify_all()

    async def expire(self) -> list[str]:
        """Drop what has expired; returns the IDs. Raises: ResourceExhausted."""
        now = self._clock()
        expired = [lease.id for lease in self._leases.values() if lease.expires_at is not None and lease.expires_at <= now]
        for lease_id in expired:
            await afailpoint("lease.expire")
            await self.release(lease_id)
        return expired

    async def expire_forever(self, on_expired: Callable[[], None]) -> None:
        """Expire leases when they are due and say so. Runs until cancelled; a failing disk is tried again."""
        while True:
            try:
                if await self.expire():
                    on_expired()
            except (ImgsvcError, OSError) as error:
                log.warning("expired leases could not be dropped, trying again: %s", error)
                await asyncio.sleep(_RETRY)
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with time_limit(self._until_next()):
                        await self._changed.wait()

    def _until_next(self) -> float:
        """Seconds until something expires, or until the clock is worth another look."""
        now = self._clock()
        waits = [(lease.expires_at - now).total_seconds() for lease in self._leases.values() if lease.expires_at is not None]
        return max(0.0, min([_LONGEST_SLEEP, *waits]))

    async def _enter(self, lease: Lease) -> None:
        """Make `lease` count at once, wait for removals that have begun, then make it durable."""
        old = self._leases.get(lease.id)
        self._show(lease)
        try:
            async with self._changed:
                self._changed.notify_all()
                await self._changed.wait_for(lambda: self._removing.isdisjoint(lease.resources))
            await self._write(lease.id, lease)
        except BaseException as error:
            self._hide(lease.id)
            if old is not None:
                self._show(old)
            if isinstance(error, asyncio.CancelledError):
                # A write goes on to its end after its caller has left.
                with contextlib.suppress(ImgsvcError):  # the next start finds a lease that ends soon
                    await to_the_end(self._write(lease.id, old))
            raise

    async def _write(self, lease_id: str, lease: Lease | None) -> None:
        """Make the record say what is; None: that there is none."""
        if lease is None:
            await self._db.awrite(lambda txn: txn.delete(TABLE, lease_id))
        else:
            await self._db.awrite(lambda txn: txn.put(TABLE, lease_id, _encode(lease)))

    def _get(self, lease_id: str) -> Lease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise NotFound(f'no lease "{printable(lease_id, 80)}"')
        return lease

    def _show(self, lease: Lease) -> None:
        self._hide(lease.id)
        self._leases[lease.id] = lease
        for node in lease.resources:
            self._holders.setdefault(node, set()).add(lease.id)
        if self._named is not None:
            self._named.update(lease.resources)

    def _hide(self, lease_id: str) -> None:
        lease = self._leases.pop(lease_id, None)
        for node in lease.resources if lease else ():
            holders = self._holders[node]
            holders.discard(lease_id)
            if not holders:
                del self._holders[node]


def as_lease_manager(book: LeaseBook) -> LeaseManager:
    """Lets mypy prove that the contract is met."""
    return book


def _encode(lease: Lease) -> Record:
    return {
        "created": lease.created_at.isoformat(),
        "expires": lease.expires_at.isoformat() if lease.expires_at else None,
        "permanent": lease.permanent,
        "purpose": lease.purpose,
        "resources": sorted(lease.resources),
    }


def _decode(lease_id: str, record: Record) -> Lease:
    return Lease(
        id=lease_id,
        resources=frozenset(Node(kind, name) for kind, name in record["resources"]),
        created_at=datetime.fromisoformat(record["created"]),
        expires_at=datetime.fromisoformat(record["expires"]) if record["expires"] else None,
        permanent=record["permanent"],
        purpose=record["purpose"],
    )
