"""Contracts of Registry, Fetcher and Repository, on the client and on what stands in for it or around it.

Implementations: the client against a FakeRegistry, fetching itself and through a process of its own, and against docker-registry, the throttle of pre-pull, an archive.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument, NotFound
from imgsvc.base.oci import MAX_DOCUMENT, MIB, OCI_EMPTY, OCI_MANIFEST, Descriptor, Digest, Manifest, parse_document
from imgsvc.base.reference import Reference
from imgsvc.images.archive.source import ArchiveSource
from imgsvc.images.prepull.throttle import Throttle, ThrottledRegistry
from imgsvc.registry.interfaces import BlobSource, Fetcher, PullFailed, Registry, Repository
from tests.fakes.registry import FakeRegistry
from tests.fakes.store import MemoryStore
from tests.registry.support import APART, MemorySink, blob, client_for, hosts_d, image_of, noise
from tests.support.images import BuiltDocument
from tests.support.registries import RealRegistry

NAME = Reference.parse("docker.io/contract/app:1")
NOWHERE = Reference.parse("docker.io/contract/app:absent")
IMAGE = image_of(noise(3 * MIB), noise(100, seed=1))
LAYER = blob(max(IMAGE.blobs.values(), key=len))
BYTES = IMAGE.blobs[LAYER.digest]


@dataclass(slots=True)
class Case:
    """A registry under test that has IMAGE as NAME."""

    registry: Registry
    fetcher: Fetcher
    endpoints: set[str]

    async def target(self) -> Descriptor:
        return (await self.registry.resolve(NAME)).descriptor


Check = Callable[[Case], Awaitable[None]]


@asynccontextmanager
async def case(kind: str, path: Path, real: RealRegistry | None) -> AsyncIterator[Case]:
    with FakeRegistry() as fake:
        fake.add(IMAGE, NAME.repository, NAME.tag)
        url = real.url if real else fake.url
        if real:
            real.push(IMAGE, NAME.repository, NAME.tag)
        hosts_d(path, {"docker.io": f'fallback = false\n[host."{url}"]\n'})
        APART.set(kind == "apart")
        async with client_for(path) as client:
            made: Registry = client
            if kind == "throttled":
                made = ThrottledRegistry(client, Throttle(64 * MIB))
            yield Case(made, made.fetcher(NAME), {f"{url}/v2"})
            await made.close()


@pytest.fixture(params=["client", "apart", "docker-registry", "throttled"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Check], None]:
    real: RealRegistry | None = request.getfixturevalue("registry") if request.param == "docker-registry" else None

    def runner(check: Check) -> None:
        async def main() -> None:
            async with case(request.param, tmp_path, real) as made:
                await check(made)

        asyncio.run(main())

    return runner


async def failure(work: Awaitable[object]) -> ImgsvcError:
    with pytest.raises(ImgsvcError) as caught:
        await work
    return caught.value


def test_resolve_tells_what_a_name_stands_for_and_who_said_so(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        found = await case.registry.resolve(NAME)
        assert (found.descriptor.digest, found.descriptor.size, found.descriptor.media_type) == (
            IMAGE.digest,
            len(IMAGE.data),
            OCI_MANIFEST,
        )
        assert found.endpoint in case.endpoints
        assert [a.phase for a in found.attempts][-1] == "resolve"
        assert found.attempts[-1].status == 200
        assert found.document in (None, IMAGE.data)
        by_digest = await case.registry.resolve(NAME.with_digest(IMAGE.digest))
        assert by_digest.descriptor.digest == IMAGE.digest

    run(check)


def test_resolving_what_is_not_there_is_pull_failed_with_the_attempts(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        for name in (NOWHERE, NAME.with_digest(Digest.of(b"absent"))):
            error = await failure(case.registry.resolve(name))
            assert isinstance(error, PullFailed)
            assert error.code == "NOT_FOUND"
            assert not error.retryable
            assert {a.endpoint for a in error.attempts} == case.endpoints
            assert error.attempts[-1].status == 404

    run(check)


def test_documents_are_verified_and_bounded(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        raw = await case.fetcher.document(await case.target(), limit=MAX_DOCUMENT)
        assert raw == IMAGE.data
        manifest = parse_document(raw, OCI_MANIFEST, "contract")
        assert isinstance(manifest, Manifest)
        assert await case.fetcher.document(manifest.config, limit=MAX_DOCUMENT) == IMAGE.blobs[IMAGE.config_digest]
        assert (await failure(case.fetcher.document(manifest.config, limit=10))).code == "RESOURCE_EXHAUSTED"
        shorter = Descriptor(manifest.config.media_type, manifest.config.digest, manifest.config.size - 1)
        longer = Descriptor(manifest.config.media_type, manifest.config.digest, manifest.config.size + 1)
        for wrong in (shorter, longer):
            assert (await failure(case.fetcher.document(wrong, limit=MAX_DOCUMENT))).code in ("DATA_LOSS", "RESOURCE_EXHAUSTED")
        absent = Descriptor("application/octet-stream", Digest.of(b"absent"), 6)
        assert (await failure(case.fetcher.document(absent, limit=MAX_DOCUMENT))).code == "NOT_FOUND"

    run(check)


def test_embedded_documents_are_not_asked_for(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        value = {"mediaType": OCI_EMPTY, "digest": str(Digest.of(b"{}")), "size": 2, "data": base64.b64encode(b"{}").decode()}
        assert await case.fetcher.document(Descriptor.from_json(value), limit=MAX_DOCUMENT) == b"{}"

    run(check)


@pytest.mark.parametrize("have", [[], [(0, 1000)], [(1000, MIB), (2 * MIB, 5)], [(0, LAYER.size)]], ids=["all", "tail", "holes", "nothing"])
def test_a_download_brings_what_is_missing_and_nothing_else(run: Callable[[Check], None], have: list[tuple[int, int]]) -> None:
    async def check(case: Case) -> None:
        sink = MemorySink(LAYER.size, have=list(have))
        for offset, length in have:
            sink.data[offset : offset + length] = BYTES[offset : offset + length]
        source = await case.fetcher.download(LAYER, sink)
        assert sink.missing() == []
        assert bytes(sink.data) == BYTES
        assert source.reused == sum(length for _, length in have)
        assert sum(source.by_endpoint.values()) == LAYER.size - source.reused
        assert set(source.by_endpoint) <= case.endpoints

    run(check)


def test_a_download_that_fails_keeps_what_it_wrote(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        class FullDisk(MemorySink):
            async def write_at(self, offset: int, data: bytes | memoryview) -> None:
                if self.writes:
                    raise FailedPrecondition("the sink's own error")
                await super().write_at(offset, data)

        sink = FullDisk(LAYER.size)
        error = await failure(case.fetcher.download(LAYER, sink))
        assert error.what == "the sink's own error"
        again = MemorySink(LAYER.size, have=list(sink.writes))
        source = await case.fetcher.download(LAYER, again)
        assert source.reused == sum(length for _, length in sink.writes) > 0

    run(check)


def test_a_download_can_be_cancelled(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        sink = MemorySink(LAYER.size, delay=0.2)
        task = asyncio.ensure_future(case.fetcher.download(LAYER, sink))
        await sink.written.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        written = list(sink.writes)
        await asyncio.sleep(0.3)
        assert sink.writes == written, "nothing is written after it is gone"

    run(check)


def test_a_download_of_what_is_not_there(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        error = await failure(case.fetcher.download(blob(b"absent"), MemorySink(6)))
        assert isinstance(error, PullFailed)
        assert error.code == "NOT_FOUND"

    run(check)


def test_rejecting_the_only_source_leaves_nobody_to_ask(run: Callable[[Check], None]) -> None:
    async def check(case: Case) -> None:
        source = await case.fetcher.download(LAYER, MemorySink(LAYER.size))
        assert not await case.fetcher.rejected(LAYER, source)
        # It is asked last, not never.
        assert (await case.fetcher.download(LAYER, MemorySink(LAYER.size))).by_endpoint

    run(check)


def test_rejected_says_whether_somebody_else_has_it(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as first, FakeRegistry() as second:
            for fake in (first, second):
                fake.add(IMAGE, NAME.repository, NAME.tag)
            hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{first.url}"]\n[host."{second.url}"]\n'})
            async with client_for(tmp_path) as client:
                for made in (client, ThrottledRegistry(client, Throttle(64 * MIB))):
                    fetcher = made.fetcher(NAME)
                    assert await fetcher.rejected(LAYER, BlobSource({f"{first.url}/v2": 1}))
                    assert set((await fetcher.download(LAYER, MemorySink(LAYER.size))).by_endpoint) == {f"{second.url}/v2"}

    asyncio.run(main())


# --- Repository


class Bytes:
    """A BlobReader."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_at(self, offset: int, count: int) -> bytes:
        return self._data[offset : offset + count]


