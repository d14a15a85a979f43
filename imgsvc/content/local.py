"""The content store on a local file system.

    ROOT/content/blobs/<alg>/<hex>    one file per blob, read-only; the layout of an OCI image layout, for other tools
    ROOT/content/ingest/              unfinished writes (ingest.py)
    metadata table "content"          size, times, labels and the file's stamp, by digest

A blob exists when its record does. Storing: check, sync the file, rename, sync the directory, record. Deleting: record
first. So a kill at any moment leaves a file without a record at worst, which recovery adopts or removes.

The stamp is the file's modification and change time after it was renamed. While it is the same, the file was not written to
through the kernel, and reading it needs no second hash; when it differs, the blob is hashed before it is served. What
neither shows, a disk that returns other bytes than it was given, is for `fsck` and for readers that verify as they go.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import DataLoss, InvalidArgument, NotFound, OutOfRange, from_os_error
from imgsvc.base.failpoints import failpoint
from imgsvc.base.fsutil import private_dir, sync_dir
from imgsvc.base.metadb.database import MetaDB, Record, WriteTxn
from imgsvc.base.oci import MIB, Digest
from imgsvc.base.removal import remove_tree
from imgsvc.content.ingest import Finished, Ingests
from imgsvc.content.interfaces import ContentReader, Fault, Info, IngestStatus, Scrubbable, Store, Writer
from imgsvc.content.verify import digest_of

TABLE: Final = "content"
ALGORITHMS: Final = ("sha256", "sha512")
# Kept free for the metadata database: deleting things, which is the way out of a full disk, has to write there first.
DEFAULT_RESERVE: Final = 32 * MIB
_PAGE: Final = 512  # records read at a time
_LOCKS: Final = 64  # publishing and deleting exclude each other per digest, by hash


class LocalReader:
    """See content.interfaces.ContentReader."""

    def __init__(self, fd: int, size: int, where: str) -> None:
        self._fd = fd
        self._size = size
        self._where = where

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def read_at(self, offset: int, count: int) -> bytes:
        """Raises also: DataLoss when the disk cannot read."""
        if not 0 <= offset <= self._size:
            raise OutOfRange(f"offset {offset} is outside of 0 to {self._size}", where=self._where)
        try:
            return os.pread(self._fd, count, offset)
        except OSError as error:
            raise from_os_error(error, "reading a blob", where=self._where) from error

    def fileno(self) -> int:
        """Read-only; -1 when closed."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def as_reader(reader: LocalReader) -> ContentReader:
    """Lets mypy prove that the contract is met."""
    return reader


def _utc_now() -> datetime:
    return datetime.now(UTC)


