"""Contracts of snapshots and of unpacking. Snapshotter calls block; Unpacker calls are asynchronous.

Source: containerd core/snapshots for the vocabulary (key, name, prepare, commit).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NewType, Protocol

from imgsvc.oci import Digest

Key = NewType("Key", str)  # an active snapshot or a view: work in progress, a container's root
Name = NewType("Name", str)  # a committed snapshot: for image layers the chain ID


class Kind(StrEnum):
    """What a snapshot is."""

    VIEW = "view"
    ACTIVE = "active"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount(2). options as in /etc/fstab, e.g. ("ro", "lowerdir=…")."""

    type: str
    source: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk use of one snapshot without its parents. size [bytes allocated], inodes [count]."""

    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot's record. `id` is a key or a name, by kind; times are UTC."""

    id: str
    kind: Kind
    parent: Name | None
    created_at: datetime
    updated_at: datetime
    labels: Mapping[str, str] = field(default_factory=dict)


class Snapshotter(Protocol):
    """Layered file systems. Keys and names share one namespace per snapshotter."""

    @property
    def name(self) -> str:
        """Driver name, e.g. "overlayfs"; also the directory under ROOT/snapshots."""

    @property
    def parallel(self) -> bool:
        """Layers may be unpacked without their parents: prepare(key, None), then commit(…, parent=…) ("rebase")."""

    def stat(self, key_or_name: str) -> SnapshotInfo | None:
        """The record, or None."""

    def usage(self, key_or_name: str) -> Usage:
        """Disk use; recorded for committed snapshots, measured for active ones. Raises: NotFound."""

    def mounts(self, key: Key) -> list[Mount]:
        """How to mount an active snapshot or view. Raises: NotFound."""

    def prepare(self, key: Key, parent: Name | None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Start a writable snapshot on a committed parent. Raises: AlreadyExists, NotFound (parent)."""

    def view(self, key: Key, parent: Name | None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """As prepare, read-only."""

    def commit(
        self,
        name: Name,
        key: Key,
        *,
        parent: Name | None = None,
        usage: Usage | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Turn active `key` into committed `name`; becoming visible is the last, atomic step.

        Args:     parent: new parent for a key prepared without one (only where `parallel`). usage: known disk use.
        Durability: the layer's files must be on disk before this is called (see sync); the record is, on return.
        Raises:   AlreadyExists (name; the key stays), NotFound, FailedPrecondition (not active).
        """

    def sync(self, keys: Sequence[Key]) -> None:
        """Put the contents of active snapshots on disk, in one go where the file system allows."""

    def remove(self, key_or_name: str) -> None:
        """Forget at once, delete in the background. Absent is a success. Raises: FailedPrecondition (has children)."""

    def update(self, key_or_name: str, labels: Mapping[str, str | None]) -> SnapshotInfo:
        """Merge labels; None removes one. Raises: NotFound."""

    def walk(self) -> Iterator[SnapshotInfo]:
        """Every snapshot."""

    def cleanup(self) -> int:
        """Delete directories without a record and records without a directory; returns how many. Run at start."""

    def close(self) -> None:
        """Wait for background removal and release what is held."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one layer. All may be 0 for "no bound"."""

    unpacked_bytes: int
    entries: int
    ratio: int  # unpacked / compressed, judged once more than 64 MiB came out


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What a worker needs to unpack one layer.

    media_type: of the bytes in `source` after `stages`, plain or gzip or zstd; unknown gzip is sniffed.
    source: readable descriptor of the (maybe still growing) blob file, or of a pipe when a stream processor feeds it.
    size: total bytes of the blob. diff_id: expected digest of the uncompressed tar.
    secret: opaque bytes for the built-in decryption stage, handed to the worker by pipe, never by argument.
    """

    media_type: str
    digest: Digest
    diff_id: Digest
    source: int
    size: int
    secret: bytes | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a layer. unpacked [bytes of tar]; usage as laid on disk; timings [seconds] by phase."""

    diff_id: Digest
    unpacked: int
    entries: int
    usage: Usage
    timings: Mapping[str, float] = field(default_factory=dict)


class UnpackJob(Protocol):
    """One layer being unpacked by a worker process into one active snapshot."""

    def advance(self, available: int) -> None:
        """Bytes [0, available) of the source can be read now. Never blocks; not needed for pipes."""

    async def finish(self) -> Applied:
        """All bytes are there; wait for the worker. Raises: DataLoss (diff ID differs, broken stream),
        InvalidArgument (hostile entry), ResourceExhausted (limit or disk). The snapshot is not committed here.
        """

    async def abort(self) -> None:
        """Kill the worker. Idempotent; the caller removes the snapshot."""


class Unpacker(Protocol):
    """Starts jobs; bounds how many run at once (max_concurrent_unpacks)."""

    async def start(self, layer: LayerInput, mounts: Sequence[Mount]) -> UnpackJob:
        """Wait for a slot, then start unpacking `layer` into the active snapshot that `mounts` describes."""

    async def settle(self, mounts: Sequence[Mount], job: UnpackJob) -> Usage:
        """After the parent is committed: give directories the layer did not carry their parent's metadata, make hard
        links into lower layers. `mounts` are those of the snapshot on its real parent. Returns the usage afterwards.
        """

    async def close(self) -> None:
        """Stop idle workers."""
