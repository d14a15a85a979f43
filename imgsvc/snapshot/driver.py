"""What the drivers share: records and directories kept in step. A driver adds how its snapshots are made and mounted.

Order of things, so that a crash leaves nothing half-made in sight: a record is written before its directory appears and
removed before the directory goes; cleanup() at start drops whichever is without the other.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import FailedPrecondition, NotFound, from_os_error
from imgsvc.base.failpoints import failpoint
from imgsvc.base.metadb.database import MetaDB
from imgsvc.snapshot.compare import difference
from imgsvc.snapshot.directories import Directories, disk_usage
from imgsvc.snapshot.interfaces import Key, Kind, LayerFault, Mount, Name, SnapshotInfo, Usage
from imgsvc.snapshot.records import Records, Stored

_MEASURED_FOR: Final = 10.0  # seconds an active snapshot's measured usage is good for; CRI asks for all of them at a time


class DirectoryDriver(ABC):
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
        stored = self._present(key_or_name)
        return None if stored is None else stored.info

    def _present(self, key_or_name: str) -> Stored | None:
        """The record of something that is whole."""
        stored = self._records.get(key_or_name)
        return None if stored is None or self._fault(stored) else stored

    def _fault(self, stored: Stored) -> LayerFault | None:
        if stored.info.kind is not Kind.COMMITTED:
            return None
        try:
            if stored.extra.get("filled") and _is_empty(self._files(stored)):
                return LayerFault.EMPTY
            return None if stored.extra.get("filled") or self._files(stored).is_dir() else LayerFault.MISSING
        except (FileNotFoundError, NotADirectoryError):
            return LayerFault.MISSING
        except OSError:
            return LayerFault.UNREADABLE

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
        old = self._records.get(name)
        lost = old.number if old is not None and self._fault(old) else None
        facts, measured = self._finish(stored)
        self._records.commit(name, key, parent, usage or measured(), labels, facts, replaces=lost)
        self._measured.pop(key, None)
        if lost is not None:
            self._discard(lost)

    def _finish(self, stored: Stored) -> tuple[Mapping[str, Any], Callable[[], Usage]]:
        """Make an active snapshot's files what a committed one has: facts for its record, and how to measure them."""
        files = self._files(stored)
        return {"filled": not _is_empty(files)}, lambda: disk_usage(files)

    def _discard(self, number: int) -> None:
        """Let go of a directory that no record names any more."""
        self._directories.discard(number)

    def sync(self, keys: Sequence[Key]) -> None:
        """See Snapshotter: one syncfs serves them all."""
        if keys:
            self._directories.sync()

    def remove(self, *keys_or_names: str) -> None:
        """See Snapshotter."""
        gone = self._records.remove(*keys_or_names)
        if gone:
            failpoint("snapshot.forgotten")
        for stored in gone:
            self._measured.pop(stored.info.id, None)
            self._discard(stored.number)
        if gone:
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
            self._discard(number)
        return dropped + len(orphans)

    def check(self, name: Name) -> LayerFault | None:
        """See ScrubbableLayers."""
        stored = self._records.get(name)
        return None if stored is None else self._fault(stored)

    def strays(self) -> list[str]:
        """See ScrubbableLayers. Directories first: a record comes before its directory."""
        present = self._directories.numbers()
        return [str(number) for number in sorted(present - {stored.number for stored in self._records.walk()})]

    def discard_stray(self, directory: str) -> None:
        """See ScrubbableLayers."""
        self._discard(int(directory))

    def forget(self, name: Name) -> list[Name]:
        """See ScrubbableLayers."""
        gone = self._records.forget(name)
        for stored in gone:
            self._discard(stored.number)
        return [Name(stored.info.id) for stored in gone]

    def difference(self, name: Name, key: Key, cancel: CancelToken) -> str:
        """See ScrubbableLayers."""
        one, other = (self._files(self._records.must_get(each)) for each in (name, key))
        try:
            return difference(one, other, cancel)
        except OSError as error:
            raise from_os_error(error, "comparing a layer", where=str(one)) from error

    def close(self) -> None:
        """See Snapshotter."""
        self._directories.close()

    @abstractmethod
    def mounts(self, key: Key, *, parent: Name | None = None) -> list[Mount]:
        """See Snapshotter."""

    def _files(self, stored: Stored) -> Path:
        return self._directories.path(stored.number) / "fs"

    def _parents(self, name: str | None) -> list[Path]:
        """Directories of a committed snapshot and its parents, nearest first. Raises: NotFound, also when files of one are lost."""
        found = []
        for stored in self._records.chain(name):
            if fault := self._fault(stored):
                raise NotFound(
                    f"layer {stored.info.id} cannot be used, {fault}", where=str(self._files(stored)), hint="pull the image again"
                )
            found.append(self._files(stored))
        return found

    def _make_view(self, key: Key, parent: Name | None, labels: Mapping[str, str] | None) -> list[Mount]:
        stored = self._records.create(key, Kind.VIEW, parent, labels)
        try:
            self._directories.make(stored.number, ("fs",))
            return self.mounts(key)
        except BaseException:
            self.remove(key)
            raise

    def _active(self, key: str) -> Stored:
        stored = self._records.must_get(key)
        if stored.info.kind is Kind.COMMITTED:
            raise NotFound(f'snapshot "{key}" is committed; only active snapshots and views are mounted')
        return stored


def _is_empty(path: Path) -> bool:
    """Raises: FileNotFoundError, NotADirectoryError."""
    with os.scandir(path) as entries:
        return next(entries, None) is None


def bind(path: Path, *, read_only: bool = False) -> Mount:
    """The mount of a plain directory."""
    return Mount("bind", str(path), ("rbind", "ro" if read_only else "rw"))
