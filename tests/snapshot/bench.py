"""A bench to unpack on: database, both drivers, an unpacker; and the ways an image's layers can get into snapshots."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from imgsvc.base import kernel
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import Digest
from imgsvc.base.removal import unmount_below
from imgsvc.snapshot.erofs.build import OpenLayer
from imgsvc.snapshot.erofs.driver import ErofsSnapshotter
from imgsvc.snapshot.interfaces import Applied, Key, LayerInput, Limits, Mount, Name, Snapshotter, StreamSnapshotter, Usage
from imgsvc.snapshot.mount import mount_all
from imgsvc.snapshot.native import native
from imgsvc.snapshot.overlay import overlay
from imgsvc.snapshot.unpack.unpacker import WorkerUnpacker

T = TypeVar("T")
PLAIN = "application/vnd.oci.image.layer.v1.tar"
UNLIMITED = Limits(0, 0, 0)


def stack(snapshotter: Snapshotter, own: Sequence[Sequence[Mount]]) -> list[Sequence[Mount]]:
    """Snapshots that were prepared without parents, base first, each as it is on those before it."""
    return list(itertools.accumulate(own, lambda below, mounts: snapshotter.stacked(mounts, below)))


class Bench:
    """Everything below one directory. Calls block; an event loop of its own runs the asynchronous parts."""

    def __init__(self, root: Path, limits: Limits = UNLIMITED, transform: str = "") -> None:
        self.root = root
        self.db = MetaDB(root / "db", sync=False)
        self.overlay: Snapshotter = overlay(root / "overlayfs", self.db)
        self.native: Snapshotter = native(root / "native", self.db)
        self.erofs: StreamSnapshotter = ErofsSnapshotter(root / "erofs", self.db, build=self._build)
        self.loop = asyncio.new_event_loop()
        self.unpacker = WorkerUnpacker(max_concurrent=2, limits=limits, transform=transform)
        self._numbers = itertools.count()

    def close(self) -> None:
        """Stop everything."""
        self.run(self.unpacker.close)
        self.loop.close()
        self.overlay.close()
        self.native.close()
        self.erofs.close()
        unmount_below(self.root / "erofs")
        self.db.close()

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run something asynchronous to its end."""

        async def call() -> T:
            return await work()

        return self.loop.run_until_complete(call())

    def key(self) -> Key:
        """A key nobody used."""
        return Key(f"key-{next(self._numbers)}")

    async def apply(
        self,
        blob: bytes,
        mounts: Sequence[Mount],
        *,
        rebase: bool,
        diff_id: Digest | None = None,
        media_type: str = PLAIN,
        secret: bytes | None = None,
    ) -> tuple[Applied, Callable[[Sequence[Mount]], Awaitable[Usage | None]]]:
        """Unpack one blob; returns what came of it and the way to settle it."""
        path = self.root / f"blob-{next(self._numbers)}"
        path.write_bytes(blob)
        fd = os.open(path, os.O_RDONLY)
        path.unlink()
        try:
            layer = LayerInput(media_type, Digest.of(blob), diff_id or Digest.of(blob), fd, len(blob), secret)
            job = await self.unpacker.start(layer, mounts, rebase=rebase)
        finally:
            os.close(fd)
        job.advance(len(blob))
        try:
            applied = await job.finish()
        except BaseException:
            await job.abort()
            raise
        return applied, job.settle

    def beside(self, layers: Sequence[bytes]) -> tuple[Name, list[Usage | None]]:
        """All layers at the same time, each without its parents; then settled and committed in order."""

        async def work() -> tuple[Name, list[Usage | None]]:
            keys = [self.key() for _ in layers]
            own = [self.overlay.prepare(key, None) for key in keys]
            applied = (self.apply(blob, mounts, rebase=True) for mounts, blob in zip(own, layers, strict=True))
            done = []
            for result in await asyncio.gather(*applied, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
                done.append(result)
            usages = [await settle(mounts) for mounts, (_, settle) in zip(stack(self.overlay, own), done, strict=True)]
            parent: Name | None = None
            for key, usage in zip(keys, usages, strict=True):
                name = Name(f"name-{key}")
                self.overlay.commit(name, key, parent=parent, usage=usage)
                parent = name
            assert parent is not None
            return parent, usages

        return self.run(work)

    def in_order(self, snapshotter: Snapshotter, layers: Sequence[bytes]) -> Name:
        """One layer after the other on its mounted parents."""

        async def work() -> Name:
            parent: Name | None = None
            for blob in layers:
                key = self.key()
                _, settle = await self.apply(blob, snapshotter.prepare(key, parent), rebase=False)
                usage = await settle([])
                name = Name(f"name-{key}")
                snapshotter.commit(name, key, usage=usage)
                parent = name
            assert parent is not None
            return parent

        return self.run(work)

    def streamed(self, layers: Sequence[bytes]) -> Name:
        """All layers as streams, at the same time, and one image of them."""

        async def work() -> Name:
            keys = [self.key() for _ in layers]
            own = [self.erofs.prepare_stream(key) for key in keys]
            await asyncio.gather(*(self.apply(blob, mounts, rebase=True) for mounts, blob in zip(own, layers, strict=True)))
            parent: Name | None = None
            for key in keys:
                name = Name(f"name-{key}")
                self.erofs.commit(name, key, parent=parent)
                parent = name
            assert parent is not None
            return parent

        name = self.run(work)
        self.erofs.seal(name)
        return name

    def _build(self, layers: Sequence[OpenLayer], output: int) -> None:
        self.run(lambda: self.unpacker.merge([(layer.tar, layer.index) for layer in layers], output))

    @contextmanager
    def shown(self, snapshotter: Snapshotter, name: Name) -> Iterator[Path]:
        """A committed snapshot, mounted."""
        key = self.key()
        place = self.root / f"shown-{key}"
        place.mkdir()
        mount_all(snapshotter.view(key, name), str(place))
        try:
            yield place
        finally:
            kernel.umount(place)
            place.rmdir()
            snapshotter.remove(key)
