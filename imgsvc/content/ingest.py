"""Unfinished writes on disk, and the writer that fills one.

One directory per ingest, named by the SHA-256 of its ingest_ref:

    record    JSON, written once: ingest_ref, total, expected, started_at, boot
    data      the bytes, possibly with holes
    journal   16 bytes (offset, length) per completed write, appended after the data

A process that is killed loses nothing: data and journal are in the page cache, in that order. A power cut may lose pages
of either, so an ingest from an earlier boot is dropped instead of trusted. Bytes are hashed as the gapless prefix grows;
what arrived out of order, or before a restart, is read back and hashed then. Only the final digest decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument, OutOfRange, Unavailable, from_os_error, printable
from imgsvc.base.failpoints import failpoint
from imgsvc.base.fsutil import boot_id, private_dir, require_space, write_atomic
from imgsvc.base.oci import MAX_SIZE, MIB, Digest
from imgsvc.base.removal import discard, remove_tree
from imgsvc.content.interfaces import Info, IngestStatus, Writer
from imgsvc.content.ranges import RangeSet
from imgsvc.content.verify import DigestMismatch, PrefixHash, SizeMismatch, digest_of

log = logging.getLogger(__name__)

CATCH_UP: Final = 8 * MIB  # [bytes] hashed per write beyond the write's own, so that no single write waits long
MAX_INGEST_REF: Final = 4096  # [characters]
_JOURNAL_ENTRY: Final = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Finished:
    """A verified ingest on its way to becoming a blob. path and fd are those of its data file."""

    path: Path
    fd: int
    digest: Digest
    size: int
    labels: Mapping[str, str]


Publish = Callable[[Finished], Info]


@dataclass(frozen=True, slots=True)
class IngestRecord:
    """The metadata of an ingest."""

    ingest_ref: str
    total: int | None
    expected: Digest | None
    started_at: datetime
    boot: str

    def save(self, directory: Path) -> None:
        """Write it once; not synced, since a power cut ends the ingest anyway."""
        record = {
            "ingest_ref": self.ingest_ref,
            "total": self.total,
            "expected": self.expected,
            "started_at": self.started_at.isoformat(),
            "boot": self.boot,
        }
        write_atomic(directory / "record", json.dumps(record).encode(), sync=False)

    @classmethod
    def load(cls, directory: Path) -> IngestRecord | None:
        """The record, or None when there is none that can be used."""
        try:
            record = json.loads((directory / "record").read_bytes())
            expected = record["expected"]
            return cls(
                ingest_ref=str(record["ingest_ref"]),
                total=None if record["total"] is None else int(record["total"]),
                expected=None if expected is None else Digest(expected),
                started_at=datetime.fromisoformat(record["started_at"]),
                boot=str(record["boot"]),
            )
        except (OSError, ValueError, KeyError, TypeError, InvalidArgument):
            return None


class IngestWriter:
    """See content.interfaces.Writer. Threads may write different ranges at once."""

    def __init__(self, directory: Path, record: IngestRecord, publish: Publish, release: Callable[[str], None]) -> None:
        self._directory = directory
        self._record = record
        self._publish = publish
        self._release = release
        self._ranges = RangeSet()
        self._idle = threading.Condition()  # guards ranges, journal and the two below
        self._running = 0  # calls that use the descriptors; they are not closed under them
        self._closed = False
        self._failure: ImgsvcError | None = None  # a failed disk: the ingest goes when the writer closes
        self._hashing = threading.Lock()
        self._hash = PrefixHash(record.expected.algorithm if record.expected else "sha256")
        with contextlib.ExitStack() as undo:
            flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(directory / "data", os.O_RDWR | flags, 0o600)
            undo.callback(os.close, self._fd)
            self._read_fd = os.open(directory / "data", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, self._read_fd)
            self._journal_fd = os.open(directory / "journal", os.O_RDWR | os.O_APPEND | flags, 0o600)
            undo.callback(os.close, self._journal_fd)
            self._ranges = load_ranges(directory)
            os.ftruncate(self._journal_fd, os.fstat(self._journal_fd).st_size // _JOURNAL_ENTRY.size * _JOURNAL_ENTRY.size)
            self._undo = undo.pop_all()

    @property
    def ingest_ref(self) -> str:
        """See Writer."""
        return self._record.ingest_ref

    def write(self, data: bytes | memoryview) -> None:
        """Not atomic between threads: parallel writers use write_at."""
        with self._idle:
            offset = self._ranges.prefix
        self.write_at(offset, data)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Survives the end of the process on return. A failed disk ends the ingest and frees its space at once."""
        end = offset + len(data)
        total = MAX_SIZE if self._record.total is None else self._record.total
        if offset < 0:
            raise OutOfRange(f"negative offset {offset}", where=self._where)
        if end > total:
            raise SizeMismatch(total, end, self._where)
        with self._using():
            failpoint("content.write")
            _pwrite_all(self._fd, data, offset)
            failpoint("content.written")
            with self._idle:
                self._ranges.add(offset, end)
                os.write(self._journal_fd, _JOURNAL_ENTRY.pack(offset, len(data)))
            failpoint("content.journaled")
            self._hash_arrival(offset, data)

    def missing(self) -> list[tuple[int, int]]:
        """Raises: FailedPrecondition when the total is unknown."""
        if self._record.total is None:
            raise FailedPrecondition("the missing part is unknown without a total size", where=self._where)
        with self._idle:
            return self._ranges.missing(self._record.total)

    def status(self) -> IngestStatus:
        """Raises: FailedPrecondition when closed."""
        with self._using():
            updated_at = os.fstat(self._fd).st_mtime
            with self._idle:
                return _status(self._record, self._ranges.prefix, updated_at)

    def fileno(self) -> int:
        """A read-only descriptor, safe to hand to another process."""
        return self._read_fd

    def truncate(self, size: int) -> None:
        """See Writer."""
        if size < 0:
            raise OutOfRange(f"negative size {size}", where=self._where)
        with self._using(), self._hashing, self._idle:
            failpoint("content.truncate")
            self._ranges.clip(size)
            # The journal forgets before the data does: what it names is always there.
            os.ftruncate(self._journal_fd, 0)
            os.write(self._journal_fd, b"".join(_JOURNAL_ENTRY.pack(start, end - start) for start, end in self._ranges))
            os.ftruncate(self._fd, self._ranges.end)
            if self._hash.hashed > size:
                self._hash = PrefixHash(self._hash.algorithm)

    def commit(
        self, size: int | None, expected: Digest, labels: Mapping[str, str] | None = None, *, verified: Callable[[], None] = lambda: None
    ) -> Info:
        """See Writer; blocking as long as hashing what is not hashed yet and one fsync take."""
        self._wait_idle()
        try:
            if self._failure is not None:
                raise self._failure
            failpoint("content.commit")
            finished = Finished(self._directory / "data", self._fd, expected, self._check(size, expected), dict(labels or {}))
            verified()
            failpoint("content.commit.checked")
            return self._publish_and_drop(finished)
        except ImgsvcError as error:
            self._failure = error
            raise
        except OSError as error:
            # The descriptor may be that of a published blob by now: nothing is cut here, the directory goes instead.
            self._failure = from_os_error(error, "storing a blob", where=str(self._directory))
            raise self._failure from error
        finally:
            self._finish()

    def close(self) -> None:
        """See Writer."""
        with contextlib.suppress(FailedPrecondition):
            self._wait_idle()
            self._finish()

    @property
    def _where(self) -> str:
        return f"ingest {printable(self._record.ingest_ref, 160)}"

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """Hold the descriptors open; turn a disk error into ours and give the space back at once."""
        with self._idle:
            if self._closed:
                raise FailedPrecondition("the writer is closed", where=self._where)
            if self._failure is not None:
                raise self._failure
            self._running += 1
        try:
            yield
        except OSError as error:
            raise self._disk_failed(error) from error
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _disk_failed(self, error: OSError) -> ImgsvcError:
        failure = from_os_error(error, "storing a blob", where=str(self._directory))
        failure.__cause__ = error
        self._failure = failure
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        return failure

    def _hash_arrival(self, offset: int, data: bytes | memoryview) -> None:
        """Extend the hash with these bytes and some of what they joined, unless another thread is at it."""
        if not self._hashing.acquire(blocking=False):
            return
        try:
            if offset < self._hash.hashed:  # written again: what was hashed no longer counts
                self._hash = PrefixHash(self._hash.algorithm)
            if offset == self._hash.hashed:
                self._hash.feed(data)
            with self._idle:
                prefix = self._ranges.prefix
            self._hash.catch_up(self._fd, min(prefix, self._hash.hashed + CATCH_UP))
        finally:
            self._hashing.release()

    def _check(self, size: int | None, expected: Digest) -> int:
        """The size [bytes], once size and digest are right. Raises: DataLoss, OSError."""
        size = next((s for s in (size, self._record.total) if s is not None), self._ranges.end)
        if self._ranges.end > size:
            raise SizeMismatch(size, self._ranges.end, self._where)
        if self._ranges.prefix < size:
            raise SizeMismatch(size, size - sum(length for _, length in self._ranges.missing(size)), self._where)
        if expected.algorithm == self._hash.algorithm:
            self._hash.catch_up(self._fd, size)
            if self._hash.hashed < size:
                raise SizeMismatch(size, self._hash.hashed, self._where)
            actual = self._hash.digest()
        else:
            actual = digest_of(self._fd, expected.algorithm)
        if actual != expected:
            raise DigestMismatch(expected, actual, self._where)
        return size

    def _publish_and_drop(self, finished: Finished) -> Info:
        info = self._publish(finished)
        failpoint("content.commit.recorded")
        discard(self._directory)
        return info

    def _wait_idle(self) -> None:
        """No further call may start; wait for those under way. Raises: FailedPrecondition when closed before."""
        with self._idle:
            if self._closed:
                raise FailedPrecondition("the writer is closed", where=self._where)
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)

    def _finish(self) -> None:
        self._undo.close()
        if self._failure is not None:
            discard(self._directory)
        self._release(self._record.ingest_ref)


