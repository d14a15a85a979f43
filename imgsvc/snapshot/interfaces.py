"""Contracts of snapshots and of unpacking. Snapshotter calls block; Unpacker calls are asynchronous.

Source: containerd core/snapshots for the vocabulary (key, name, prepare, commit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, NewType, Protocol, runtime_checkable

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.oci import Digest

Key = NewType("Key", str)  # an active snapshot or a view: work in progress, a container's root
Name = NewType("Name", str)  # a committed snapshot: for image layers the chain ID


class Kind(StrEnum):
    """What a snapshot is."""

    VIEW = "view"
    ACTIVE = "active"
    COMMITTED = "committed"


COUNT: Final = 8  # [bytes] of a count between daemon and worker; no other message of a worker is that short


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount(2). options as in /etc/fstab, e.g. ("ro", "lowerdir=…")."""

    type: str
    source: str
    options: tuple[str, ...] = ()

    def value(self, option: str) -> str:
        """The value set as `option=value`; "" when not set."""
        return next((o.removeprefix(option + "=") for o in self.options if o.startswith(option + "=")), "")


@dataclass(frozen=True, slots=True)
class IDMapping:
    """Owners inside a user namespace, as (first inside, first on the host, count) each."""

    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]


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

    @property
    def idmapped(self) -> bool:
        """Snapshots can be mounted with owners shifted; else a user namespace needs prepare(mapping=…), which copies."""

    def stat(self, key_or_name: str) -> SnapshotInfo | None:
        """The record, or None; None also for a committed snapshot whose files are lost (ScrubbableLayers.check)."""

    def usage(self, key_or_name: str) -> Usage:
        """Disk use; recorded for committed snapshots, measured for active ones. Raises: NotFound."""

    def total_usage(self) -> Usage:
        """Disk use of all committed snapshots together, kept as a running total: no walking."""

    def mounts(self, key: Key, *, parent: Name | None = None) -> list[Mount]:
        """How to mount an active snapshot or view. Raises: NotFound.

        Args:     parent: only where `parallel` and for a key prepared without one: show it on top of that.
        """

    def stacked(self, own: Sequence[Mount], below: Sequence[Mount]) -> list[Mount]:
        """How to mount an active snapshot on top of another one that is not committed yet. Pure; only where `parallel`.

        Args:     own: of the snapshot, prepared without a parent. below: of the other one, with all it stands on.
        """

    def prepare(
        self, key: Key, parent: Name | None, labels: Mapping[str, str] | None = None, *, mapping: IDMapping | None = None
    ) -> list[Mount]:
        """Start a writable snapshot on a committed parent. Raises: AlreadyExists, NotFound (parent).

        Args:     mapping: show the parent's files with owners shifted for a user namespace; by idmapped mounts where this
                  kernel has them, else by a copy.
        """

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
        A `name` whose files are lost is replaced, and what stands on it stands on the new one.
        Durability: the layer's files must be on disk before this is called (see sync); the record is, on return.
        Raises:   AlreadyExists (name; the key stays), NotFound, FailedPrecondition (not active).
        """

    def sync(self, keys: Sequence[Key]) -> None:
        """Put the contents of active snapshots on disk, with one call where the file system allows."""

    def remove(self, *keys_or_names: str) -> None:
        """Forget at once, delete in the background; several in one commit, children before their parents. Absent is a success.

        Raises: FailedPrecondition (one has children: then all stay).
        """

    def update(self, key_or_name: str, labels: Mapping[str, str | None]) -> SnapshotInfo:
        """Merge labels; None removes one. Raises: NotFound."""

    def walk(self) -> Iterator[SnapshotInfo]:
        """Every snapshot."""

    def cleanup(self) -> int:
        """Delete directories without a record and records without a directory; returns how many. Run at start."""

    def close(self) -> None:
        """Wait for background removal and release what is held."""


@runtime_checkable
class StreamSnapshotter(Snapshotter, Protocol):
    """A Snapshotter that keeps a layer as the tar stream it came as: unpacking writes two files and creates no other."""

    def prepare_stream(self, key: Key) -> list[Mount]:
        """Start a snapshot that is written as a stream: one Mount of type STREAM for Unpacker.start, `rebase` set.

        It cannot be mounted before it is committed. Raises: AlreadyExists.
        """

    def stream(self, name: Name) -> int:
        """A readable descriptor of a committed snapshot's own tar stream, which the caller closes. Raises: NotFound."""

    def seal(self, name: Name) -> None:
        """Make what mounting a committed snapshot with all below it takes, unless it is there; prepare and view do so, too.

        Durability: survives power loss on return. Raises: NotFound; BadLayer where a layer does not fit on those below.
        """


STREAM: Final = "tar"  # type of a Mount that is a file to write a tar stream to, with option index=FILE


class LayerFault(StrEnum):
    """What can be wrong with a committed snapshot, seen from outside. Its contents are compared by difference()."""

    MISSING = "its directory is missing"
    EMPTY = "its directory is empty"
    CHANGED = "its file has another size than it was committed with"
    UNREADABLE = "its directory cannot be read"


