"""Snapshots as overlayfs layers: one directory per layer, stacked by the kernel when they are mounted.

Source: Linux Documentation/filesystems/overlayfs.rst; containerd's overlayfs snapshotter for the options' names.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.errors import FailedPrecondition, InvalidArgument, Unimplemented
from imgsvc.base.fsutil import copy_metadata
from imgsvc.base.metadb.database import MetaDB
from imgsvc.snapshot.copying import copy_tree, shift, shift_tree
from imgsvc.snapshot.driver import DirectoryDriver, bind
from imgsvc.snapshot.interfaces import IDMapping, Key, Kind, Mount, Name, SnapshotInfo, Snapshotter
from imgsvc.snapshot.mount import in_own_namespace, mount_all
from imgsvc.snapshot.records import Stored

NAME: Final = "overlayfs"
UPPERDIR_LABEL: Final = "containerd.io/snapshot/overlay.upperdir"


@dataclass(frozen=True, slots=True)
class OverlayOptions:
    """containerd's options of the same names, and what detect() found out about this kernel.

    mount_options: appended to every overlay mount. upperdir_label: stat() shows the upper directory as a label.
    slow_chown: shift owners by copying where idmapped mounts do not work; else that is an error.
    userxattr: marks are user.overlay.* (user namespaces). index_off: say index=off. idmapped: lower mounts can be.
    """

    mount_options: tuple[str, ...] = ()
    upperdir_label: bool = False
    sync_remove: bool = False
    slow_chown: bool = True
    userxattr: bool = False
    index_off: bool = True
    idmapped: bool = True


class OverlaySnapshotter(DirectoryDriver):
    """A Snapshotter over overlayfs. Layers may be unpacked without their parents."""

    parallel = True

    def __init__(self, root: Path, db: MetaDB, options: OverlayOptions | None = None, *, name: str = NAME) -> None:
        """root: ROOT/snapshots/NAME, created with mode 0700. Raises: InvalidArgument (a path overlayfs cannot take)."""
        if any(c in str(root) for c in ":,\\"):
            raise InvalidArgument("overlayfs cannot use a path with a colon, comma or backslash", where=str(root))
        self._options = options or OverlayOptions()
        super().__init__(name, root, db, sync_remove=self._options.sync_remove)

    @property
    def idmapped(self) -> bool:
        """See Snapshotter."""
        return self._options.idmapped

    def stat(self, key_or_name: str) -> SnapshotInfo | None:
        """See Snapshotter."""
        stored = self._present(key_or_name)
        if stored is None or not self._options.upperdir_label:
            return None if stored is None else stored.info
        info = stored.info
        labels = {**info.labels, UPPERDIR_LABEL: str(self._files(stored))}
        return SnapshotInfo(info.id, info.kind, info.parent, info.created_at, info.updated_at, labels)

    def mounts(self, key: Key, *, parent: Name | None = None) -> list[Mount]:
        """See Snapshotter."""
        stored = self._active(key)
        if parent is not None and stored.info.parent is not None:
            raise FailedPrecondition(f'snapshot "{key}" has a parent already')
        return self._mounts(stored, self._parents(parent or stored.info.parent))

    def stacked(self, own: Sequence[Mount], below: Sequence[Mount]) -> list[Mount]:
        """See Snapshotter."""
        files, *parents = _directories(own)
        if parents:
            raise FailedPrecondition("a snapshot that has parents already cannot be put on others", where=files)
        return [self._overlay(_directories(below), Path(files), None)]

    def prepare(
        self, key: Key, parent: Name | None, labels: Mapping[str, str] | None = None, *, mapping: IDMapping | None = None
    ) -> list[Mount]:
        """See Snapshotter."""
        copied = mapping is not None and parent is not None and not self._options.idmapped
        if copied and not self._options.slow_chown:
            raise Unimplemented("no idmapped mounts here, and slow_chown is off", where=str(self._directories.root))
        stored = self._records.create(key, Kind.ACTIVE, parent, labels, mapping, {"copied": copied})
        try:
            self._parents(parent)  # raises when files of one are lost
            directory = self._directories.make(stored.number, ("fs", "work"))
            if copied:
                assert mapping is not None
                in_own_namespace(lambda: self._copy_merged(parent, directory))
                (directory / "merged").rmdir()
                shift_tree(directory / "fs", mapping)
            elif parent is not None or mapping is not None:
                self._adopt_root(stored, parent, mapping)
        except BaseException:
            self.remove(key)
            raise
        return self.mounts(key)

    def view(self, key: Key, parent: Name | None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See Snapshotter."""
        return self._make_view(key, parent, labels)

    def _mounts(self, stored: Stored, lowers: list[Path]) -> list[Mount]:
        files = self._files(stored)
        if stored.extra.get("copied") or (not lowers and stored.info.kind is Kind.ACTIVE):
            return [bind(files)]
        if stored.info.kind is Kind.VIEW:
            return [bind(lowers[0] if lowers else files, read_only=True)] if len(lowers) < 2 else [self._overlay(lowers, None, None)]
        return [self._overlay(lowers, files, stored.mapping)]

    def _overlay(self, lowers: Sequence[Path | str], upper: Path | None, mapping: IDMapping | None) -> Mount:
        options = [o for o, on in (("index=off", self._options.index_off), ("userxattr", self._options.userxattr)) if on]
        options += self._options.mount_options
        if mapping is not None:
            options += ["uidmap=" + _rows(mapping.uids), "gidmap=" + _rows(mapping.gids)]
        if upper is None:
            options.append("ro")
        else:
            options += [f"workdir={upper.parent / 'work'}", f"upperdir={upper}"]
        return Mount("overlay", "overlay", (*options, "lowerdir=" + ":".join(map(str, lowers))))

    def _copy_merged(self, parent: Name | None, directory: Path) -> None:
        place = directory / "merged"
        place.mkdir()
        lowers = self._parents(parent)
        mount_all([bind(lowers[0], read_only=True)] if len(lowers) == 1 else [self._overlay(lowers, None, None)], str(place))
        copy_tree(place, directory / "fs")

    def _adopt_root(self, stored: Stored, parent: Name | None, mapping: IDMapping | None) -> None:
        """The upper directory is the root that a mount shows: the parent's root, owned by the mapped owner."""
        files = self._files(stored)
        with ExitStack() as opened:
            root, own = (opened.enter_context(_opened(path)) for path in ((self._parents(parent) or [files])[0], files))
            status = os.fstat(root)
            copy_metadata(root, own, status)
            if mapping is not None:
                os.fchown(own, shift(mapping.uids, status.st_uid), shift(mapping.gids, status.st_gid))
                os.fchmod(own, stat.S_IMODE(status.st_mode))


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def overlay(root: Path, db: MetaDB, options: OverlayOptions | None = None) -> Snapshotter:
    """An OverlaySnapshotter as the use cases see it."""
    return OverlaySnapshotter(root, db, options)


def _directories(mounts: Sequence[Mount]) -> list[str]:
    """What a mount of ours shows, uppermost first."""
    (mount,) = mounts
    if mount.type == "bind":
        return [mount.source]
    return [path for path in (mount.value("upperdir"), *mount.value("lowerdir").split(":")) if path]


def _rows(rows: Sequence[tuple[int, int, int]]) -> str:
    return ";".join(f"{inside}:{outside}:{count}" for inside, outside, count in rows)