class LocalStore:
    """See content.interfaces.Store and Scrubbable. Thread-safe."""

    def __init__(
        self, root: Path, db: MetaDB, *, sync: bool, reserve: int = DEFAULT_RESERVE, clock: Callable[[], datetime] = _utc_now
    ) -> None:
        """Open or create below `root`. sync: commit() survives power loss. reserve: space to keep free [bytes].

        Raises: ResourceExhausted, PermissionDenied.
        """
        self._db = db
        self._sync = sync
        self._clock = clock
        self._blobs = root / "content" / "blobs"
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))
        try:
            for directory in (root / "content", self._blobs, *(self._blobs / name for name in ALGORITHMS)):
                private_dir(directory)
            self._ingests = Ingests(root / "content" / "ingest", self._publish, clock, reserve)
            if sync:
                sync_dir(self._blobs)
                sync_dir(root / "content")
                sync_dir(root)
        except OSError as error:
            raise from_os_error(error, "opening the content store", where=str(root)) from error

    # Provider

    def info(self, digest: Digest) -> Info | None:
        """See Provider."""
        record = self._record(digest)
        if record is None or self._fault(digest, record) is not None:
            return None
        return _info(digest, record)

    def reader(self, digest: Digest) -> LocalReader:
        """See Provider."""
        record = self._record(digest)
        if record is None:
            raise NotFound(f"blob {digest} is not here", where=str(self._path(digest)))
        fault = self._fault(digest, record)
        if fault is not None:
            raise DataLoss(
                f"blob {digest} is {fault}", where=str(self._path(digest)), hint="pull the image again, or run `imgsvc fsck --repair`"
            )
        try:
            return LocalReader(self._open(digest), record["size"], str(self._path(digest)))
        except OSError as error:
            raise from_os_error(error, "opening a blob", where=str(self._path(digest))) from error

    # Ingester, IngestManager

    def writer(self, ingest_ref: str, *, total: int | None = None, expected: Digest | None = None) -> Writer:
        """Raises also: ResourceExhausted when the rest does not fit beside the reserve."""
        return self._ingests.open(ingest_ref, total, expected)

    def status(self, ingest_ref: str) -> IngestStatus | None:
        """See IngestManager."""
        return self._ingests.status(ingest_ref)

    def list_statuses(self) -> list[IngestStatus]:
        """See IngestManager."""
        return self._ingests.list_statuses()

    def abort(self, ingest_ref: str) -> None:
        """See IngestManager."""
        self._ingests.abort(ingest_ref)

    def clean_ingests(self) -> list[str]:
        """Remove unfinished writes that cannot be resumed; returns their directories' names. Run at start."""
        return self._ingests.clean()

    # Manager

    def walk(self) -> Iterator[Info]:
        """Reads the records a page at a time, without their files."""
        last = ""
        while True:
            with self._db.read() as txn:
                page = list(itertools.islice(txn.items(TABLE, after=last), _PAGE))
            for last, record in page:
                yield _info(Digest(last), record)
            if len(page) < _PAGE:
                return

    def update(self, digest: Digest, labels: Mapping[str, str | None]) -> Info:
        """See Manager."""
        now = self._clock().isoformat()

        def change(txn: WriteTxn) -> Record:
            record = txn.get(TABLE, digest)
            if record is None:
                raise NotFound(f"blob {digest} is not here")
            merged = {**record["labels"], **labels}
            record |= {"updated": now, "labels": {key: value for key, value in merged.items() if value is not None}}
            txn.put(TABLE, digest, record)
            return record

        failpoint("content.update")
        return _info(digest, self._db.write(change))

    def delete(self, *digests: Digest) -> None:
        """See Manager; open readers keep theirs."""

        def forget(txn: WriteTxn) -> None:
            for digest in digests:
                txn.delete(TABLE, digest)

        failpoint("content.delete")
        with contextlib.ExitStack() as locked:
            for number in sorted({hash(digest) % _LOCKS for digest in digests}):  # always in one order, so that two callers cannot deadlock
                locked.enter_context(self._locks[number])
            self._db.write(forget)
            failpoint("content.delete.forgotten")
            for digest in digests:
                try:
                    remove_tree(self._path(digest))
                except OSError as error:
                    raise from_os_error(error, "deleting a blob", where=str(self._path(digest))) from error
        failpoint("content.delete.unlinked")

    # Scrubbable

    def check(self, digest: Digest, *, deep: bool, cancel: CancelToken | None = None) -> Fault | None:
        """See Scrubbable."""
        record = self._record(digest)
        while record is not None:
            fault = self._fault(digest, record, deep=deep, cancel=cancel)
            now = self._record(digest)
            if fault is None or now == record:
                return fault
            record = now  # deleted, or deleted and stored again, during the check
        return None

    def strays(self) -> list[Digest]:
        """See Scrubbable."""
        found = []
        for algorithm in ALGORITHMS:
            for name in os.listdir(self._blobs / algorithm):
                with contextlib.suppress(InvalidArgument):
                    digest = Digest(f"{algorithm}:{name}")
                    if self._record(digest) is None:
                        found.append(digest)
        return found

    def adopt(self, digest: Digest, cancel: CancelToken | None = None) -> bool:
        """See Scrubbable."""
        with self._lock(digest):
            if self._record(digest) is not None:  # stored meanwhile
                return True
            try:
                if not self._is_sound(digest, cancel):
                    remove_tree(self._path(digest))
                    return False
                failpoint("content.adopt")
                self._record_blob(digest, {})
            except OSError as error:
                raise from_os_error(error, "adopting a blob", where=str(self._path(digest))) from error
        return True

    def _is_sound(self, digest: Digest, cancel: CancelToken | None) -> bool:
        """Whether a stray is what its name says; on disk, then."""
        if not stat.S_ISREG(os.lstat(self._path(digest)).st_mode):
            return False
        fd = self._open(digest)
        try:
            sound = digest_of(fd, digest.algorithm, cancel) == digest
            if sound and self._sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        return sound

    def _publish(self, finished: Finished) -> Info:
        """Make a verified ingest a blob; replaces the file of a blob that exists, which heals a broken one."""
        target = self._path(finished.digest)
        os.fchmod(finished.fd, 0o400)
        if self._sync:
            os.fsync(finished.fd)
        failpoint("content.commit.synced")
        with self._lock(finished.digest):
            if target.is_dir():  # rename replaces everything else
                remove_tree(target)
            os.rename(finished.path, target)
            try:
                failpoint("content.commit.renamed")
                if self._sync:
                    sync_dir(target.parent)
                failpoint("content.commit.dirsynced")
                return self._record_blob(finished.digest, finished.labels)
            except BaseException:
                if self._record(finished.digest) is None:
                    target.unlink(missing_ok=True)
                raise

    def _record_blob(self, digest: Digest, labels: Mapping[str, str]) -> Info:
        now = self._clock().isoformat()
        file = os.stat(self._path(digest))

        def change(txn: WriteTxn) -> Record:
            old = txn.get(TABLE, digest) or {"created": now, "labels": {}}
            record = {
                "size": file.st_size,
                "created": old["created"],
                "updated": now,
                "labels": {**old["labels"], **labels},
                "stamp": _stamp(file),
            }
            txn.put(TABLE, digest, record)
            return record

        return _info(digest, self._db.write(change))

    def _fault(self, digest: Digest, record: Record, *, deep: bool = False, cancel: CancelToken | None = None) -> Fault | None:
        try:
            found = os.lstat(self._path(digest))
            if not stat.S_ISREG(found.st_mode):
                return Fault.FOREIGN
            if found.st_size != record["size"]:
                return Fault.EMPTY if found.st_size == 0 else Fault.SIZE
            if not deep and _stamp(found) == record["stamp"]:
                return None
            fd = self._open(digest)
            try:
                if digest_of(fd, digest.algorithm, cancel) != digest:
                    return Fault.ALTERED
            finally:
                os.close(fd)
        except FileNotFoundError:
            return Fault.MISSING
        except OSError:
            return Fault.UNREADABLE
        if _stamp(found) != record["stamp"]:
            self._restamp(digest, _stamp(found))
        return None

    def _restamp(self, digest: Digest, stamp: list[int]) -> None:
        """Remember that the touched file was found sound. Does not wait: if the record is missing, the next reader hashes again."""

        def change(txn: WriteTxn) -> None:
            record = txn.get(TABLE, digest)
            if record is not None:
                txn.put(TABLE, digest, {**record, "stamp": stamp})

        self._db.submit(change)

    def _record(self, digest: Digest) -> Record | None:
        with self._db.read() as txn:
            return txn.get(TABLE, digest)

    def _path(self, digest: Digest) -> Path:
        return self._blobs / digest.algorithm / digest.hex

    def _open(self, digest: Digest) -> int:
        return os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def _lock(self, digest: Digest) -> threading.Lock:
        return self._locks[hash(digest) % _LOCKS]


def as_store(store: LocalStore) -> Store:
    """Lets mypy prove that the contract is met."""
    return store


def as_scrubber(store: LocalStore) -> Scrubbable:
    """Lets mypy prove that the contract is met."""
    return store


def _stamp(file: os.stat_result) -> list[int]:
    return [file.st_mtime_ns, file.st_ctime_ns]


def _info(digest: Digest, record: Record) -> Info:
    created, updated = (datetime.fromisoformat(record[key]) for key in ("created", "updated"))
    return Info(digest, record["size"], created, updated, record["labels"])