@pytest.fixture(params=["client", "throttled"])
def repository_run(
    request: pytest.FixtureRequest, tmp_path: Path, registry: RealRegistry
) -> Callable[[Callable[[Repository], Awaitable[None]]], None]:
    """Checks run on a repository of docker-registry that is empty at first."""
    name = Reference.parse(f"docker.io/contract/{request.node.name.partition('[')[0].removeprefix('test_')[-40:]}-{request.param}:1")

    def runner(check: Callable[[Repository], Awaitable[None]]) -> None:
        async def main() -> None:
            async with case(request.param, tmp_path, registry) as made:
                await check(made.registry.repository(name))

        asyncio.run(main())

    return runner


async def push(repository: Repository, image: BuiltDocument, tag: str) -> Descriptor:
    for digest, data in image.blobs.items():
        await repository.push_blob(Descriptor("application/octet-stream", digest, len(data)), Bytes(data))
    return await repository.push_manifest(image.data, image.media_type, tag)


@pytest.mark.compat
def test_what_is_pushed_is_there_and_is_not_sent_twice(repository_run: Callable[[Callable[[Repository], Awaitable[None]]], None]) -> None:
    async def check(repository: Repository) -> None:
        first, second = blob(noise(100, seed=5)), blob(noise(300_000, seed=6))
        assert not await repository.has_blob(first.digest)
        assert await repository.push_blob(first, Bytes(noise(100, seed=5)))
        assert await repository.push_blob(second, Bytes(noise(300_000, seed=6)), chunk_size=100_000)
        for pushed in (first, second):
            assert await repository.has_blob(pushed.digest)
            assert not await repository.push_blob(pushed, Bytes(b"never read"))
        mounted = blob(BYTES)
        assert not await repository.push_blob(mounted, Bytes(b"never read"), mount_from=NAME.repository)
        assert await repository.has_blob(mounted.digest)

    repository_run(check)


