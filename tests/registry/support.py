"""What the tests of the registry client share: clients over a hosts.d of the test, sinks, images."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.oci import MAX_DOCUMENT, Descriptor, Digest, Manifest, parse_document
from imgsvc.base.reference import Reference
from imgsvc.registry.client import RegistryClient, RegistrySettings
from imgsvc.registry.download import Pace
from imgsvc.registry.endpoint import CredentialSource
from imgsvc.registry.http.bulk import BulkTransport
from imgsvc.registry.http.exchange import Timeouts
from imgsvc.registry.interfaces import BlobSource, Credential
from tests.support.images import BuiltDocument, Entry, image, layer

T = TypeVar("T")
APART: ContextVar[bool] = ContextVar("blobs are fetched by a process of its own", default=False)
QUICK = Timeouts(connect=2.0, headers=2.0, stall=0.5)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine to its end."""
    return asyncio.run(work)


def hosts_d(root: Path, files: Mapping[str, str]) -> Path:
    """Write ROOT/<namespace>/hosts.toml files."""
    for namespace, text in files.items():
        directory = root / namespace
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "hosts.toml").write_text(text)
    return root


@asynccontextmanager
async def client_for(
    root: Path,
    *,
    credentials: CredentialSource | None = None,
    timeouts: Timeouts = QUICK,
    pace: Pace | None = None,
    environ: Mapping[str, str] | None = None,
    **settings: Any,
) -> AsyncIterator[RegistryClient]:
    """A client that reads hosts.toml below `root` and no proxies from outside."""
    made = RegistrySettings(roots=(str(root),), timeouts=timeouts, pace=pace or Pace(), environ=environ or {}, **settings)
    async with AsyncExitStack() as stack:
        bulk = BulkTransport() if APART.get() else None
        if bulk:
            stack.push_async_callback(bulk.aclose)
        client = RegistryClient(made, credentials, bulk=bulk)
        stack.push_async_callback(client.close)
        yield client


@dataclass(slots=True)
class MemorySink:
    """A BlobSink that refuses to be written twice at one place."""

    size: int
    have: list[tuple[int, int]] = field(default_factory=list)  # (offset, length) already there
    data: bytearray = field(init=False)
    writes: list[tuple[int, int]] = field(default_factory=list)
    delay: float = 0.0
    written: asyncio.Event = field(default_factory=asyncio.Event)  # after the first write

    def __post_init__(self) -> None:
        self.data = bytearray(self.size)

    def missing(self) -> list[tuple[int, int]]:
        gaps, at = [], 0
        for offset, length in sorted([*self.have, *self.writes]):
            if offset > at:
                gaps.append((at, offset - at))
            at = max(at, offset + length)
        return [*gaps, (at, self.size - at)] if at < self.size else gaps

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        end = offset + len(data)
        assert end <= self.size, "written beyond the end"
        assert all(end <= o or o + n <= offset for o, n in self.writes), "written twice"
        self.writes.append((offset, len(data)))
        if self.delay:
            await asyncio.sleep(self.delay)
        self.data[offset:end] = data
        self.written.set()

    @property
    def digest(self) -> Digest:
        return Digest.of(bytes(self.data))


class Bytes:
    """A BlobReader."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_at(self, offset: int, count: int) -> bytes:
        return self._data[offset : offset + count]


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that no compression or coincidence makes equal."""
    return random.Random(seed).randbytes(size)


def image_of(*blobs: bytes) -> BuiltDocument:
    """An image whose layers are one file each."""
    return image([layer([Entry("f", blob)], "plain") for blob in blobs or (b"hello",)])


async def pull(client: RegistryClient, reference: str, credential: Credential | None = None) -> tuple[Manifest, dict[Digest, BlobSource]]:
    """Resolve and fetch everything of an image; blobs are checked."""
    parsed = Reference.parse(reference)
    resolved = await client.resolve(parsed, credential)
    fetcher = client.fetcher(parsed, credential)
    manifest = parse_document(await fetcher.document(resolved.descriptor, limit=MAX_DOCUMENT), resolved.descriptor.media_type, reference)
    assert isinstance(manifest, Manifest)
    await fetcher.document(manifest.config, limit=MAX_DOCUMENT)
    sources = {}
    for entry in manifest.layers:
        sink = MemorySink(entry.size)
        sources[entry.digest] = await fetcher.download(entry, sink)
        assert sink.digest == entry.digest
    return manifest, sources


def blob(data: bytes) -> Descriptor:
    """The descriptor of some bytes as a layer."""
    return Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(data), len(data))


def fails(work: Coroutine[Any, Any, Any]) -> ImgsvcError:
    """The error a coroutine ends with."""
    with pytest.raises(ImgsvcError) as caught:
        run(work)
    return caught.value
