"""A short life of a store, run as a process that a failpoint kills: `python -m tests.content.crash_scenario ROOT`.

Prints one line per acknowledged step ("stored NAME", "deleted NAME", …), unbuffered, so that the test knows what the
program was promised. Running it again on what a kill left must complete.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from imgsvc.base import failpoints
from imgsvc.base.concurrency import Threads
from imgsvc.base.metadb.database import MetaDB, Schema, WriteTxn
from imgsvc.base.oci import KIB, Digest
from imgsvc.content.local import LocalStore
from imgsvc.images.leases import LeaseBook, Node
from imgsvc.images.upkeep.collector import Cached, Collector, Policy, Root
from imgsvc.images.upkeep.fsck import recover
from imgsvc.images.upkeep.nodes import Blobs, Ingests, content_node
from tests.fakes.clock import FakeClock

CHUNK = 64 * KIB
NAMES = ("kept", "labelled", "deleted", "garbage")
BLOBS = {name: bytes((n * 31 + i) % 251 for i in range(CHUNK)) * 10 for n, name in enumerate(NAMES)}
DIGESTS = {name: Digest.of(data) for name, data in BLOBS.items()}


class Needed:
    """gc.Keeper and gc.Cache: two of the blobs."""

    def roots(self) -> Iterator[Root]:
        yield Root(Node("image", "x"), "image x", [content_node(DIGESTS["kept"]), content_node(DIGESTS["labelled"])])

    def cached(self) -> Sequence[Cached]:
        return []


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def store_blob(store: LocalStore, name: str) -> None:
    """In two sittings, with a gap, a chunk that has to be written again, and a cut."""
    data, digest = BLOBS[name], DIGESTS[name]
    writer = store.writer(name, total=len(data), expected=digest)
    for offset in range(2 * CHUNK, 5 * CHUNK, CHUNK):
        writer.write_at(offset, data[offset : offset + CHUNK])
    writer.truncate(4 * CHUNK)
    writer.close()
    writer = store.writer(name, total=len(data), expected=digest)
    for offset, length in writer.missing():
        for start in range(offset, offset + length, CHUNK):
            writer.write_at(start, data[start : start + CHUNK])
    writer.commit(len(data), digest, {"name": name})
    say(f"stored {name}")


async def lead_a_life(root: Path, db: MetaDB, store: LocalStore) -> None:
    clock = FakeClock()
    leases = LeaseBook(db, clock)
    for name in NAMES:
        store_blob(store, name)
    store.update(DIGESTS["labelled"], {"extra": "label"})
    say("labelled")
    store.delete(DIGESTS["deleted"])
    say("deleted deleted")
    store.writer("abandoned").close()
    store.abort("abandoned")
    say("aborted")
    pull = await leases.hold([content_node(DIGESTS["kept"])], lease_id="pull")
    await leases.add(pull, [content_node(DIGESTS["labelled"])])
    await leases.hold([content_node(DIGESTS["kept"])], lease_id="container", permanent=True)
    say("leased")
    await leases.hold([content_node(DIGESTS["garbage"])], expires_in=timedelta(seconds=1))
    clock.advance(2)
    await leases.expire()
    await leases.release(pull)
    say("released")
    threads = Threads(2, "scenario")
    collector = Collector(
        keepers=[Needed()],
        collectables=[Blobs(store), Ingests(store)],
        cache=Needed(),
        leases=leases,
        threads=threads,
        root=root,
        policy=Policy(),
    )
    report = await collector.collect()
    assert not report.sweep.failed, report
    say("deleted garbage")
    threads.close()


def add_field(txn: WriteTxn) -> None:
    """A migration as it may come one day: every blob's record gets a field."""
    for key, record in list(txn.items("content")):
        txn.put("content", key, {**record, "migrated": True})


NEXT = Schema(format=2, migrations={1: add_field})


def main() -> None:
    root = Path(sys.argv[1])
    failpoints.arm(os.environ.get(failpoints.ENV, ""))
    db = MetaDB(root / "meta", schema=NEXT if "migrate" in sys.argv else None)
    store = LocalStore(root, db, sync=True)
    recover(store, db.last_end)
    asyncio.run(lead_a_life(root, db, store))
    db.close()
    say("closed")


if __name__ == "__main__":
    main()
