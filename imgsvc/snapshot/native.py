"""Snapshots as full copies: no mounts needed beyond a bind, no kernel feature, and disk and time for every layer.

For machines where overlayfs is not usable. Blocks are shared where the file system can (btrfs, xfs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.metadb.database import MetaDB
from imgsvc.snapshot.copying import copy_tree, shift_tree
from imgsvc.snapshot.driver import DirectoryDriver, bind
from imgsvc.snapshot.interfaces import IDMapping, Key, Kind, Mount, Name, Snapshotter

NAME: Final = "native"


class NativeSnapshotter(DirectoryDriver):
    """A Snapshotter of plain directories."""

    parallel = False

    def __init__(self, root: Path, db: MetaDB, *, sync_remove: bool = False, idmapped: bool = True) -> None:
        """root: ROOT/snapshots/native, created with mode 0700. idmapped: binds can be, here."""
        super().__init__(NAME, root, db, sync_remove=sync_remove)
        self._idmapped = idmapped

    @property
    def idmapped(self) -> bool:
        """See Snapshotter."""
        return self._idmapped

    def mounts(self, key: Key, *, parent: Name | None = None) -> list[Mount]:
        """See Snapshotter."""
        if parent is not None:
            raise InvalidArgument("native snapshots always stand on their parent")
        stored = self._active(key)
        if stored.info.kind is Kind.VIEW:
            return [bind((*self._parents(stored.info.parent), self._files(stored))[0], read_only=True)]
        return [bind(self._files(stored))]

    def stacked(self, own: Sequence[Mount], below: Sequence[Mount]) -> list[Mount]:
        """See Snapshotter."""
        raise InvalidArgument("native snapshots always stand on their parent")

    def prepare(
        self, key: Key, parent: Name | None, labels: Mapping[str, str] | None = None, *, mapping: IDMapping | None = None
    ) -> list[Mount]:
        """See Snapshotter. Copies the parent."""
        stored = self._records.create(key, Kind.ACTIVE, parent, labels, mapping)
        try:
            files = self._directories.make(stored.number, ("fs",)) / "fs"
            if lower := self._parents(parent):
                copy_tree(lower[0], files)
            if mapping is not None:
                shift_tree(files, mapping)
        except BaseException:
            self.remove(key)
            raise
        return self.mounts(key)

    def view(self, key: Key, parent: Name | None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See Snapshotter. Shows the parent's own directory."""
        return self._make_view(key, parent, labels)


def native(root: Path, db: MetaDB) -> Snapshotter:
    """A NativeSnapshotter as the use cases see it."""
    return NativeSnapshotter(root, db)
