"""Records of snapshots in the metadata database: what exists, what it stands on, how much disk it takes. No file is touched.

Keys of table "snapshots": `driver/key-or-name`, and `driver!state` with the driver's next directory number and the running
total of committed usage. A record counts its children, so that nothing has to be searched on removal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from imgsvc.base.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, printable
from imgsvc.base.metadb.database import MetaDB, ReadTxn, WriteTxn
from imgsvc.snapshot.interfaces import IDMapping, Key, Kind, Name, SnapshotInfo, Usage

_TABLE: Final = "snapshots"
_MAX_KEY: Final = 400  # [bytes]; LMDB takes 511 with our prefix


@dataclass(frozen=True, slots=True)
class Stored:
    """One record with what only drivers need. number: of its directory. extra: the driver's own facts."""

    info: SnapshotInfo
    number: int
    usage: Usage
    children: int
    mapping: IDMapping | None
    extra: Mapping[str, Any]


class Records:
    """The records of one driver. Thread-safe; writes block until durable."""

    def __init__(self, db: MetaDB, driver: str) -> None:
        self._db = db
        self._prefix = f"{driver}/"
        self._state = f"{driver}!state"

    def get(self, key: str) -> Stored | None:
        """One record, or None."""
        with self._db.read() as txn:
            return self._load(txn, key)

    def must_get(self, key: str) -> Stored:
        """Raises: NotFound."""
        stored = self.get(key)
        if stored is None:
            raise NotFound(f'no snapshot "{printable(key, 120)}"', where=self._prefix.rstrip("/"))
        return stored

    def walk(self) -> Iterator[Stored]:
        """All records, in one consistent view."""
        with self._db.read() as txn:
            found = [_stored(key.removeprefix(self._prefix), record) for key, record in txn.items(_TABLE, self._prefix)]
        yield from found

    def chain(self, name: str | None) -> list[Stored]:
        """A committed snapshot and its parents, nearest first. Raises: NotFound where the chain is broken."""
        found = []
        with self._db.read() as txn:
            while name is not None:
                stored = self._load(txn, name)
                if stored is None or stored.info.kind is not Kind.COMMITTED:
                    raise NotFound(f'no committed snapshot "{printable(name, 120)}"', where=self._prefix.rstrip("/"))
                found.append(stored)
                name = stored.info.parent
        return found

    def total(self) -> Usage:
        """Sum over committed snapshots."""
        with self._db.read() as txn:
            state = txn.get(_TABLE, self._state) or {}
        return Usage(state.get("size", 0), state.get("inodes", 0))

    def create(
        self,
        key: Key,
        kind: Kind,
        parent: Name | None,
        labels: Mapping[str, str] | None,
        mapping: IDMapping | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Stored:
        """Add an active snapshot or view. Raises: AlreadyExists, NotFound, FailedPrecondition (parent not committed)."""
        _check_key(key)

        def change(txn: WriteTxn) -> Stored:
            self._must_be_free(txn, key)
            if parent is not None:
                self._add_child(txn, parent, 1)
            state = self._state_of(txn)
            record = _record(kind, parent, labels, state["next"])
            record["mapping"] = None if mapping is None else {"uids": mapping.uids, "gids": mapping.gids}
            record["extra"] = dict(extra or {})
            state["next"] += 1
            txn.put(_TABLE, self._state, state)
            txn.put(_TABLE, self._prefix + key, record)
            return _stored(key, record)

        return self._db.write(change)

    def commit(
        self,
        name: Name,
        key: Key,
        parent: Name | None,
        usage: Usage,
        labels: Mapping[str, str] | None,
        facts: Mapping[str, Any] | None = None,
        *,
        replaces: int | None = None,
    ) -> None:
        """Turn active `key` into committed `name`. Raises: as Snapshotter.commit.

        Args: facts: more of the driver's own. replaces: number of the directory of a record of that name which is to go.
        """
        _check_key(name)

        def change(txn: WriteTxn) -> None:
            record = txn.get(_TABLE, self._prefix + key)
            if record is None:
                raise NotFound(f'no snapshot "{printable(key, 120)}"', where=self._prefix.rstrip("/"))
            if record["kind"] != Kind.ACTIVE:
                raise FailedPrecondition(f'snapshot "{printable(key, 120)}" is not active')
            record["children"] = self._make_room(txn, name, replaces)
            if parent is not None and parent != record["parent"]:
                if record["parent"] is not None:
                    raise FailedPrecondition(f'snapshot "{printable(key, 120)}" has a parent already')
                self._add_child(txn, parent, 1)
                record["parent"] = parent
            merged = {**record["labels"], **(labels or {})}
            record.update(kind=Kind.COMMITTED, labels=merged, updated=_now(), size=usage.size, inodes=usage.inodes)
            record["extra"] = {**record["extra"], **(facts or {})}
            txn.delete(_TABLE, self._prefix + key)
            txn.put(_TABLE, self._prefix + name, record)
            self._add_usage(txn, usage.size, usage.inodes)

        self._db.write(change)

    def set_added(self, name: str, added: Usage) -> None:
        """A committed snapshot takes that much beside what it was committed with. Raises: NotFound."""

        def change(txn: WriteTxn) -> None:
            record = txn.get(_TABLE, self._prefix + name)
            if record is None:
                raise NotFound(f'no snapshot "{printable(name, 120)}"', where=self._prefix.rstrip("/"))
            old = record.get("added", {"size": 0, "inodes": 0})
            more = Usage(added.size - old["size"], added.inodes - old["inodes"])
            record["added"] = {"size": added.size, "inodes": added.inodes}
            record.update(size=record["size"] + more.size, inodes=record["inodes"] + more.inodes)
            txn.put(_TABLE, self._prefix + name, record)
            self._add_usage(txn, more.size, more.inodes)

        self._db.write(change)

    def remove(self, *keys: str) -> list[Stored]:
        """Forget records, in one commit; those that were there. Raises: FailedPrecondition (one has children: then all stay)."""

        def change(txn: WriteTxn) -> list[Stored]:
            return [stored for key in keys if (stored := self._remove(txn, key)) is not None]

        return self._db.write(change)

    def _remove(self, txn: WriteTxn, key: str) -> Stored | None:
        stored = self._load(txn, key)
        if stored is not None:
            if stored.children:
                raise FailedPrecondition(f'snapshot "{printable(key, 120)}" has children', hint="remove those first")
            self._delete(txn, stored)
        return stored

    def forget(self, name: Name) -> list[Stored]:
        """Remove a committed record with all on top of it, top first. Raises: FailedPrecondition when one on top is in use."""

        def change(txn: WriteTxn) -> list[Stored]:
            all_of = [_stored(key.removeprefix(self._prefix), record) for key, record in txn.items(_TABLE, self._prefix)]
            on_top: dict[str | None, list[Stored]] = {}
            for stored in all_of:
                on_top.setdefault(stored.info.parent, []).append(stored)
            gone = [stored for stored in all_of if stored.info.id == name]
            for stored in gone:
                gone += on_top.get(stored.info.id, [])
            users = [stored.info.id for stored in gone if stored.info.kind is not Kind.COMMITTED]
            if users:
                raise FailedPrecondition(f"{users[0]} stands on it", where=f"{self._prefix}{name}", hint="remove that first")
            for stored in reversed(gone):
                self._delete(txn, stored)
            return gone[::-1]

        return self._db.write(change)

    def drop_broken(self, present: set[int]) -> int:
        """Forget records whose directory is not among `present` and on which nothing stands; how many.

        Others wait for a pull that brings their files back (commit): a container may be running on what is above.
        Counts of children are those of what is there, also when a record was lost (MetaDB.scrub).
        """

        def change(txn: WriteTxn) -> int:
            self._count_children(txn)
            records = [_stored(key.removeprefix(self._prefix), record) for key, record in txn.items(_TABLE, self._prefix)]
            broken = {stored.info.id: stored for stored in records if stored.number not in present}
            count = 0
            while free := [key for key in broken if (now := self._load(txn, key)) is not None and not now.children]:
                for key in free:
                    self._delete(txn, broken.pop(key))
                    count += 1
            return count

        with self._db.read() as txn:
            if not any(True for _ in txn.items(_TABLE, self._prefix)):
                return 0  # a driver without snapshots costs no write at each start
        return self._db.write(change)

    def _count_children(self, txn: WriteTxn) -> None:
        records = list(txn.items(_TABLE, self._prefix))
        children = Counter(record["parent"] for _, record in records)
        for key, record in records:
            if record["children"] != children[key.removeprefix(self._prefix)]:
                txn.put(_TABLE, key, {**record, "children": children[key.removeprefix(self._prefix)]})

    def _delete(self, txn: WriteTxn, stored: Stored) -> None:
        if stored.info.parent is not None and self._load(txn, stored.info.parent) is not None:
            self._add_child(txn, stored.info.parent, -1)
        if stored.info.kind is Kind.COMMITTED:
            self._add_usage(txn, -stored.usage.size, -stored.usage.inodes)
        txn.delete(_TABLE, self._prefix + stored.info.id)

    def _make_room(self, txn: WriteTxn, name: str, replaces: int | None) -> int:
        """Let `name` be free, at the cost of the record with directory `replaces`; how many snapshots stand on that."""
        old = self._load(txn, name)
        if old is None or old.number != replaces:
            self._must_be_free(txn, name)
            return 0
        self._delete(txn, old)
        return old.children

    def update(self, key: str, labels: Mapping[str, str | None]) -> SnapshotInfo:
        """Merge labels. Raises: NotFound."""

        def change(txn: WriteTxn) -> SnapshotInfo:
            record = txn.get(_TABLE, self._prefix + key)
            if record is None:
                raise NotFound(f'no snapshot "{printable(key, 120)}"', where=self._prefix.rstrip("/"))
            merged = {**record["labels"], **labels}
            record["labels"] = {k: v for k, v in merged.items() if v is not None}
            record["updated"] = _now()
            txn.put(_TABLE, self._prefix + key, record)
            return _stored(key, record).info

        return self._db.write(change)

    def _load(self, txn: ReadTxn, key: str) -> Stored | None:
        if not key or len(key.encode()) > _MAX_KEY:
            return None
        record = txn.get(_TABLE, self._prefix + key)
        return None if record is None else _stored(key, record)

    def _must_be_free(self, txn: WriteTxn, key: str) -> None:
        if txn.get(_TABLE, self._prefix + key) is not None:
            raise AlreadyExists(f'snapshot "{printable(key, 120)}" exists', where=self._prefix.rstrip("/"))

    def _add_child(self, txn: WriteTxn, parent: str, count: int) -> None:
        record = txn.get(_TABLE, self._prefix + parent)
        if record is None:
            raise NotFound(f'no parent snapshot "{printable(parent, 120)}"', where=self._prefix.rstrip("/"))
        if record["kind"] != Kind.COMMITTED:
            raise FailedPrecondition(f'parent snapshot "{printable(parent, 120)}" is not committed')
        record["children"] += count
        txn.put(_TABLE, self._prefix + parent, record)

    def _add_usage(self, txn: WriteTxn, size: int, inodes: int) -> None:
        state = self._state_of(txn)
        state["size"] += size
        state["inodes"] += inodes
        txn.put(_TABLE, self._state, state)

    def _state_of(self, txn: WriteTxn) -> dict[str, int]:
        """The driver's own record; where there is none, what the others say."""
        state = txn.get(_TABLE, self._state)
        if state is not None:
            return state
        records = [record for _, record in txn.items(_TABLE, self._prefix)]
        return {
            "next": 1 + max((record["number"] for record in records), default=0),
            "size": sum(record["size"] for record in records),
            "inodes": sum(record["inodes"] for record in records),
        }


def _check_key(key: str) -> None:
    if not key or len(key.encode()) > _MAX_KEY or "\0" in key:
        raise InvalidArgument(f'invalid snapshot key "{printable(key, 120)}"', hint=f"use 1 to {_MAX_KEY} bytes")


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _record(kind: Kind, parent: Name | None, labels: Mapping[str, str] | None, number: int) -> dict[str, Any]:
    now = _now()
    return {
        "kind": kind,
        "parent": parent,
        "created": now,
        "updated": now,
        "labels": dict(labels or {}),
        "number": number,
        "size": 0,
        "inodes": 0,
        "children": 0,
    }


def _stored(key: str, record: Mapping[str, Any]) -> Stored:
    info = SnapshotInfo(
        id=key,
        kind=Kind(record["kind"]),
        parent=record["parent"],
        created_at=datetime.fromisoformat(record["created"]),
        updated_at=datetime.fromisoformat(record["updated"]),
        labels=record["labels"],
    )
    mapping = record.get("mapping")
    return Stored(
        info=info,
        number=record["number"],
        usage=Usage(record["size"], record["inodes"]),
        children=record["children"],
        mapping=None if mapping is None else IDMapping(_triples(mapping["uids"]), _triples(mapping["gids"])),
        extra=record.get("extra", {}),
    )


def _triples(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((row[0], row[1], row[2]) for row in rows)
