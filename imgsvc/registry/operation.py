"""One operation on one repository: its configuration, its session, and the endpoints that may be asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from imgsvc.base.reference import Reference
from imgsvc.registry.endpoint import Endpoint, Session
from imgsvc.registry.failover import Failover, HealthBook
from imgsvc.registry.hosts.hosts import Capability, HostsConfig
from imgsvc.registry.interfaces import Credential

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation:
    """The endpoints of one namespace with one caller's session."""

    config: HostsConfig
    session: Session
    book: HealthBook

    def endpoints(self, capability: Capability, digest: str = "") -> list[Endpoint]:
        """Those that may be asked, in order; any that served wrong bytes for this digest come last, when no other has it."""
        found = [Endpoint(host, self.session) for host in self.config.able(capability)]
        return sorted(found, key=lambda endpoint: bool(digest) and self.lied(endpoint, digest))

    def lied(self, endpoint: Endpoint, digest: str) -> bool:
        """Whether it served other bytes under this digest."""
        return digest in self.book.of(endpoint).bad_digests

    def again(self) -> Operation:
        """The same configuration and credentials for the next request of the same pull, with attempts of its own."""
        return replace(self, session=replace(self.session, attempts=[]))

    def failover(self, endpoints: list[Endpoint]) -> Failover:
        """One host after another, attempts recorded in the session."""
        return Failover(endpoints, self.book, self.session.attempts)

    async def run(self, capability: Capability, action: Callable[[Endpoint], Awaitable[T]], what: str, digest: str = "") -> T:
        """The first success of `action` among the hosts that may be asked. Raises: PullFailed titled `what`."""
        return await self.failover(self.endpoints(capability, digest)).run(action, what)


class Operations(Protocol):
    """Starts operations."""

    async def operation(self, reference: Reference, credential: Credential | None) -> Operation:
        """A new session for the reference's repository, with its configuration as the files are now."""
