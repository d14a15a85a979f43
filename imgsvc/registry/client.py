"""The registry client as the use cases see it: shared state of the node on one side, one operation's session on the other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import httpx

from imgsvc.base.concurrency import SingleFlight, in_thread
from imgsvc.base.errors import ResourceExhausted
from imgsvc.base.oci import Descriptor
from imgsvc.base.reference import Reference
from imgsvc.registry.auth.authorizer import Authorizer
from imgsvc.registry.documents import ACCEPT_HEADER, MANIFESTS, read_document, verify
from imgsvc.registry.download import ConnectionBudget, Download, Pace, Source
from imgsvc.registry.endpoint import Ask, CredentialSource, Endpoint, NoCredentials, RememberedCredentials, Session
from imgsvc.registry.failover import HealthBook
from imgsvc.registry.hosts.hostdirs import HostDirectories
from imgsvc.registry.hosts.hosts import FROM_NOBODY, Capability, Host, HostsConfig
from imgsvc.registry.http.exchange import RequestFailed, Timeouts
from imgsvc.registry.http.sender import Sender
from imgsvc.registry.http.transport import Transport
from imgsvc.registry.interfaces import BlobSink, BlobSource, Credential, Fetcher, Registry, RegistryObserver, Repository, Resolved
from imgsvc.registry.observers import LoggingObserver
from imgsvc.registry.operation import Operation
from imgsvc.registry.push import RemoteRepository
from imgsvc.registry.resolver import resolve_at
from imgsvc.registry.retry import Failure
from imgsvc.registry.slots import FairSlots


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """The client's settings.

    roots: directories of config_path, in order.  inline: configurations from legacy `registry.mirrors`, by namespace or "*".
    max_downloads, max_downloads_per_image: blobs fetched at once.  max_extra_connections: for parallel ranges, per node.
    foreign_layer_hosts: names from which `urls` of layer descriptors are fetched, without credentials; none by default.
    environ: where proxies are read from.
    """

    roots: tuple[str, ...] = ()
    inline: Mapping[str, HostsConfig] = field(default_factory=dict)
    timeouts: Timeouts = field(default_factory=Timeouts)
    pace: Pace = field(default_factory=Pace)
    max_downloads: int = 6
    max_downloads_per_image: int = 3
    max_extra_connections: int = 24
    foreign_layer_hosts: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


class RegistryClient:
    """Implements Registry. Belongs to one event loop; close() it there."""

    def __init__(
        self,
        settings: RegistrySettings,
        credentials: CredentialSource | None = None,
        observer: RegistryObserver | None = None,
        bulk: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """bulk: fetches blobs; None: this process does. The caller closes it."""
        self._settings = settings
        self.observer = observer or LoggingObserver()
        self._stored = credentials or NoCredentials()
        self.directories = HostDirectories(settings.roots, settings.inline)
        self._sender = Sender(Transport(), settings.timeouts)
        self._bulk = Sender(bulk, settings.timeouts) if bulk else self._sender
        self._authorizer = Authorizer(self._sender, settings.environ, self.observer)
        self.book = HealthBook(self.observer)
        self.slots = FairSlots(settings.max_downloads, settings.max_downloads_per_image)
        self.extra = ConnectionBudget(settings.max_extra_connections)
        self._downgraded: dict[str, None] = {}
        self._resolving: SingleFlight[Resolved] = SingleFlight()

    def reload(self, settings: RegistrySettings, credentials: CredentialSource) -> None:
        """Go by these from the next operation on; what runs goes on as it began."""
        self._settings = settings
        self._stored = credentials
        self.directories = HostDirectories(settings.roots, settings.inline)
        self._sender.timeouts = self._bulk.timeouts = settings.timeouts
        self.slots.resize(settings.max_downloads, settings.max_downloads_per_image)
        self.extra.resize(settings.max_extra_connections)

    @property
    def pace(self) -> Pace:
        """The slowest connection tolerated."""
        return self._settings.pace

    @property
    def foreign_layer_hosts(self) -> tuple[str, ...]:
        """Hosts whose layer URLs are followed."""
        return self._settings.foreign_layer_hosts

    async def resolve(self, reference: Reference, credential: Credential | None = None) -> Resolved:
        """As Registry.resolve. Callers with one reference and one identity share a round trip."""
        key = f"{reference}\0{self._authorizer.identity(credential)}"
        return await self._resolving.run(key, lambda: self._resolve(reference, credential))

    async def _resolve(self, reference: Reference, credential: Credential | None) -> Resolved:
        operation = await self.operation(reference, credential)
        resolved = await operation.run(
            Capability.PULL if reference.digest else Capability.RESOLVE,
            lambda endpoint: resolve_at(endpoint, reference, self.book),
            f"{reference} not resolved",
            str(reference.digest or ""),
        )
        return replace(resolved, attempts=tuple(operation.session.attempts))

    def fetcher(self, reference: Reference, credential: Credential | None = None) -> Fetcher:
        """As Registry.fetcher."""
        return RepositoryFetcher(self, reference, credential)

    def repository(self, reference: Reference, credential: Credential | None = None) -> Repository:
        """As Registry.repository."""
        return RemoteRepository(self, reference, credential)

    async def operation(self, reference: Reference, credential: Credential | None) -> Operation:
        """A new session for the reference's repository, with its configuration as the files are now."""
        config = await in_thread(self.directories.lookup, reference.host, reference.repository)
        session = Session(
            namespace=reference.host,
            repository=reference.repository,
            directories=config.directories,
            caller=credential,
            sender=self._sender,
            bulk=self._bulk,
            authorizer=self._authorizer,
            stored=RememberedCredentials(self._stored),
            environ=self._settings.environ,
            downgraded=self._downgraded,
            observer=self.observer,
        )
        return Operation(config, session, self.book)

    async def close(self) -> None:
        """Close connections."""
        await self._sender.close()


