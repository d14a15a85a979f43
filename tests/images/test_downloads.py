"""Downloads that share: one download of a blob, whoever asks when."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from imgsvc.base.concurrency import Threads
from imgsvc.base.oci import Descriptor, Digest
from imgsvc.content.interfaces import Info
from imgsvc.content.local import LocalStore
from imgsvc.images.downloads import Blobs
from imgsvc.registry.interfaces import BlobSink, BlobSource
from tests.support.stored import LAYER_TYPE, Stored

DATA = b"layer" * 1000
BLOB = Descriptor(LAYER_TYPE, Digest.of(DATA), len(DATA))


class Registry:
    """Serves DATA, from when it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.was_asked, self.may = asyncio.Event(), asyncio.Event()

    @property
    def took_credentials(self) -> bool:
        return False

    async def document(self, descriptor: Descriptor, *, limit: int) -> bytes:
        raise NotImplementedError

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        raise NotImplementedError

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        self.asked += 1
        self.was_asked.set()
        await self.may.wait()
        await sink.write_at(0, DATA)
        return BlobSource({"r": len(DATA)})


class Slow(LocalStore):
    """Whoever looks for a blob after the first look gets the answer late."""

    def hold(self) -> None:
        self.looks = 0
        self.late = threading.Event()

    def info(self, digest: Digest) -> Info | None:
        found = super().info(digest)
        self.looks += 1
        if self.looks == 2:
            self.late.wait(10)
        return found


def test_who_looked_before_a_download_ended_does_not_start_another(tmp_path: Path) -> None:
    async def life() -> None:
        node = Stored(tmp_path)
        content, threads, registry = Slow(tmp_path, node.db, sync=False), Threads(4, "test"), Registry()
        content.hold()
        blobs = Blobs(content, threads)
        first = asyncio.create_task(blobs.fetch(registry, BLOB, lambda available: None))
        await registry.was_asked.wait()
        second = asyncio.create_task(blobs.fetch(registry, BLOB, lambda available: None))
        await asyncio.sleep(0.02)  # it has looked, or has joined
        registry.may.set()
        await first
        content.late.set()
        await second
        assert registry.asked == 1
        assert await blobs.fetch(registry, BLOB, lambda available: None) is None
        threads.close()
        node.close()

    asyncio.run(life())
