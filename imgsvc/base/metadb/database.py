"""The metadata database: one LMDB environment, one writer thread, JSON records in named tables.

Readers run on any thread and see one consistent snapshot. Writers hand a function to the writer thread; the functions
that wait there together share one LMDB transaction and so one fsync (group commit), each in its own nested transaction
so that one failing takes nothing of the others with it. LMDB allows one write transaction per environment and does not
refuse use from a wrong thread, hence the single thread.

Decisions, and what they cost:

* The map is 16 GiB of address space from the start. It takes neither disk nor memory until used, so the database grows
  without a restart and without the quiet moment that resizing a map in use would need.
* `sync=False` (images.sync = "none") leaves out LMDB's second fsync per commit only. A power cut may then undo the last
  transactions, but never breaks the database; leaving out both could lose all of it.
* LMDB writes new pages to delete something, so on a full disk nothing could be removed any more. The file therefore owns
  a few MiB of blocks beyond its end, which only a disk that is full already lets shrink.
* LMDB keeps no checksums. Damaged pages are noticed when the file is opened (pagecheck), before LMDB stumbles over them;
  damaged records when they no longer parse, and scrub() forgets those one by one.
* Records carry a format number: a newer one is refused untouched, an older one is migrated in one transaction.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb

from imgsvc.base.errors import (
    DataLoss,
    FailedPrecondition,
    ImgsvcError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    from_os_error,
    printable,
)
from imgsvc.base.failpoints import failpoint
from imgsvc.base.fsutil import boot_id, free_space, lock_exclusive, private_dir, reserve_blocks
from imgsvc.base.metadb import pagecheck
from imgsvc.base.oci import GIB, MIB

log = logging.getLogger(__name__)

T = TypeVar("T")
Record = dict[str, Any]

TABLES: Final = (
    "meta",
    "images",
    "content",
    "snapshots",
    "leases",
    "sandboxes",
    "containers",
    "prepull",
    "verdicts",
    "layers",
    "mirror",
    "provenance",
)
MAX_BATCH: Final = 256  # writes that share one commit; bounds how long the first of them waits
MAX_KEY: Final = 511  # [bytes], LMDB's limit
_MAP_SIZE: Final = 16 * GIB  # [bytes] of address space; 100 000 layers need about 0.1 GiB of it
_SMALLEST_MAP: Final = 64 * MIB  # [bytes] below which a limit on address space is an error
_HEADROOM: Final = 4 * MIB  # [bytes] of blocks ahead of the last page; deleting a whole image writes less than 1 MiB
_MAX_READERS: Final = 512  # read transactions open at one time
_DATA: Final = "data.mdb"
_SET_ASIDE: Final = "data.mdb.broken"


@dataclass(frozen=True, slots=True)
class Schema:
    """Format of the records. migrations[N] turns format N into N + 1; it sees every table and must be a pure change."""

    format: int = 1
    tables: tuple[str, ...] = TABLES
    migrations: Mapping[int, Callable[[WriteTxn], None]] = field(default_factory=dict)


class LastEnd(StrEnum):
    """How the previous daemon on this root ended."""

    CLEAN = "clean"  # closed, or there was none
    KILLED = "killed"  # without closing, in this boot: everything written is still in the page cache
    POWER = "power"  # without closing, in an earlier boot: what was not synced may be gone


class ReadTxn:
    """A consistent view. Valid inside its `with` block and on its thread only."""

    def __init__(self, txn: lmdb.Transaction, tables: Mapping[str, Any]) -> None:
        self._txn = txn
        self._tables = tables

    def get(self, table: str, key: str) -> Record | None:
        """One record, or None. Raises: DataLoss when it cannot be parsed."""
        raw = self._txn.get(_key(key), db=self._tables[table])
        return None if raw is None else _parse(table, key, raw)

    def items(self, table: str, prefix: str = "", *, after: str = "") -> Iterator[tuple[str, Record]]:
        """Records whose key starts with `prefix`, in key order. Raises: DataLoss when one cannot be parsed.

        after: begin behind this key. Large tables are read in pages, so that no view stays open for long.
        """
        beginning = prefix.encode()
        start = max(beginning, after.encode() + b"\0") if after else beginning
        with self._txn.cursor(db=self._tables[table]) as cursor:
            found = cursor.set_range(start) if start else cursor.first()
            while found and (raw := bytes(cursor.key())).startswith(beginning):
                key = _text(table, raw)
                yield key, _parse(table, key, cursor.value())
                found = cursor.next()

    def broken(self, table: str) -> list[bytes]:
        """Keys of records that cannot be parsed."""
        found = []
        with self._txn.cursor(db=self._tables[table]) as cursor:
            for key, value in cursor:
                try:
                    _parse(table, _text(table, bytes(key)), value)
                except DataLoss:
                    found.append(bytes(key))
        return found

    def count(self, table: str) -> int:
        """Number of records."""
        return int(self._txn.stat(self._tables[table])["entries"])


class WriteTxn(ReadTxn):
    """A write in progress, on the writer thread. Raising rolls back everything this function did.

    A table must not be changed while items() walks over it: take list() first.
    """

    def put(self, table: str, key: str, record: Mapping[str, Any]) -> None:
        """Store or replace a record. Raises: InvalidArgument when the key is empty or too long."""
        self._txn.put(_key(key), json.dumps(record, separators=(",", ":")).encode(), db=self._tables[table])

    def delete(self, table: str, key: str) -> bool:
        """Remove a record; whether it was there."""
        return bool(self._txn.delete(_key(key), db=self._tables[table]))

    def forget(self, table: str, key: bytes) -> None:
        """Remove a record by whatever its key has become."""
        self._txn.delete(key, db=self._tables[table])


@dataclass(slots=True)
class _Change:
    run: Callable[[WriteTxn], Any]
    future: Future[Any]
    value: Any = None
    error: BaseException | None = None


class MetaDB:
    """One per root, held by one process at a time. Thread-safe.

    Durability: when write() or awrite() returns, the change survives power loss (sync=True) and the end of the process.
    """

    last_end: LastEnd  # how the previous daemon ended; decides how much recovery looks at

    def __init__(self, path: Path, *, sync: bool = True, schema: Schema | None = None) -> None:
        """Open or create the environment in directory `path`.

        Raises: FailedPrecondition (written by a newer imgsvc, or in use by another daemon), DataLoss (unreadable),
        ResourceExhausted (no space).
        """
        self._path = path
        self._schema = schema or Schema()
        self._lock_fd = _lock(path)
        self._queue: queue.SimpleQueue[_Change | None] = queue.SimpleQueue()  # bounded by its callers: each waits for its own
        self._closing = threading.Lock()
        self._closed = True
        self._reserved = 0  # [bytes] from the start of the file that have blocks
        try:
            self._env = _open_env(path, sync, len(self._schema.tables))
            try:
                self._start()
            except BaseException:
                self._env.close()
                raise
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _start(self) -> None:
        failpoint("metadb.opened")
        self._keep_headroom()
        self._tables: dict[str, Any] = {}
        self._refuse_newer()
        self._tables.update({name: self._env.open_db(name.encode()) for name in self._schema.tables})
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="metadb-writer", daemon=True)
        self._thread.start()
        try:
            self.last_end = self.write(self._begin_session)
        except BaseException:
            self._stop_writer()
            raise

    @contextmanager
    def read(self) -> Iterator[ReadTxn]:
        """A consistent view for a `with` block. Takes microseconds; fine on the event loop for a few records.

        Never wait for anything inside: an open view keeps replaced pages from being used again. Raises: DataLoss, also within.
        """
        try:
            with self._env.begin() as txn:
                yield ReadTxn(txn, self._tables)
        except lmdb.Error as error:
            raise self._failed("reading metadata", error) from error

    def submit(self, change: Callable[[WriteTxn], T]) -> Future[T]:
        """Queue a change for the writer thread, where it runs once. `change` must be short and must not wait.

        Cancelling the future takes the change back if it has not begun; after that it is done in any case.
        """
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise Internal("the metadata database is closed", where=str(self._path))
            self._queue.put(_Change(change, future))
        return future

    def write(self, change: Callable[[WriteTxn], T]) -> T:
        """Run a change and wait until it is durable. Blocking: never call it on the event loop or in a change."""
        return self.submit(change).result()

    def scrub(self, *, repair: bool) -> list[str]:
        """Records that cannot be parsed, as "TABLE KEY". Blocking: reads them all. repair: forget them.

        The files of a forgotten record are found by fsck, which compares records with files.
        """

        def forget(txn: WriteTxn) -> None:
            for table, key in broken:
                txn.forget(table, key)

        with self.read() as view:
            broken = [(table, key) for table in self._schema.tables for key in view.broken(table)]
        if repair and broken:
            self.write(forget)
        return [f"{table} {printable(key.decode('utf-8', 'replace'))}" for table, key in broken]

    async def awrite(self, change: Callable[[WriteTxn], T]) -> T:
        """As write, from the event loop. Cancelling the caller does not undo a change that has begun."""
        return await asyncio.wrap_future(self.submit(change))

    def size(self) -> int:
        """Size of the database file [bytes]."""
        return os.stat(self._path / _DATA).st_size

    def usage(self) -> tuple[int, int]:
        """Bytes of pages ever used, which are used again before the file grows, and of the map, beyond which writes fail."""
        info = self._env.info()
        return (info["last_pgno"] + 1) * self._env.stat()["psize"], info["map_size"]

    def close(self) -> None:
        """Finish queued changes, mark the end as clean, and close. Idempotent."""
        with self._closing:
            if self._closed:
                return
        try:
            failpoint("metadb.close")
            self.write(lambda txn: txn.delete("meta", "session"))
        except ImgsvcError as error:
            log.warning("the end could not be marked as clean, the next start will check the store: %s", error)
        self._stop_writer()
        self._env.close()
        os.close(self._lock_fd)

    def _stop_writer(self) -> None:
        with self._closing:
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._commit([change for change in batch if change.future.set_running_or_notify_cancel()])
            self._keep_headroom()

    def _next_batch(self) -> list[_Change] | None:
        """What is waiting, in order; None when closed. The closing mark is put back for the next call."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < MAX_BATCH and not self._queue.empty():
            entry = self._queue.get()
            if entry is None:
                self._queue.put(None)
                break
            batch.append(entry)
        return batch

    def _commit(self, batch: list[_Change]) -> None:
        try:
            with self._env.begin(write=True) as txn:
                for change in batch:
                    # A change alone needs no transaction of its own: when it fails, nothing is left to commit.
                    self._apply(change, txn, nested=len(batch) > 1)
                failpoint("metadb.commit")
                if len(batch) == 1 and batch[0].error is not None:
                    txn.abort()
            failpoint("metadb.committed")
        except BaseException as error:  # noqa: BLE001  # whatever it is, the callers wait for an answer and the thread must live
            for change in batch:
                change.error = change.error or self._failed("writing metadata", error)
        for change in batch:
            if change.error is None:
                change.future.set_result(change.value)
            else:
                change.future.set_exception(change.error)

    def _keep_headroom(self) -> None:
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if self._reserved - used >= _HEADROOM // 2:
            return
        with suppress(OSError), (self._path / _DATA).open("r+b") as file:
            if reserve_blocks(file.fileno(), used + _HEADROOM):
                self._reserved = used + _HEADROOM

    def _apply(self, change: _Change, txn: lmdb.Transaction, *, nested: bool) -> None:
        try:
            if nested:
                with self._env.begin(write=True, parent=txn) as own:
                    change.value = change.run(WriteTxn(own, self._tables))
            else:
                change.value = change.run(WriteTxn(txn, self._tables))
        except lmdb.Error as error:
            change.error = self._failed("writing metadata", error)
        except BaseException as error:  # noqa: BLE001  # the caller's own failure, delivered to it
            change.error = error

    def _failed(self, doing: str, error: BaseException) -> ImgsvcError:
        """The category of a failure below us."""
        mapped: ImgsvcError
        where = str(self._path)
        if isinstance(error, OSError):
            mapped = from_os_error(error, doing, where=where)
        elif isinstance(error, lmdb.MapFullError | lmdb.DiskError | lmdb.ReadersFullError | lmdb.TxnFullError):
            mapped = ResourceExhausted(f"{doing}: {error}", where=where, hint="free space there, then try again")
        elif isinstance(error, lmdb.Error):
            number = next((n for n in (errno.ENOSPC, errno.EDQUOT, errno.EIO) if os.strerror(n) in str(error)), 0)
            if number == errno.EIO and free_space(self._path) < MIB:
                number = errno.ENOSPC  # LMDB calls a short write, which is what a full disk gives, an I/O error
            if number:
                mapped = from_os_error(OSError(number, os.strerror(number)), doing, where=where)
            else:
                mapped = DataLoss(f"{doing}: {error}", where=where, hint="check the disk, then restart imgsvc")
        else:
            mapped = Internal(f"{doing}: {error}", where=where)
        mapped.__cause__ = error
        return mapped

    def _refuse_newer(self) -> None:
        """Check the format before anything is written."""
        with self._env.begin() as txn:
            if txn.stat()["entries"] == 0:
                return
        self._tables["meta"] = self._env.open_db(b"meta")
        with self.read() as view:
            record = view.get("meta", "format")
        found = self._schema.format if record is None else int(record["version"])
        if found > self._schema.format:
            raise FailedPrecondition(
                f"the store has format {found}, this imgsvc knows up to {self._schema.format}",
                where=str(self._path),
                hint="run the newer imgsvc, or choose another root",
            )

    def _begin_session(self, txn: WriteTxn) -> LastEnd:
        record = txn.get("meta", "format")
        for version in range(self._schema.format if record is None else int(record["version"]), self._schema.format):
            log.info("migrating the store from format %d to %d", version, version + 1)
            self._schema.migrations[version](txn)
            failpoint("metadb.migrate")
        txn.put("meta", "format", {"version": self._schema.format})
        session = txn.get("meta", "session")
        boot = boot_id()
        txn.put("meta", "session", {"boot": boot, "pid": os.getpid()})
        if session is None:
            return LastEnd.CLEAN
        return LastEnd.KILLED if session["boot"] == boot else LastEnd.POWER


