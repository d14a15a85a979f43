"""Snapshots over EROFS: a layer is its tar stream, and one read-only mount shows an image with all its layers.

ROOT/snapshots/erofs/NUMBER/ has, of a committed snapshot,

    layer.tar     the layer's tar stream, byte for byte: its digest is the diff ID
    layer.index   what that stream says, see index.py
    layer.erofs   the image of this layer on top of all below it; made when it is first needed, and again when it is missing
    mnt           where that is mounted, once for all containers

and, of an active one, what OverlaySnapshotter has: what a container writes goes to an upper directory of its own.

Nothing of a layer is created on the node's file system, nothing of it is removed file by file, and no mount of a committed
layer can be written to, whatever its options say. What it costs: images that share layers share their data on disk, but each
has its own mount and its own page cache.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from imgsvc.base import kernel
from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import NotFound, from_os_error
from imgsvc.base.failpoints import failpoint
from imgsvc.base.fsutil import sync_dir
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import MIB
from imgsvc.snapshot.erofs import index
from imgsvc.snapshot.erofs.build import OpenLayer, build_image
from imgsvc.snapshot.erofs.mounting import mount_image
from imgsvc.snapshot.erofs.pack import pack_directory
from imgsvc.snapshot.interfaces import STREAM, Key, Kind, LayerFault, Mount, Name, StreamSnapshotter, Usage
from imgsvc.snapshot.overlay import OverlayOptions, OverlaySnapshotter
from imgsvc.snapshot.records import Stored
from imgsvc.snapshot.unpack.tarstream import TarStream

log = logging.getLogger(__name__)

NAME: Final = "erofs"
_TAR: Final = "layer.tar"
_INDEX: Final = "layer.index"
_IMAGE: Final = "layer.erofs"
_PARTIAL: Final = ".layer.erofs"
_MOUNT: Final = "mnt"
_DAMAGED: Final = (errno.ENOENT, errno.EUCLEAN, errno.EBADMSG, errno.EINVAL, errno.EIO)  # what the kernel says of an image it cannot use

Build = Callable[[Sequence[OpenLayer], int], object]  # layers, base first, and the descriptor to write their image to; blocking


class ErofsSnapshotter(OverlaySnapshotter):
    """A StreamSnapshotter. Containers write to overlayfs on one EROFS mount for each image."""

    def __init__(self, root: Path, db: MetaDB, options: OverlayOptions | None = None, *, build: Build = build_image) -> None:
        """root: ROOT/snapshots/erofs, created with mode 0700. build: as build_image, maybe in a process of its own."""
        super().__init__(root, db, options, name=NAME)
        self._build = build
        self._locks: dict[int, threading.Lock] = {}  # by number: one thread makes, mounts or discards a snapshot's image
        self._locks_lock = threading.Lock()

    def prepare_stream(self, key: Key) -> list[Mount]:
        """See StreamSnapshotter."""
        stored = self._records.create(key, Kind.ACTIVE, None, None)
        try:
            directory = self._directories.make(stored.number, ())
        except BaseException:
            self.remove(key)
            raise
        return [Mount(STREAM, str(directory / _TAR), (f"index={directory / _INDEX}",))]

    def stream(self, name: Name) -> int:
        """See StreamSnapshotter."""
        path = self._directories.path(self._records.must_get(name).number) / _TAR
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise from_os_error(error, "reading a layer", where=str(path)) from error

    def seal(self, name: Name) -> None:
        """See StreamSnapshotter."""
        self._mounted(name)

    def sync(self, keys: Sequence[Key]) -> None:
        """See Snapshotter: the files of layers by themselves; what else is on that file system does not matter."""
        directories = [self._directories.path(self._records.must_get(key).number) for key in keys]
        try:
            for directory in directories:
                for name in (_TAR, _INDEX):
                    with contextlib.suppress(FileNotFoundError):
                        _sync_file(directory / name)
                sync_dir(directory)
            if directories:
                sync_dir(self._directories.root)
        except OSError as error:
            raise from_os_error(error, "cannot put a layer on disk", where=str(self._directories.root)) from error

    def difference(self, name: Name, key: Key, cancel: CancelToken) -> str:
        """See ScrubbableLayers: two streams are compared, byte for byte."""
        one, other = (self._directories.path(self._records.must_get(each).number) for each in (name, key))
        try:
            for file in (_TAR, _INDEX):
                if found := _difference(one / file, other / file, cancel):
                    return f"{file}: {found}"
        except OSError as error:
            raise from_os_error(error, "comparing a layer", where=str(one)) from error
        return ""

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
        number = self._records.must_get(key).number
        super().commit(name, key, parent=parent, usage=usage, labels=labels)
        self._directories.empty(number, ("fs", "work"))  # it is in the stream now

    def _fault(self, stored: Stored) -> LayerFault | None:
        if stored.info.kind is not Kind.COMMITTED:
            return None
        directory = self._directories.path(stored.number)
        try:
            sizes = [(directory / name).stat().st_size for name in (_TAR, _INDEX)]
        except (FileNotFoundError, NotADirectoryError):
            return LayerFault.MISSING
        except OSError:
            return LayerFault.UNREADABLE
        return None if sizes == [stored.extra["tar"], stored.extra["index"]] else LayerFault.CHANGED

    def _finish(self, stored: Stored) -> tuple[Mapping[str, Any], Callable[[], Usage]]:
        directory = self._directories.path(stored.number)
        try:
            if not (directory / _INDEX).exists():
                _from_directory(directory)
                (directory / _MOUNT).mkdir(mode=0o700, exist_ok=True)
                for name in (_TAR, _INDEX):
                    _sync_file(directory / name)
                sync_dir(directory)
            tar, found = ((directory / name).stat() for name in (_TAR, _INDEX))
        except OSError as error:
            raise from_os_error(error, "committing a layer", where=str(directory)) from error
        return {"tar": tar.st_size, "index": found.st_size}, lambda: Usage((tar.st_blocks + found.st_blocks) * 512, 2)

    def _discard(self, number: int) -> None:
        with self._locked(number):
            while kernel.umount(self._directories.path(number) / _MOUNT):
                pass
            super()._discard(number)
        with self._locks_lock:
            self._locks.pop(number, None)

    def _locked(self, number: int) -> threading.Lock:
        with self._locks_lock:
            return self._locks.setdefault(number, threading.Lock())

    def _parents(self, name: str | None) -> list[Path]:
        """The one directory that shows a committed snapshot with all below it."""
        return [self._mounted(name)] if name is not None else []

    def _mounted(self, name: str) -> Path:
        """Where a committed snapshot is mounted, with all below it. Raises: NotFound, also when files of one are lost."""
        number = self._records.must_get(name).number
        place = self._directories.path(number) / _MOUNT
        with self._locked(number):
            chain = self._records.chain(name)  # within: what is discarded has no record by then
            if os.path.ismount(place):
                return place
            directories = [self._directories.path(stored.number) for stored in chain]
            for stored, directory in zip(chain, directories, strict=True):
                if fault := self._fault(stored):
                    raise NotFound(f"layer {stored.info.id} cannot be used, {fault}", where=str(directory), hint="pull the image again")
            try:
                place.mkdir(mode=0o700, exist_ok=True)
                self._mount(chain[0], directories, place)
            except OSError as error:
                raise from_os_error(error, "mounting an image", where=str(directories[0])) from error
        return place

    def _mount(self, top: Stored, directories: Sequence[Path], place: Path) -> None:
        """Mount the image of a chain of layers, nearest first. One that is lost, or that the kernel takes for damaged, is made again."""
        image, streams = directories[0] / _IMAGE, [directory / _TAR for directory in reversed(directories)]
        try:
            mount_image(image, streams, place)
        except OSError as error:
            if error.errno not in _DAMAGED:
                raise
            if error.errno != errno.ENOENT:
                log.warning("%s is damaged (%s); it is made again", image, error.strerror)
            self._make_image(top, directories)
            mount_image(image, streams, place)

    def _make_image(self, top: Stored, directories: Sequence[Path]) -> None:
        """Write the image of a chain of layers, nearest first, beside the nearest. Raises: BadLayer, DataLoss, OSError."""
        partial = directories[0] / _PARTIAL
        with ExitStack() as stack:
            layers = [OpenLayer(_open(directory / _TAR, stack), _open(directory / _INDEX, stack)) for directory in reversed(directories)]
            output = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, output)
            try:
                self._build(layers, output)
            except BaseException:
                partial.unlink()
                raise
            size = os.fstat(output).st_blocks * 512
        failpoint("snapshot.built")
        os.rename(partial, directories[0] / _IMAGE)
        sync_dir(directories[0])
        self._records.set_added(top.info.id, Usage(size, 1))


def stream_snapshotter(root: Path, db: MetaDB, options: OverlayOptions | None = None) -> StreamSnapshotter:
    """An ErofsSnapshotter as the use cases see it."""
    return ErofsSnapshotter(root, db, options)


def _open(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    stack.callback(os.close, fd)
    return fd


def _sync_file(path: Path) -> None:
    with ExitStack() as stack:
        os.fsync(_open(path, stack))


def _from_directory(directory: Path) -> None:
    """Make layer.tar and layer.index of what was written to an upper directory."""
    with (directory / _TAR).open("w+b") as stream:
        pack_directory(directory / "fs", stream)
        stream.seek(0)
        with (directory / _INDEX).open("wb") as found:
            index.record(TarStream(lambda: stream.read(MIB)), found.write)


def _difference(one: Path, other: Path, cancel: CancelToken) -> str:
    at = 0
    for here, there in zip(_chunks(one), _chunks(other), strict=False):
        cancel.check()
        if here != there:
            return f"differs between bytes {at} and {at + max(len(here), len(there))}"
        at += len(here)
    return "" if one.stat().st_size == other.stat().st_size else "has another size"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(MIB):
            yield chunk
