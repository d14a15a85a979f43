"""The mirror and its cache under load and behind registries in trouble."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from imgsvc.base.concurrency import Threads, all_of
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import OCI_MANIFEST, Descriptor, Digest
from imgsvc.images.documents import Documents
from imgsvc.images.provenance import Provenance, Witness
from imgsvc.registry.interfaces import BlobSink, BlobSource
from tests.fakes.registry import FakeRegistry, Reply
from tests.field.test_private import Scene, scene
from tests.support.images import Entry, image, layer
from tests.support.stored import Stored

__all__ = ["scene"]
APP = image([layer([Entry("f", b"one")])])


class Slow:
    """A Fetcher whose one document comes when all have asked."""

    took_credentials = False

    def __init__(self, data: bytes) -> None:
        self.data, self.asked, self.may = data, 0, asyncio.Event()

    async def document(self, descriptor: Descriptor, *, limit: int) -> bytes:
        self.asked += 1
        await self.may.wait()
        return self.data

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        raise NotImplementedError

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        raise NotImplementedError


def test_A1_clients_that_want_one_new_document_at_once_share_its_request_and_its_writing(tmp_path: Path) -> None:
    async def main() -> tuple[list[bytes], int]:
        stored = Stored(tmp_path)
        threads, db = Threads(4, "test"), MetaDB(tmp_path / "provenance", sync=False)
        fetcher, begun = Slow(b"{}"), list[None]()
        descriptor = Descriptor(OCI_MANIFEST, Digest.of(b"{}"), 2)
        documents = Documents(stored.content, threads, Provenance(db))

        async def client() -> bytes:
            begun.append(None)
            if len(begun) == 6:
                fetcher.may.set()
            data = await documents.get("a.example/b", "", descriptor, Witness(fetcher), anonymous=True)
            await documents.put(descriptor, data)
            return data

        try:
            return await all_of(*(client() for _ in range(6))), fetcher.asked
        finally:
            stored.close()
            threads.close()
            db.close()

    assert asyncio.run(main()) == ([b"{}"] * 6, 1)


@pytest.mark.parametrize("status, answer", [(429, {429}), (401, {404}), (500, {502, 503})])
def test_P17_what_a_registry_says_is_passed_on_with_its_reason(scene: Scene, status: int, answer: set[int]) -> None:
    scene.public.add(APP, "app", "1")
    scene.public.rule(FakeRegistry.on("/app/manifests/new", Reply(status, body=b'{"errors":[{"code":"X","message":"because"}]}')))

    told = scene.get(scene.public, "app", "manifests/new")

    assert told.status_code in answer
    assert str(status) in told.text


def test_P17_a_tag_that_is_here_is_served_at_once_while_the_registry_limits_the_rate(scene: Scene) -> None:
    scene.public.add(APP, "app", "1")
    assert scene.get(scene.public, "app", "manifests/1").content == APP.data
    scene.public.rule(FakeRegistry.on("/app/", Reply(429, {"Retry-After": "30"})))

    told: httpx.Response = scene.get(scene.public, "app", "manifests/1")

    assert told.content == APP.data
    assert told.elapsed.total_seconds() < 10