def set_aside(path: Path) -> Path:
    """Move an unreadable database out of the way, so that the next open starts an empty one. For `fsck --repair`.

    Returns: the file's new path; an older one of that name is replaced. Raises: FailedPrecondition while a daemon runs.
    """
    lock_fd = _lock(path)
    try:
        os.replace(path / _DATA, path / _SET_ASIDE)
    except OSError as error:
        raise from_os_error(error, "setting the metadata database aside", where=str(path)) from error
    finally:
        os.close(lock_fd)
    return path / _SET_ASIDE


def _lock(path: Path) -> int:
    try:
        private_dir(path)
        return lock_exclusive(path / "daemon.lock", "the store")
    except OSError as error:
        raise from_os_error(error, "opening the metadata database", where=str(path)) from error


def _open_env(path: Path, sync: bool, tables: int) -> lmdb.Environment:
    try:
        damage = pagecheck.damage(path / _DATA)
    except OSError as error:
        raise from_os_error(error, "reading the metadata database", where=str(path / _DATA)) from error
    if damage:
        raise _unreadable(path, damage)
    env = _map_env(path, sync, tables, _MAP_SIZE)
    # Slots of readers that were killed would keep old pages from being used again.
    env.reader_check()
    return env


def _map_env(path: Path, sync: bool, tables: int, size: int) -> lmdb.Environment:
    try:
        return lmdb.open(str(path), map_size=size, max_dbs=tables + 1, max_readers=_MAX_READERS, mode=0o600, metasync=sync)
    except lmdb.MemoryError as error:  # RLIMIT_AS
        if size // 2 >= _SMALLEST_MAP:
            return _map_env(path, sync, tables, size // 2)
        hint = "raise the limit on address space"
        raise ResourceExhausted(f"mapping the metadata database: {error}", where=str(path), hint=hint) from error
    except lmdb.DiskError as error:
        raise ResourceExhausted(f"opening the metadata database: {error}", where=str(path), hint="free space there") from error
    except lmdb.Error as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> DataLoss:
    return DataLoss(
        f"the metadata database cannot be used: {why}", where=str(path / _DATA), hint=f"run `imgsvc fsck --repair --root {path.parent}`"
    )


def _key(key: str) -> bytes:
    raw = key.encode()
    if not 0 < len(raw) <= MAX_KEY:
        raise InvalidArgument(f"a metadata key has {len(raw)} bytes, possible are 1 to {MAX_KEY}")
    return raw


def _text(table: str, key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError as error:
        raise _broken(table, key.decode("utf-8", "replace")) from error


def _parse(table: str, key: str, raw: Any) -> Record:
    try:
        record = json.loads(bytes(raw))
    except ValueError as error:
        raise _broken(table, key) from error
    if not isinstance(record, dict):
        raise _broken(table, key)
    return record


def _broken(table: str, key: str) -> DataLoss:
    hint = "run `imgsvc fsck --repair`, with --root where no daemon runs"
    return DataLoss(f'the record "{printable(key, 120)}" of table {table} cannot be parsed', hint=hint)