def as_writer(writer: IngestWriter) -> Writer:
    """Lets mypy prove that the contract is met."""
    return writer


class Ingests:
    """The directory of unfinished writes; knows which of them a writer holds."""

    def __init__(self, directory: Path, publish: Publish, clock: Callable[[], datetime], reserve: int) -> None:
        self._directory = private_dir(directory)
        self._publish = publish
        self._clock = clock
        self._reserve = reserve
        self._boot = boot_id()
        self._lock = threading.Lock()
        self._held: set[str] = set()

    def open(self, ingest_ref: str, total: int | None, expected: Digest | None) -> IngestWriter:
        """See content.interfaces.Ingester.writer. An ingest for something else, or from an earlier boot, starts over."""
        if not 0 < len(ingest_ref) <= MAX_INGEST_REF:
            raise InvalidArgument(f"an ingest_ref has 1 to {MAX_INGEST_REF} characters, this one {len(ingest_ref)}")
        if total is not None and not 0 <= total <= MAX_SIZE:
            raise InvalidArgument(f"impossible size of a blob: {total} bytes")
        with self._holding(ingest_ref) as keep:
            directory = self._path(ingest_ref)
            record = IngestRecord.load(directory)
            if record is None or record.boot != self._boot or (record.total, record.expected) != (total, expected):
                self._drop(directory)
                record = IngestRecord(ingest_ref, total, expected, self._clock(), self._boot)
            present = sum(end - start for start, end in load_ranges(directory))
            if total is not None:
                require_space(self._directory, total - present, reserve=self._reserve, doing=f"storing a blob of {total} bytes")
            writer = self._opened(directory, record)
            keep()
            return writer

    def _opened(self, directory: Path, record: IngestRecord) -> IngestWriter:
        """Create what is not there yet; a failed disk leaves nothing of it."""
        try:
            if not directory.exists():
                directory.mkdir(mode=0o700)
                failpoint("content.ingest.created")
                record.save(directory)
                failpoint("content.ingest.recorded")
            return IngestWriter(directory, record, self._publish, self._release)
        except OSError:
            if not load_ranges(directory).end:
                self._drop(directory)
            raise

    def status(self, ingest_ref: str) -> IngestStatus | None:
        """One ingest, or None."""
        return self._load_status(self._path(ingest_ref))

    def list_statuses(self) -> list[IngestStatus]:
        """All ingests that have a record."""
        found = (self._load_status(directory) for directory in self._directory.iterdir())
        return [status for status in found if status is not None]

    def abort(self, ingest_ref: str) -> None:
        """Drop an ingest. Raises: Unavailable when a writer holds it."""
        with self._holding(ingest_ref):
            failpoint("content.abort")
            self._drop(self._path(ingest_ref))

    def clean(self) -> list[str]:
        """Remove what no writer can resume: no record, or from an earlier boot. Returns the directories' names. At start."""
        removed = []
        for directory in self._directory.iterdir():
            record = IngestRecord.load(directory)
            if record is None or record.boot != self._boot:
                try:
                    self._drop(directory)
                except OSError as error:
                    log.warning("ingest %s cannot be resumed, and not be removed: %s", directory, error.strerror)
                    continue
                removed.append(directory.name)
        return removed

    def _path(self, ingest_ref: str) -> Path:
        return self._directory / hashlib.sha256(ingest_ref.encode("utf-8", "surrogateescape")).hexdigest()

    def _drop(self, directory: Path) -> None:
        """Without its record first: half a removal leaves nothing to resume."""
        with contextlib.suppress(NotADirectoryError):
            (directory / "record").unlink(missing_ok=True)
        remove_tree(directory)

    def _load_status(self, directory: Path) -> IngestStatus | None:
        record = IngestRecord.load(directory)
        if record is None:
            return None
        try:
            updated_at = os.stat(directory / "data").st_mtime
        except FileNotFoundError:
            updated_at = record.started_at.timestamp()
        return _status(record, load_ranges(directory).prefix, updated_at)

    @contextlib.contextmanager
    def _holding(self, ingest_ref: str) -> Iterator[Callable[[], object]]:
        """Hold a ref for the block, or longer when the block calls what it was given. Maps OSError."""
        with self._lock:
            if ingest_ref in self._held:
                raise Unavailable("another writer holds it", where=f"ingest {printable(ingest_ref, 160)}")
            self._held.add(ingest_ref)
        with contextlib.ExitStack() as undo:
            undo.callback(self._release, ingest_ref)
            try:
                yield undo.pop_all
            except OSError as error:
                raise from_os_error(error, "opening an ingest", where=str(self._directory)) from error

    def _release(self, ingest_ref: str) -> None:
        with self._lock:
            self._held.discard(ingest_ref)


def load_ranges(directory: Path) -> RangeSet:
    """What the journal says is there, as far as the data file reaches. A torn last entry is left out."""
    ranges = RangeSet()
    try:
        journal = (directory / "journal").read_bytes()
        size = os.stat(directory / "data").st_size
    except FileNotFoundError:
        return ranges
    whole = len(journal) - len(journal) % _JOURNAL_ENTRY.size
    for offset, length in _JOURNAL_ENTRY.iter_unpack(journal[:whole]):
        ranges.add(offset, offset + length)
    ranges.clip(size)
    return ranges


def _status(record: IngestRecord, offset: int, updated_at: float) -> IngestStatus:
    updated = datetime.fromtimestamp(updated_at, UTC)
    return IngestStatus(record.ingest_ref, offset, record.total, record.expected, record.started_at, updated)


def _pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
