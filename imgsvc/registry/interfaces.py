"""Contracts of the registry client. All calls are asynchronous and belong to the event loop's thread.

Source: OCI distribution-spec 1.1; containerd docs/hosts.md for mirror semantics.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.oci import Descriptor, Digest
from imgsvc.base.reference import Reference

_SALT: Final = secrets.token_bytes(16)


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """One secret with where it came from. `source` is a name fit for logs ("CRI request", "file:line"), never a value.

    host: the registry namespace it is bound to; "" means the namespace of the image being pulled.
    """

    source: str
    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""
    host: str = ""

    def __repr__(self) -> str:
        return f"Credential(source={self.source!r})"


def identity(credential: Credential | None) -> str:
    """A name for a credential that says nothing about it and differs between any two; "" for none. Good for this process."""
    if credential is None:
        return ""
    parts = (credential.username, credential.password, credential.identity_token, credential.registry_token, credential.host)
    return hashlib.sha256(_SALT + "\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


class CredentialKind(Enum):
    """What a request carried that not every client has."""

    NONE = "none"
    WITHHELD = "withheld"  # a credential exists, and was not sent
    GIVEN = "given"  # by the caller
    STORED = "stored"  # on this node
    CONFIGURED = "configured"  # headers or a client certificate of hosts.toml


@dataclass(frozen=True, slots=True)
class CredentialUse:
    """Which credential went with a request. source: a name fit for logs; reason: why there is none, or why it was withheld."""

    kind: CredentialKind = CredentialKind.NONE
    source: str = ""
    reason: str = ""

    @property
    def taken(self) -> bool:
        """Whether the answer may be one that a client without credentials would not get."""
        return self.kind not in (CredentialKind.NONE, CredentialKind.WITHHELD)

    def __str__(self) -> str:
        if self.taken:
            return self.source
        if self.kind is CredentialKind.WITHHELD:
            return f"withheld: {self.reason}"
        return f"none ({self.reason})" if self.reason else "none"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One thing asked of one endpoint, for errors, logs and `pull --timings`. elapsed [seconds]; status 0: no answer."""

    endpoint: str
    phase: str  # "connect", "tls", "auth", "resolve", "fetch"
    status: int
    elapsed: float
    credential: CredentialUse
    error: str = ""


class PullFailed(ImgsvcError):
    """Every endpoint failed. `code` is that of the most telling attempt, not of the last one.

    The same failure has the same text, so that clients can tell a repetition (the kubelet merges such events): no times and
    counts, and no list of attempts when it would say only what `what` says about `where`.
    """

    def __init__(self, what: str, attempts: Sequence[Attempt], code: str, *, retryable: bool, where: str = "", hint: str = "") -> None:
        tried = list(dict.fromkeys(map(_told, attempts)))
        is_said = len(tried) == 1 and attempts[0].error in what and where.startswith(attempts[0].endpoint)
        super().__init__(what if is_said or not tried else f"{what} (tried: {' | '.join(tried)})", where=where, hint=hint)
        self.attempts = tuple(attempts)
        self.reason = "RegistryUnavailable" if code == "UNAVAILABLE" else ""
        self.code = code  # type: ignore[misc]  # an instance may narrow the class's category
        self.retryable = retryable  # type: ignore[misc]  # likewise


def _told(attempt: Attempt) -> str:
    told = f"{attempt.endpoint} [{attempt.phase}] {attempt.status or 'no answer'}, credential {attempt.credential}"
    return f"{told}: {attempt.error}" if attempt.error else told


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference resolves to. endpoint: URL base that answered; document: the manifest or index if it came along."""

    descriptor: Descriptor
    endpoint: str
    document: bytes | None = None
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, slots=True)
class BlobSource:
    """Who served a blob: bytes by endpoint. `reused`: bytes that were already there from an earlier try."""

    by_endpoint: dict[str, int] = field(default_factory=dict)
    reused: int = 0
    attempts: tuple[Attempt, ...] = ()


class BlobSink(Protocol):
    """Where a download puts its bytes. One task per range calls write_at; ranges never overlap."""

    def missing(self) -> list[tuple[int, int]]:
        """What is still to be fetched, as (offset, length)."""

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Store bytes at their place; they are the caller's again on return. An error stops the download."""


class Fetcher(Protocol):
    """Downloads from the endpoints configured for one repository, with one credential identity."""

    @property
    def took_credentials(self) -> bool:
        """Whether any request so far carried credentials."""

    async def document(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """A small blob or manifest in memory, digest and size verified. Raises: PullFailed, DataLoss, ResourceExhausted."""

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        """Fetch what the sink misses, in parallel ranges where that helps, resuming over failures and across hosts.

        The caller verifies the digest when it commits; one byte more than descriptor.size is an error here.
        Raises: PullFailed, DataLoss. What was written stays in the sink for the next try.
        """

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        """The digest of a downloaded blob was wrong: the endpoints that served it are asked for it last from now on.

        Returns:  whether another endpoint can be asked: then download again.
        """


class RegistryObserver(Protocol):
    """Receives what a client does beyond its answers; must not block. Labels are few: phases of Attempt, kinds of failures."""

    def queued(self, seconds: float) -> None:
        """A download waited that long for its slot."""

    def token(self, outcome: str, seconds: float) -> None:
        """A token was asked for: "ok", or the error's code."""

    def failed(self, phase: str, failure: str) -> None:
        """A request, or the body of its answer, failed; failure: a value of retry.Failure."""

    def decided(self, failure: str, action: str) -> None:
        """What follows from a failure; action: a value of retry.Action."""

    def warned(self, namespace: str, repository: str, endpoint: str, text: str) -> None:
        """An answer about the repository carried a warning for people; `text` has no control characters and no secrets."""


class BlobReader(Protocol):
    """Where an upload takes its bytes from."""

    async def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; b"" at the end."""


class Repository(Protocol):
    """Everything but pulling, for one repository with one credential. Raises: PullFailed, and NotFound where said.

    Writes go to the first configured host with the capability `push`, like containerd's.
    """

    async def has_blob(self, digest: Digest) -> bool:
        """Whether the registry we would push to has it."""

    async def push_blob(self, descriptor: Descriptor, reader: BlobReader, *, mount_from: str = "", chunk_size: int = 0) -> bool:
        """Upload unless it is there. Returns whether bytes were sent.

        mount_from: a repository of the same registry to take it from.  chunk_size [bytes]: upload in pieces that can be
        resumed, 0 in one request.
        """

    async def push_manifest(self, data: bytes, media_type: str, target: str) -> Descriptor:
        """Put a manifest or index under a tag or its digest."""

    async def tags(self) -> list[str]:
        """All tags, as the registry sorts them."""

    async def referrers(self, digest: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Manifests whose subject is `digest`; from the tag schema where the registry has no referrers API."""

    async def delete(self, target: str) -> None:
        """Remove a manifest by digest, or a tag. Raises: PullFailed with NOT_FOUND or UNIMPLEMENTED as the case may be."""

    async def delete_blob(self, digest: Digest) -> None:
        """Remove a blob."""


class Registry(Protocol):
    """The client as the use cases see it."""

    async def resolve(self, reference: Reference, credential: Credential | None = None) -> Resolved:
        """Tag or digest to descriptor; always a round trip, so that credentials are really checked (KEP-2535)."""

    def fetcher(self, reference: Reference, credential: Credential | None = None) -> Fetcher:
        """For the repository of `reference`. No I/O."""

    def repository(self, reference: Reference, credential: Credential | None = None) -> Repository:
        """Push, list and delete in the repository of `reference`. No I/O."""

    async def close(self) -> None:
        """Close connections."""
