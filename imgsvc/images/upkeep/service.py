"""Upkeep of the store as one daemon does it: collecting garbage, checking, disk use, file system usage.

The wiring of gc, fsck and df with this daemon's content store, snapshotters, images and containers.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from imgsvc.base.concurrency import CancelToken, stop_tasks
from imgsvc.base.errors import DataLoss, ImgsvcError, InvalidArgument, NotFound
from imgsvc.images.records import Image
from imgsvc.images.rootfs import KEY_PREFIX, is_unpacked
from imgsvc.images.storage import Storage
from imgsvc.images.upkeep import nodes
from imgsvc.images.upkeep.collector import CollectionReport, Collector, Keeper, Policy, Root
from imgsvc.images.upkeep.df import disk_usage
from imgsvc.images.upkeep.fsck import Checker, ContentChecker, ImageChecker, LayerChecker, Metadata, MetadataChecker, fsck
from imgsvc.snapshot.interfaces import Key, Name, ScrubbableSnapshotter, Snapshotter, StreamSnapshotter

UnpackAside = Callable[[Image, int, str, Key], Coroutine[Any, Any, None]]
Move = Callable[[Image, str], Coroutine[Any, Any, None]]


class ContainerKeeper:
    """gc.Keeper: a container needs its root file system and those of its image volumes."""

    def __init__(self, container_ids: Callable[[], Iterable[str]], snapshotters: Mapping[str, Snapshotter]) -> None:
        """container_ids: all containers that have a root file system, running or not."""
        self._container_ids = container_ids
        self._snapshotters = dict(snapshotters)

    def roots(self) -> Iterator[Root]:
        """See gc.Keeper."""
        return self._roots(frozenset(self._container_ids()))

    def _roots(self, container_ids: frozenset[str]) -> Iterator[Root]:
        for name, snapshotter in self._snapshotters.items():
            for info in snapshotter.walk():
                container_id = info.id.removeprefix(KEY_PREFIX).partition("-")[0]
                if info.id.startswith(KEY_PREFIX) and container_id in container_ids:
                    yield Root(nodes.snapshot_node(name, info.id), f"container {container_id}")


class Upkeep:
    """Answers `imgsvc df`, `gc`, `fsck` and ImageFsInfo, and collects in the background while started."""

    def __init__(
        self,
        storage: Storage,
        metadata: Metadata,
        unpack_aside: UnpackAside,
        move: Move,
        root: Path,
        policy: Policy,
        wanted: Collection[str],
        keepers: Iterable[Keeper] = (),
        collected: Callable[[CollectionReport | None], None] = lambda report: None,
    ) -> None:
        """keepers: sources of roots beside images and work in progress. unpack_aside, move: of Puller. collected: see Collector.

        wanted: names of the snapshotters that images are pulled for now, the default one first.
        """
        self._metadata = metadata
        self._unpack_aside = unpack_aside
        self._move = move
        self._default = next(iter(wanted))
        self._leases = storage.leases
        self._images = storage.images
        self._content = storage.content
        self._snapshotters = dict(storage.snapshotters)
        self._threads = storage.threads
        self._root = root
        self._needs = nodes.Images(storage.images, storage.content, storage.snapshotters, wanted)
        snapshots = nodes.Snapshots(list(storage.snapshotters.values()))
        self._collector = Collector(
            keepers=[self._needs, snapshots, *keepers],
            collectables=[nodes.Blobs(storage.content), nodes.Ingests(storage.content), snapshots],
            cache=self._needs,
            leases=storage.leases,
            threads=storage.threads,
            root=root,
            policy=policy,
            collected=collected,
        )

    async def start(self, stack: AsyncExitStack) -> None:
        """Collect in the background until the stack is closed."""
        stack.push_async_callback(stop_tasks, asyncio.ensure_future(self._collector.run()))

    def go_by(self, policy: Policy) -> None:
        """Collect by this policy from now on."""
        self._collector.policy = policy
        self._collector.trigger("configuration reloaded")

    def trigger(self, reason: str) -> None:
        """Collect soon."""
        self._collector.trigger(reason)

    async def disk_usage(self) -> dict[str, Any]:
        """`imgsvc df`."""
        sizes = await self._threads.run(nodes.stored_sizes, self._content, self._content, list(self._snapshotters.values()))
        images = [(image, self._needs.needs(image)) for image in self._images.all()]
        return disk_usage(images, sizes).to_json()

    async def sizes(self) -> dict[str, int]:
        """Bytes on disk by class: "content", "ingest", "snapshot"."""
        sizes = await self._threads.run(nodes.stored_sizes, self._content, self._content, list(self._snapshotters.values()))
        return {kind: sum(size for node, size in sizes.items() if node.kind == kind) for kind in nodes.KINDS}

    async def collect(self, explain: bool, migrate: bool) -> dict[str, Any]:
        """`imgsvc gc`, `imgsvc gc --explain`, `imgsvc gc --migrate`."""
        if explain:
            return {"verdicts": [verdict.to_json() for verdict in await self._collector.explain()]}
        moved, failed = await self._migrate() if migrate else ([], {})
        report = (await self._collector.collect()).to_json()
        return {**report, "moved": moved, "failed": {**report["failed"], **failed}}

    async def _migrate(self) -> tuple[list[str], dict[str, str]]:
        """Move images to the default snapshotter, one after the other: those moved, and those that could not be, with the reason."""
        moved, failed = [], {}
        driver = self._snapshotters[self._default]
        for image in self._images.all():
            if image.artifact or await self._threads.run(is_unpacked, image, driver):
                continue
            name = next(iter(image.names), image.image_id)
            needs = await self._threads.run(self._needs.needs, image)
            try:
                async with self._leases.held(needs, purpose=f"moving {name} to {self._default}"):
                    await self._move(image, self._default)
                moved.append(name)
            except ImgsvcError as error:
                failed[f"image {name}"] = str(error)
        return moved, failed

    async def check(self, deep: bool, repair: bool) -> dict[str, Any]:
        """`imgsvc fsck`."""
        cancel = CancelToken()
        images, snapshotters = self._images.all(), list(self._snapshotters.values())
        layers = {
            (name, Name(layer.snapshot)): (image, at)
            for name in self._snapshotters
            for image in images
            for at, layer in enumerate(image.layers)
        }
        loop = asyncio.get_running_loop()

        def compare(snapshotter: str, name: Name, cancel: CancelToken) -> str:
            if (snapshotter, name) not in layers:
                raise NotFound("no image here names it")
            image, position = layers[snapshotter, name]
            driver = self._snapshotters[snapshotter]
            if isinstance(driver, StreamSnapshotter):
                return self._unproven(image, position, driver, loop, cancel)
            digest = image.layers[position].descriptor.digest
            if fault := self._content.check(digest, deep=False):  # fetching it again would be a repair that was not requested
                raise DataLoss(f"blob {digest} is {fault}")
            return self._differs(image, position, driver, loop, cancel)

        checkers: list[Checker] = [
            MetadataChecker(self._metadata),
            ContentChecker(self._content),
            LayerChecker(snapshotters, compare),
            ImageChecker(self._images, self._content, snapshotters),
        ]
        try:
            report = await self._threads.run_cancellable(cancel, lambda: fsck(checkers, deep=deep, repair=repair, cancel=cancel))
            return report.to_json()
        finally:
            self._collector.trigger("checked")  # blobs that were fetched for comparing may be more than the cache may hold

    def _differs(
        self, image: Image, position: int, snapshotter: ScrubbableSnapshotter, loop: asyncio.AbstractEventLoop, cancel: CancelToken
    ) -> str:
        """How an unpacked layer differs from its blob; unpacks it a second time, and fetches a blob that was given up. On a thread."""
        key = Key(f"fsck-{uuid.uuid4().hex}")
        try:
            asyncio.run_coroutine_threadsafe(self._unpack_leased(image, position, snapshotter.name, key), loop).result()
            return snapshotter.difference(Name(image.layers[position].snapshot), key, cancel)
        finally:
            snapshotter.remove(key)

    def _unproven(
        self, image: Image, position: int, snapshotter: ScrubbableSnapshotter, loop: asyncio.AbstractEventLoop, cancel: CancelToken
    ) -> str:
        """What is wrong with a layer that is kept as its stream: that is read again, must have its diff ID and give the same index."""
        try:
            return self._differs(image, position, snapshotter, loop, cancel)
        except (DataLoss, InvalidArgument) as error:
            return str(error)

    async def _unpack_leased(self, image: Image, position: int, snapshotter: str, key: Key) -> None:
        layer = image.layers[position]
        needs = [nodes.content_node(layer.descriptor.digest), nodes.snapshot_node(snapshotter, layer.snapshot)]
        async with self._leases.held(needs, purpose=f"fsck of layer {layer.snapshot}"):
            await self._unpack_aside(image, position, snapshotter, key)

    async def is_whole(self, image: Image) -> bool:
        """Whether an image can be used: an artifact's blobs, or all layers in some snapshotter, are there."""
        return await self._threads.run(self._is_whole, image)

    def _is_whole(self, image: Image) -> bool:
        if image.artifact:
            return all(self._content.info(layer.descriptor.digest) is not None for layer in image.layers)
        return any(is_unpacked(image, snapshotter) for snapshotter in self._snapshotters.values())

    def image_fs(self) -> tuple[str, int, int]:
        """(directory, bytes, inodes) of unpacked layers; blobs are a cache that goes when space is low."""
        totals = [snapshotter.total_usage() for snapshotter in self._snapshotters.values()]
        return str(self._root), sum(t.size for t in totals), sum(t.inodes for t in totals)

    def container_fs(self) -> tuple[str, int, int]:
        """As image_fs: containers write to the same file system."""
        return self.image_fs()