class ScrubbableLayers(Protocol):
    """Looking after what lies on disk; a snapshotter that keeps its layers somewhere else has none of this."""

    @property
    def name(self) -> str:
        """As Snapshotter."""

    def walk(self) -> Iterator[SnapshotInfo]:
        """As Snapshotter."""

    def check(self, name: Name) -> LayerFault | None:
        """Whether a committed snapshot's files are there. Cheap. None also for what is no committed snapshot."""

    def strays(self) -> list[str]:
        """Directories without a record."""

    def discard_stray(self, directory: str) -> None:
        """Delete one of them. Absent is a success."""

    def forget(self, name: Name) -> list[Name]:
        """Remove a committed snapshot and those on top of it, which are worth nothing without it; those removed.

        Raises: FailedPrecondition when one of them is in use by an active snapshot or a view; then all stay.
        """

    def difference(self, name: Name, key: Key, cancel: CancelToken) -> str:
        """How a committed snapshot differs from an active one, in words; "" when equal. Blocking: reads both."""


class ScrubbableSnapshotter(Snapshotter, ScrubbableLayers, Protocol):
    """A snapshotter that can be checked."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one layer. All may be 0 for "no bound"."""

    unpacked_bytes: int
    entries: int
    ratio: int  # unpacked / compressed, judged once more than 64 MiB came out


@dataclass(frozen=True, slots=True, repr=False)
class LayerInput:
    """What a worker needs to unpack one layer.

    media_type: of the layer once decrypted. The bytes decide about compression; a type that contradicts them is an error.
    digest: of the blob, for error texts. diff_id: expected digest of the uncompressed tar.
    source: readable descriptor of the (maybe still growing) blob file, or of a pipe when a stream processor feeds it;
        duplicated by start(), the caller keeps its own.
    size: total bytes of the blob file; ignored for pipes, which are read to their end.
    secret: opaque bytes for the worker's transform; they travel by socket, never by argument or environment.
    """

    media_type: str
    digest: Digest
    diff_id: Digest
    source: int
    size: int
    secret: bytes | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a layer. unpacked [bytes of tar]; timings [seconds]: "waited" for bytes, "unpacked".

    usage: as laid on disk, or None where the snapshotter has to measure (commit does when it gets None).
    warnings: what was left out of the layer, by reason [count]. peak_memory: of the worker [bytes, resident].
    """

    diff_id: Digest
    unpacked: int
    entries: int
    usage: Usage | None
    timings: Mapping[str, float] = field(default_factory=dict)
    warnings: Mapping[str, int] = field(default_factory=dict)
    peak_memory: int = 0


class UnpackJob(Protocol):
    """One layer being unpacked by a worker process into one active snapshot."""

    def advance(self, available: int) -> None:
        """Bytes [0, available) of the source can be read now. Never blocks; not needed for pipes."""

    async def finish(self, progress: Callable[[int], None] = ...) -> Applied:
        """Wait for the worker's verdict; may be called at once, so that a bad layer ends its download. The snapshot is not
        committed here. A file's bytes must all be announced by advance(size), before or meanwhile. progress: called from time to time with the number of processed bytes.

        Raises: DataLoss (diff ID differs, broken stream), InvalidArgument (hostile entry), ResourceExhausted (limit or
        disk). The worker is gone in every case; on an error the caller removes the snapshot.
        """

    async def settle(self, mounts: Sequence[Mount]) -> Usage | None:
        """Complete a layer with what only works once its parents are there: after finish, in layer order, before commit.

        Directories the layer did not carry get their parent's metadata, links to files of lower layers are made, marks
        that hide nothing go. Nothing to do for jobs without rebase. A layer that cannot be completed this way is
        unpacked once more on its mounted parents, from the source.

        Args:     mounts: of the snapshot on its real parents: snapshotter.stacked or snapshotter.mounts(key, parent=…).
        Returns:  usage to give to commit.
        Raises:   as finish; Aborted when the layer has to be unpacked again but came through a pipe: then prepare it on
                  its parent and start it with rebase=False.
        """

    async def abort(self) -> None:
        """Kill the worker, wait until it is gone, and forget the layer. Idempotent; the caller removes the snapshot."""


class Unpacker(Protocol):
    """Starts jobs; bounds how many run at once (max_concurrent_unpacks)."""

    async def start(self, layer: LayerInput, mounts: Sequence[Mount], *, rebase: bool) -> UnpackJob:
        """Wait for a slot, then start unpacking `layer` into the active snapshot that `mounts` describes.

        Args:     rebase: the snapshot was prepared without its parent (snapshotter.parallel) and settle() will follow;
                  else `mounts` show the parent's files already, and the layer is applied to them.
        """

    def is_wanted(self) -> bool:
        """Whether a layer waits for a slot."""

    async def close(self) -> None:
        """Kill what runs and stop the worker server."""
