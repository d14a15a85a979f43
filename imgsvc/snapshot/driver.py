"""What the drivers share: records and directories kept in step. A driver adds how its snapshots are made and mounted.

Order of things, so that a crash leaves nothing half-made in sight: a record is written before its directory appears and
removed before the directory goes; cleanup() at start drops whichever is without the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from imgsvc.errors import FailedPrecondition, NotFound
from imgsvc.failpoints import failpoint
from imgsvc.metadb import MetaDB
from imgsvc.snapshot.directories import Directories, disk_usage
from imgsvc.snapshot.interfaces import Key, Kind, Mount, Name, SnapshotInfo, Usage
from imgsvc.snapshot.records import Records, Stored

_MEASURED_FOR: Final = 10.0  # seconds an active snapshot's measured usage is good for; CRI asks for all of them at a time


class DirectoryDriver:
    """Common half of a Snapshotter over numbered directories with their files in `fs`."""

    def __init__(self, name: str, root: Path, db: MetaDB, *, sync_remove: bool = False) -> None:
        self._name = name
        self._records = Records(db, name)
        self._directories = Directories(root)
        self._sync_remove = sync_remove
        self._measured: dict[str, tuple[float, Usage]] = {}

    @property
    def name(self) -> str:
        """Driver name."""
        return self._name

    def stat(self, key_or_name: str) -> SnapshotInfo | None:
        """See Snapshotter."""
        stored = self._records.get(key_or_name)
        return None if stored is None else stored.info

    def usage(self, key_or_name: str) -> Usage:
        """See Snapshotter."""
        stored = self._records.must_get(key_or_name)
        if stored.info.kind is Kind.COMMITTED:
            return stored.usage
        known = self._measured.get(key_or_name)
        if known is None or time.monotonic() - known[0] > _MEASURED_FOR:
            known = time.monotonic(), disk_usage(self._files(stored))
            self._measured[key_or_name] = known
        return known[1]

    def total_usage(self) -> Usage:
        """See Snapshotter."""
        return self._records.total()

    def commit(
        self,
        name: Name,
        key: Key,
        *,
        parent: Name | None = None,
        usage: Usage | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """See Snapshotter."""
        stored = self._records.must_get(key)
        if stored.info.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f'snapshot "{key}" is not active')
        self._records.commit(name, key, parent, usage or disk_usage(self._files(stored)), labels)
        self._measured.pop(key, None)

    def sync(self, keys: Sequence[Key]) -> None:
        """See Snapshotter: one syncfs serves them all."""
        if keys:
            self._directories.sync()

    def remove(self, key_or_name: str) -> None:
        """See Snapshotter."""
        stored = self._records.remove(key_or_name)
        if stored is not None:
            self._measured.pop(key_or_name, None)
            failpoint("snapshot.forgotten")
            self._directories.discard(stored.number)
            failpoint("snapshot.discarded")
            if self._sync_remove:
                self._directories.close()

    def update(self, key_or_name: str, labels: Mapping[str, str | None]) -> SnapshotInfo:
        """See Snapshotter."""
        return self._records.update(key_or_name, labels)

    def walk(self) -> Iterator[SnapshotInfo]:
        """See Snapshotter."""
        return (stored.info for stored in self._records.walk())

    def cleanup(self) -> int:
        """See Snapshotter."""
        present = self._directories.numbers()
        dropped = self._records.drop_broken(present)
        orphans = present - {stored.number for stored in self._records.walk()}
        for number in orphans:
            self._directories.discard(number)
        return dropped + len(orphans)

    def close(self) -> None:
        """See Snapshotter."""
        self._directories.close()

    def _files(self, stored: Stored) -> Path:
        return self._directories.path(stored.number) / "fs"

    def _parents(self, name: str | None) -> list[Path]:
        """Directories of a committed snapshot and its parents, nearest first. Raises: NotFound."""
        return [self._files(stored) for stored in self._records.chain(name)]

    def _active(self, key: str) -> Stored:
        stored = self._records.must_get(key)
        if stored.info.kind is Kind.COMMITTED:
            raise NotFound(f'snapshot "{key}" is committed; only active snapshots and views are mounted')
        return stored


def bind(path: Path, *, read_only: bool = False) -> Mount:
    """The mount of a plain directory."""
    return Mount("bind", str(path), ("rbind", "ro" if read_only else "rw"))