class RepositoryFetcher:
    """Implements Fetcher for one repository and one credential."""

    def __init__(self, client: RegistryClient, reference: Reference, credential: Credential | None) -> None:
        self._client = client
        self._reference = reference
        self._credential = credential
        self._first: asyncio.Task[Operation] | None = None
        self._begun: list[Operation] = []

    @property
    def took_credentials(self) -> bool:
        """As Fetcher.took_credentials."""
        return any(attempt.credential.taken for operation in self._begun for attempt in operation.session.attempts)

    async def _operation(self) -> Operation:
        """All requests of one pull go by the files as they were at its start; helpers are asked once."""
        if self._first is None or (self._first.done() and (self._first.cancelled() or self._first.exception())):
            self._first = asyncio.ensure_future(self._client.operation(self._reference, self._credential))
        operation = (await asyncio.shield(self._first)).again()
        self._begun.append(operation)
        return operation

    async def document(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """As Fetcher.document."""
        if descriptor.data is not None:
            return descriptor.data
        if descriptor.size > limit:
            raise ResourceExhausted(
                f"{descriptor.digest} has {descriptor.size} bytes; at most {limit} are accepted", where=self._reference.name
            )
        operation = await self._operation()
        return await operation.run(
            Capability.PULL,
            lambda endpoint: self._document_at(endpoint, descriptor),
            f"{descriptor.digest} not fetched",
            descriptor.digest,
        )

    async def _document_at(self, endpoint: Endpoint, descriptor: Descriptor) -> bytes:
        kind = "manifests" if descriptor.media_type in MANIFESTS else "blobs"
        accept = ("Accept", descriptor.media_type) if kind == "manifests" else ACCEPT_HEADER
        ask = Ask("GET", endpoint.path(f"{kind}/{descriptor.digest}"), "fetch", scopes=(endpoint.scope(),), headers=(accept,))
        try:
            async with aclosing(await endpoint.ask(ask)) as response:
                body = await read_document(response, descriptor.size)
                verify(response, body, descriptor)
        except RequestFailed as error:
            if error.failure is Failure.LIED:
                self._client.book.of(endpoint).quarantine(descriptor.digest)
            raise
        return body

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        """As Fetcher.download."""
        missing = sum(length for _, length in sink.missing())
        reused = descriptor.size - missing
        if not missing:
            return BlobSource(reused=reused)
        operation = await self._operation()
        endpoints = operation.endpoints(Capability.PULL, descriptor.digest)
        queued = time.monotonic()
        run = Download(
            descriptor,
            self._sources(descriptor, operation, endpoints),
            sink,
            failover=operation.failover(endpoints),
            book=self._client.book,
            pace=self._client.pace,
            extra=self._client.extra,
        )
        async with self._client.slots.slot(self._reference.host, str(self._reference), lambda: run.received):
            self._client.observer.queued(time.monotonic() - queued)
            await run.run()
        return BlobSource(dict(run.by_endpoint), reused, tuple(operation.session.attempts))

    def _sources(self, descriptor: Descriptor, operation: Operation, endpoints: list[Endpoint]) -> list[Source]:
        """The registry's hosts, and before them the layer's own URLs where the administrator allows their host."""
        foreign = []
        for url in descriptor.urls:
            try:
                parts = urlsplit(url)
            except ValueError:
                continue
            if parts.scheme in ("http", "https") and parts.netloc in self._client.foreign_layer_hosts:
                origin = f"{parts.scheme}://{parts.netloc}"
                host = Host(origin, "urls of the layer", frozenset({Capability.PULL}), credentials=FROM_NOBODY, sends_ns=False)
                foreign.append(Source(Endpoint(host, operation.session), url))
        return [*foreign, *(Source(endpoint, endpoint.path(f"blobs/{descriptor.digest}")) for endpoint in endpoints)]

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        """As Fetcher.rejected."""
        operation = await self._operation()
        endpoints = operation.endpoints(Capability.PULL)
        for endpoint in endpoints:
            if endpoint.base in source.by_endpoint:
                self._client.book.of(endpoint).quarantine(descriptor.digest)
        return not all(operation.lied(endpoint, descriptor.digest) for endpoint in endpoints)


def registry(settings: RegistrySettings, credentials: CredentialSource | None = None) -> Registry:
    """The client behind its interface."""
    return RegistryClient(settings, credentials)
