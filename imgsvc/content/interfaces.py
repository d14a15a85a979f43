"""Contracts of the content store. Everything here is blocking unless said; callers hop to a thread once, above.

Source: OCI image-spec descriptor.md; containerd core/content for the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.oci import Digest


@dataclass(frozen=True, slots=True)
class Info:
    """A blob that is complete and verified. size [bytes]; times are UTC."""

    digest: Digest
    size: int
    created_at: datetime
    updated_at: datetime
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IngestStatus:
    """An unfinished write. offset: bytes present from the start without a gap; total: expected [bytes] or None."""

    ingest_ref: str
    offset: int
    total: int | None
    expected: Digest | None
    started_at: datetime
    updated_at: datetime


class ContentReader(Protocol):
    """Random access to one blob. Reads never move a shared position, so several threads may use one reader."""

    @property
    def size(self) -> int:
        """Size of the blob [bytes]."""

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; b"" at the end. Raises: OutOfRange when offset is beyond the end."""

    def fileno(self) -> int:
        """A read-only file descriptor, owned by the reader (duplicate it before handing it away)."""

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Provider(Protocol):
    """Reading what is stored."""

    def info(self, digest: Digest) -> Info | None:
        """The blob's record, or None when it is not there or its file is missing, cut short or altered.

        So a broken blob is healed by fetching it again. Blocking: microseconds; as long as hashing the blob takes when
        its file was touched since it was stored.
        """

    def reader(self, digest: Digest) -> ContentReader:
        """Open a blob. Raises: NotFound; DataLoss when its file is missing, cut short or altered. Blocking: as info."""


class Writer(Protocol):
    """One unfinished blob, held exclusively by this object. Closing without commit keeps the ingest for a later resume."""

    @property
    def ingest_ref(self) -> str:
        """The name under which the write can be resumed."""

    def write(self, data: bytes | memoryview) -> None:
        """Append at the end of the gapless prefix. Raises: ResourceExhausted, DataLoss (more than the expected total)."""

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at their offset, in any order; used by parallel ranges. Raises: as write."""

    def missing(self) -> list[tuple[int, int]]:
        """Gaps still to be filled as (offset, length), in order. Needs a known total."""

    def status(self) -> IngestStatus:
        """Where the write stands."""

    def fileno(self) -> int:
        """Descriptor of the growing file, for readers that follow the write; owned by the writer."""

    def truncate(self, size: int) -> None:
        """Forget everything from `size` on. No other call may run on this writer meanwhile."""

    def commit(
        self, size: int | None, expected: Digest, labels: Mapping[str, str] | None = None, *, verified: Callable[[], None] = ...
    ) -> Info:
        """Publish the ingest as an immutable blob. Durability: survives power loss on return (sync = "full").

        Args:     size: expected total [bytes], None if unknown. expected: digest of the stored bytes.
                  verified: called once size and digest are right, before anything is durable.
        Returns:  Info. Content that exists already is a success. The writer is closed in every case.
        Raises:   DataLoss: size or digest differs. ResourceExhausted: disk full. The ingest and its space are gone then.
        """

    def close(self) -> None:
        """Release the ingest, keeping its bytes unless the disk failed. Waits for calls on other threads. Idempotent."""


class Ingester(Protocol):
    """Writing."""

    def writer(self, ingest_ref: str, *, total: int | None = None, expected: Digest | None = None) -> Writer:
        """Open or resume a write. Raises: Unavailable when another writer holds this ingest_ref."""


class IngestManager(Protocol):
    """Looking after unfinished writes."""

    def status(self, ingest_ref: str) -> IngestStatus | None:
        """One ingest, or None."""

    def list_statuses(self) -> list[IngestStatus]:
        """All ingests."""

    def abort(self, ingest_ref: str) -> None:
        """Drop an ingest and its bytes. Absent is a success. Raises: Unavailable when a writer holds it."""


class Manager(Protocol):
    """Looking after what is stored."""

    def walk(self) -> Iterator[Info]:
        """Every blob, in no particular order; blobs that come or go meanwhile may or may not be seen."""

    def update(self, digest: Digest, labels: Mapping[str, str | None]) -> Info:
        """Merge labels; None removes one. Raises: NotFound."""

    def delete(self, *digests: Digest) -> None:
        """Remove blobs, in one commit. Absent is a success. Durability: gone from the index before their bytes are."""


class Fault(StrEnum):
    """What can be wrong with a stored blob."""

    MISSING = "missing"
    EMPTY = "empty"
    SIZE = "wrong size"
    ALTERED = "altered"
    UNREADABLE = "unreadable"
    FOREIGN = "no regular file"
    STRAY = "without a record"


class Scrubbable(Protocol):
    """Comparing what is recorded with what is there, for fsck and for recovery after an unclean end."""

    def check(self, digest: Digest, *, deep: bool, cancel: CancelToken | None = None) -> Fault | None:
        """Examine one recorded blob; None when sound. deep: hash it whole, else only if its file was touched."""

    def strays(self) -> list[Digest]:
        """What has a blob's name but no record: left by a kill between renaming and recording. Raises: OSError."""

    def adopt(self, digest: Digest, cancel: CancelToken | None = None) -> bool:
        """Hash a stray: record it when it is what its name says (True), delete it otherwise (False).

        Raises: DataLoss when the disk cannot read it, and others of from_os_error; it is left alone then.
        """


class Store(Provider, Ingester, IngestManager, Manager, Protocol):
    """A whole content store."""


class ScrubbableStore(Store, Scrubbable, Protocol):
    """A whole content store that can be checked."""
