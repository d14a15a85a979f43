"""A content store in memory. Only its descriptors are real: a memfd per blob, since callers hand descriptors on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from imgsvc.base.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, OutOfRange, Unavailable
from imgsvc.base.oci import Digest
from imgsvc.content.interfaces import ContentReader, Info, IngestStatus, Store, Writer


class MemoryReader:
    def __init__(self, data: bytes, fd: int) -> None:
        self._data = data
        self._fd = fd

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, count: int) -> bytes:
        if not 0 <= offset <= len(self._data):
            raise OutOfRange("offset beyond the end")
        return self._data[offset : offset + count]

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MemoryIngest:
    """One byte of `present` per byte of `data`: slow and obviously right."""

    def __init__(self, ingest_ref: str, total: int | None, expected: Digest | None) -> None:
        now = datetime.now(UTC)
        self.status = IngestStatus(ingest_ref, 0, total, expected, now, now)
        self.data = bytearray()
        self.present = bytearray()
        self.held = False

    @property
    def prefix(self) -> int:
        gap = self.present.find(0)
        return len(self.present) if gap < 0 else gap


class MemoryWriter:
    def __init__(self, store: MemoryStore, ingest: MemoryIngest) -> None:
        self._store = store
        self._ingest = ingest
        self._fd = os.memfd_create("ingest", os.MFD_CLOEXEC)
        self._follow = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.pwrite(self._fd, ingest.data, 0)
        self._closed = False

    @property
    def ingest_ref(self) -> str:
        return self._ingest.status.ingest_ref

    def write(self, data: bytes | memoryview) -> None:
        self.write_at(self._ingest.prefix, data)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        self._check_open()
        end = offset + len(data)
        total = self._ingest.status.total
        if offset < 0:
            raise OutOfRange("negative offset")
        if total is not None and end > total:
            raise DataLoss("more than the expected total")
        for buffer in (self._ingest.data, self._ingest.present):
            buffer.extend(bytes(max(0, end - len(buffer))))
        self._ingest.data[offset:end] = data
        self._ingest.present[offset:end] = b"\1" * len(data)
        os.pwrite(self._fd, data, offset)

    def missing(self) -> list[tuple[int, int]]:
        total = self._ingest.status.total
        if total is None:
            raise FailedPrecondition("total unknown")
        gaps: list[tuple[int, int]] = []
        for offset, there in enumerate(self._ingest.present.ljust(total, b"\0")):
            if not there and gaps and sum(gaps[-1]) == offset:
                gaps[-1] = (gaps[-1][0], gaps[-1][1] + 1)
            elif not there:
                gaps.append((offset, 1))
        return gaps

    def status(self) -> IngestStatus:
        self._check_open()
        return replace(self._ingest.status, offset=self._ingest.prefix)

    def fileno(self) -> int:
        return self._follow

    def truncate(self, size: int) -> None:
        self._check_open()
        del self._ingest.data[size:], self._ingest.present[size:]
        os.ftruncate(self._fd, len(self._ingest.data))

    def commit(
        self, size: int | None, expected: Digest, labels: Mapping[str, str] | None = None, *, verified: Callable[[], None] = lambda: None
    ) -> Info:
        self._check_open()
        self.close()
        ingest = self._store.ingests.pop(self.ingest_ref)
        wanted = next((s for s in (size, ingest.status.total) if s is not None), len(ingest.data))
        if ingest.prefix != wanted or len(ingest.data) != wanted or Digest.of(bytes(ingest.data), expected.algorithm) != expected:
            raise DataLoss("size or digest differs")
        verified()
        return self._store.publish(expected, bytes(ingest.data), dict(labels or {}))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._ingest.held = False
            os.close(self._fd)
            os.close(self._follow)

    def _check_open(self) -> None:
        if self._closed:
            raise FailedPrecondition("closed")


class MemoryStore:
    def __init__(self) -> None:
        self.blobs: dict[Digest, tuple[Info, bytes]] = {}
        self.ingests: dict[str, MemoryIngest] = {}

    def publish(self, digest: Digest, data: bytes, labels: dict[str, str]) -> Info:
        now = datetime.now(UTC)
        old = self.blobs[digest][0] if digest in self.blobs else Info(digest, len(data), now, now)
        info = replace(old, updated_at=now, labels={**old.labels, **labels})
        self.blobs[digest] = (info, data)
        return info

    def info(self, digest: Digest) -> Info | None:
        return self.blobs[digest][0] if digest in self.blobs else None

    def reader(self, digest: Digest) -> ContentReader:
        if digest not in self.blobs:
            raise NotFound("no such blob")
        data = self.blobs[digest][1]
        fd = os.memfd_create("blob", os.MFD_CLOEXEC)
        os.pwrite(fd, data, 0)
        return MemoryReader(data, fd)

    def writer(self, ingest_ref: str, *, total: int | None = None, expected: Digest | None = None) -> Writer:
        if not ingest_ref or (total is not None and total < 0):
            raise InvalidArgument("empty ingest_ref or impossible size")
        old = self.ingests.get(ingest_ref)
        if old is not None and old.held:
            raise Unavailable("held")
        if old is None or (old.status.total, old.status.expected) != (total, expected):
            old = self.ingests[ingest_ref] = MemoryIngest(ingest_ref, total, expected)
        old.held = True
        return MemoryWriter(self, old)

    def status(self, ingest_ref: str) -> IngestStatus | None:
        ingest = self.ingests.get(ingest_ref)
        return None if ingest is None else replace(ingest.status, offset=ingest.prefix)

    def list_statuses(self) -> list[IngestStatus]:
        return [replace(ingest.status, offset=ingest.prefix) for ingest in self.ingests.values()]

    def abort(self, ingest_ref: str) -> None:
        ingest = self.ingests.get(ingest_ref)
        if ingest is not None and ingest.held:
            raise Unavailable("held")
        self.ingests.pop(ingest_ref, None)

    def walk(self) -> Iterator[Info]:
        yield from [info for info, _ in self.blobs.values()]

    def update(self, digest: Digest, labels: Mapping[str, str | None]) -> Info:
        if digest not in self.blobs:
            raise NotFound("no such blob")
        info, data = self.blobs[digest]
        merged = {**info.labels, **labels}
        info = replace(info, labels={key: value for key, value in merged.items() if value is not None})
        self.blobs[digest] = (info, data)
        return info

    def delete(self, *digests: Digest) -> None:
        for digest in digests:
            self.blobs.pop(digest, None)


def as_store(store: MemoryStore) -> Store:
    return store
