"""The metadata database: one LMDB environment, one writer thread, JSON records in named tables.

Readers run on any thread and see one consistent snapshot. Writers hand a function to the writer thread; the functions
that wait there together share one LMDB transaction and so one fsync (group commit), each in its own nested transaction
so that one failing takes nothing of the others with it. LMDB allows one write transaction per environment and does not
refuse use from a wrong thread, hence the single thread (facts: style.md section 5).

Records are JSON objects. The environment carries a format number: a newer one is refused, an older one is migrated
inside one transaction (see MIGRATIONS).
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb

from imgsvc.errors import DataLoss, FailedPrecondition, Internal, ResourceExhausted
from imgsvc.oci import GIB, MIB

log = logging.getLogger(__name__)

T = TypeVar("T")
Record = dict[str, Any]

FORMAT: Final = 1
MIGRATIONS: Final[Mapping[int, Callable[[WriteTxn], None]]] = {}  # from format N to N + 1
TABLES: Final = ("meta", "images", "content", "snapshots", "leases", "sandboxes", "containers", "prepull", "verdicts", "layers")
MAX_BATCH: Final = 256  # writes that share one commit; bounds how long the first of them waits
_INITIAL_MAP: Final = 64 * MIB
_MAX_MAP: Final = 16 * GIB


class ReadTxn:
    """A consistent view. Valid inside its `with` block and on its thread only."""

    def __init__(self, txn: lmdb.Transaction, tables: Mapping[str, Any]) -> None:
        self._txn = txn
        self._tables = tables

    def get(self, table: str, key: str) -> Record | None:
        """One record, or None."""
        raw = self._txn.get(key.encode(), db=self._tables[table])
        return None if raw is None else json.loads(bytes(raw))

    def items(self, table: str, prefix: str = "") -> Iterator[tuple[str, Record]]:
        """Records whose key starts with `prefix`, in key order."""
        start = prefix.encode()
        with self._txn.cursor(db=self._tables[table]) as cursor:
            found = cursor.set_range(start) if start else cursor.first()
            while found and bytes(cursor.key()).startswith(start):
                yield bytes(cursor.key()).decode(), json.loads(bytes(cursor.value()))
                found = cursor.next()

    def count(self, table: str) -> int:
        """Number of records."""
        return int(self._txn.stat(self._tables[table])["entries"])


class WriteTxn(ReadTxn):
    """A write in progress, on the writer thread. Raising rolls back everything this function did."""

    def put(self, table: str, key: str, record: Mapping[str, Any]) -> None:
        """Store or replace a record."""
        self._txn.put(key.encode(), json.dumps(record, separators=(",", ":")).encode(), db=self._tables[table])

    def delete(self, table: str, key: str) -> bool:
        """Remove a record; whether it was there."""
        return bool(self._txn.delete(key.encode(), db=self._tables[table]))


class MetaDB:
    """One per daemon. Thread-safe.

    Durability: when write() or awrite() returns, the change survives power loss (sync=True).
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        """Open or create the environment in directory `path`.

        Raises: FailedPrecondition (written by a newer imgsvc, or in use by another daemon), DataLoss (unreadable).
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        try:
            self._env = lmdb.open(
                str(path), map_size=_INITIAL_MAP, max_dbs=len(TABLES) + 8, max_readers=512, mode=0o600, sync=sync, metasync=sync
            )
            self._tables = {name: self._env.open_db(name.encode()) for name in TABLES}
        except lmdb.Error as error:
            raise DataLoss(
                f"the metadata database cannot be opened: {error}", where=str(path), hint="see `imgsvc fsck --repair`"
            ) from error
        self._grow_to(int(self._env.info()["map_size"]))
        self._queue: queue.SimpleQueue[tuple[Callable[[WriteTxn], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="metadb-writer", daemon=True)
        self._thread.start()
        self.write(self._check_format)

    @contextmanager
    def read(self) -> Iterator[ReadTxn]:
        """A consistent view for a `with` block. Takes microseconds; fine on the event loop for a few records."""
        with self._env.begin() as txn:
            yield ReadTxn(txn, self._tables)

    def submit(self, change: Callable[[WriteTxn], T]) -> Future[T]:
        """Queue a change for the writer thread. `change` must be short, must not wait, and may run more than once."""
        future: Future[T] = Future()
        if self._closed:
            raise Internal("the metadata database is closed", where=str(self._path))
        self._queue.put((change, future))
        return future

    def write(self, change: Callable[[WriteTxn], T]) -> T:
        """Run a change and wait until it is durable. Blocking: never call it on the event loop."""
        return self.submit(change).result()

    async def awrite(self, change: Callable[[WriteTxn], T]) -> T:
        """As write, from the event loop. Cancelling the caller does not undo a change that is under way."""
        return await asyncio.wrap_future(self.submit(change))

    def close(self) -> None:
        """Finish queued changes and close. Idempotent."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            self._env.close()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            stop = False
            while len(batch) < MAX_BATCH and not self._queue.empty():
                entry = self._queue.get()
                if entry is None:
                    stop = True
                    break
                batch.append(entry)
            self._commit(batch)
            if stop:
                return

    def _commit(self, batch: list[tuple[Callable[[WriteTxn], Any], Future[Any]]]) -> None:
        results: list[tuple[Future[Any], Any, BaseException | None]] = []
        while True:
            results.clear()
            try:
                with self._env.begin(write=True) as parent:
                    for change, future in batch:
                        try:
                            with self._env.begin(write=True, parent=parent) as nested:
                                results.append((future, change(WriteTxn(nested, self._tables)), None))
                        except lmdb.MapFullError:
                            raise
                        except Exception as error:  # noqa: BLE001  # the caller's own failure: rolled back alone, delivered to it
                            results.append((future, None, error))
                break
            except lmdb.MapFullError as error:
                size = int(self._env.info()["map_size"])
                if size >= _MAX_MAP:
                    full = ResourceExhausted("the metadata database is full", where=str(self._path))
                    full.__cause__ = error
                    results = [(future, None, full) for _, future in batch]
                    break
                self._env.set_mapsize(min(size * 2, _MAX_MAP))
            except lmdb.Error as error:
                failed = ResourceExhausted(f"a metadata change could not be written: {error}", where=str(self._path), hint="check the disk")
                failed.__cause__ = error
                results = [(future, None, failed) for _, future in batch]
                break
        for future, value, caught in results:
            if not future.set_running_or_notify_cancel():
                continue
            if caught is None:
                future.set_result(value)
            else:
                future.set_exception(caught)

    def _grow_to(self, size: int) -> None:
        if size < _INITIAL_MAP:
            self._env.set_mapsize(_INITIAL_MAP)

    def _check_format(self, txn: WriteTxn) -> None:
        record = txn.get("meta", "format")
        found = FORMAT if record is None else int(record["version"])
        if found > FORMAT:
            raise FailedPrecondition(
                f"the store has format {found}, this imgsvc knows up to {FORMAT}",
                where=str(self._path),
                hint="run the newer imgsvc, or choose another root",
            )
        for version in range(found, FORMAT):
            log.info("migrating the store from format %d to %d", version, version + 1)
            MIGRATIONS[version](txn)
        txn.put("meta", "format", {"version": FORMAT})