@pytest.mark.compat
def test_a_blob_that_is_not_what_its_digest_says_is_refused(
    repository_run: Callable[[Callable[[Repository], Awaitable[None]]], None],
) -> None:
    async def check(repository: Repository) -> None:
        wrong = Descriptor("application/octet-stream", Digest.of(b"right"), 5)
        assert isinstance(await failure(repository.push_blob(wrong, Bytes(b"wrong"))), PullFailed)
        assert (await failure(repository.push_blob(wrong, Bytes(b"too")))).code == "INVALID_ARGUMENT"
        assert not await repository.has_blob(wrong.digest)

    repository_run(check)


@pytest.mark.compat
def test_manifests_tags_referrers_and_their_end(repository_run: Callable[[Callable[[Repository], Awaitable[None]]], None]) -> None:
    async def check(repository: Repository) -> None:
        assert (await failure(repository.tags())).code == "NOT_FOUND"
        pushed = await push(repository, IMAGE, "1")
        assert pushed == Descriptor(OCI_MANIFEST, IMAGE.digest, len(IMAGE.data))
        await repository.push_manifest(IMAGE.data, IMAGE.media_type, "2")
        await repository.push_manifest(IMAGE.data, IMAGE.media_type, IMAGE.digest)
        error = await failure(repository.push_manifest(IMAGE.data, IMAGE.media_type, Digest.of(b"another")))
        assert isinstance(error, InvalidArgument)
        assert sorted(await repository.tags()) == ["1", "2"]
        assert await repository.referrers(IMAGE.digest) == []
        await repository.delete(IMAGE.digest)
        assert (await failure(repository.delete(IMAGE.digest))).code == "NOT_FOUND"
        await repository.delete_blob(LAYER.digest)
        assert not await repository.has_blob(LAYER.digest)
        assert (await failure(repository.delete_blob(LAYER.digest))).code == "NOT_FOUND"

    repository_run(check)


# --- An archive: everything is stored before anybody asks, so all it does is name the image and refuse the rest.


def test_an_archive_stands_for_its_image_and_has_nothing_to_download() -> None:
    async def main() -> None:
        target, threads = Descriptor(OCI_MANIFEST, IMAGE.digest, len(IMAGE.data)), Threads(1, "test")
        source: Registry = ArchiveSource(target, "archive a.tar", frozenset(), MemoryStore(), threads)
        found = await source.resolve(NAME)
        assert (found.descriptor, found.endpoint) == (target, "archive a.tar")
        fetcher = source.fetcher(NAME)
        for work in (fetcher.document(target, limit=MAX_DOCUMENT), fetcher.download(LAYER, MemorySink(LAYER.size))):
            error = await failure(work)
            assert isinstance(error, NotFound)
            assert error.where == "archive a.tar"
        assert not await fetcher.rejected(LAYER, BlobSource())
        with pytest.raises(FailedPrecondition):
            source.repository(NAME)
        await source.close()
        threads.close()

    asyncio.run(main())
