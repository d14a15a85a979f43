"""C-D7: random pulls, removals, restarts and collections, side by side, against a model that is plainly right (Hypothesis).

Images share layers. Whatever happens, every blob of a visible image is there and sound; after everything is quiet one
collection leaves exactly what the images need.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from imgsvc.base import failpoints
from imgsvc.base.concurrency import Threads
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import Digest
from imgsvc.content.local import LocalStore
from imgsvc.images.leases import RESTART_GRACE, LeaseBook, Node
from imgsvc.images.upkeep.collector import Cached, Collector, Policy, Root
from imgsvc.images.upkeep.fsck import recover
from imgsvc.images.upkeep.nodes import Blobs, Ingests, content_node
from tests.fakes.clock import FakeClock

T = TypeVar("T")

LAYERS = [os.urandom(200 + n) for n in range(8)]
DIGESTS = [Digest.of(layer) for layer in LAYERS]
IMAGES = {"a": (0, 1, 2), "b": (0, 1, 3), "c": (4,), "d": (2, 4, 5, 6), "e": (7, 0)}
# Where to be slow, so that the others get in between.
RACES = [
    "",
    "gc.marked=delay:8*1",
    "gc.remove=delay:4*2",
    "gc.marked=delay:4*1; gc.remove=delay:4*1",
    "lease.add=delay:3; gc.slice=delay:3",
]
NAMES = st.sampled_from(sorted(IMAGES))


class ImageTable:
    """gc.Keeper and gc.Cache: the images that are visible."""

    def __init__(self) -> None:
        self.visible: set[str] = set()

    def roots(self) -> Iterable[Root]:
        return [Root(Node("image", name), name, [content_node(DIGESTS[layer]) for layer in IMAGES[name]]) for name in self.visible]

    def cached(self) -> Iterable[Cached]:
        return []


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="imgsvc-model-"))
        self.loop = asyncio.new_event_loop()
        self.table = ImageTable()
        self.clock = FakeClock()
        self.threads = Threads(4, "model")
        self.open()

    def open(self) -> None:
        self.db = MetaDB(self.root / "meta", sync=False)
        self.store = LocalStore(self.root, self.db, sync=False)
        recover(self.store, self.db.last_end)
        self.leases = LeaseBook(self.db, self.clock)
        self.collector = Collector(
            keepers=[self.table],
            collectables=[Blobs(self.store), Ingests(self.store)],
            cache=self.table,
            leases=self.leases,
            threads=self.threads,
            root=self.root,
            policy=Policy(),
        )

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def pull(self, name: str, *, stop_after: int = 100, owner: str = "") -> None:
        """As pull.py does: lease, look, fetch what is missing, publish, release."""
        lease = await self.leases.hold([content_node(DIGESTS[layer]) for layer in IMAGES[name]])
        try:
            for layer in IMAGES[name]:
                if await self.threads.run(self.store.info, DIGESTS[layer]) is None:
                    if not stop_after:
                        return
                    stop_after -= 1
                    await self.threads.run(self.fetch, layer, f"{owner}{name}-{layer}")
            self.table.visible.add(name)
        finally:
            await self.leases.release(lease)

    async def pull_later(self, name: str, turn: int) -> None:
        await asyncio.sleep(0.003 * turn)
        await self.pull(name, owner=f"{turn}-")

    def fetch(self, layer: int, ingest_ref: str) -> None:
        data = LAYERS[layer]
        writer = self.store.writer(ingest_ref, total=len(data), expected=DIGESTS[layer])
        try:
            for offset, length in writer.missing():
                half = length // 2
                writer.write_at(offset + half, data[offset + half : offset + length])
                writer.write_at(offset, data[offset : offset + half])
            writer.commit(len(data), DIGESTS[layer])
        finally:
            writer.close()

    @rule(name=NAMES)
    def pull_one(self, name: str) -> None:
        self.do(self.pull(name))

    @rule(name=NAMES, after=st.integers(0, 2))
    def give_up_a_pull(self, name: str, after: int) -> None:
        self.do(self.pull(name, stop_after=after))

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.table.visible.discard(name)

    @rule(names=st.lists(NAMES, min_size=1, max_size=4), gone=st.lists(NAMES, max_size=3), slow=st.sampled_from(RACES))
    def pull_and_remove_while_collecting(self, names: list[str], gone: list[str], slow: str) -> None:
        async def all_at_once() -> None:
            for name in gone:
                self.table.visible.discard(name)
            pulls = [self.pull_later(name, n) for n, name in enumerate(names)]
            await asyncio.gather(self.collector.collect(), *pulls, self.collector.collect())

        failpoints.arm(slow)
        self.do(all_at_once())
        failpoints.arm("")

    @rule()
    def collect(self) -> None:
        report = self.do(self.collector.collect())
        assert not report.sweep.failed
        needed = {DIGESTS[layer] for name in self.table.visible for layer in IMAGES[name]}
        leased = {Digest(node.id) for lease in self.leases.leases() for node in lease.resources}
        here = {info.digest for info in self.store.walk()}
        assert here == (needed | leased) & here
        assert needed <= here

    @rule(name=NAMES)
    def pull_is_killed_and_the_daemon_starts_again(self, name: str) -> None:
        """The lease of the killed pull lives on for the grace; then it is gone like its holder."""
        self.do(self.leases.hold([content_node(DIGESTS[layer]) for layer in IMAGES[name]]))
        layer = IMAGES[name][0]
        writer = self.store.writer("killed", total=len(LAYERS[layer]), expected=DIGESTS[layer])
        writer.write_at(0, LAYERS[layer][:50])
        writer.close()
        self.close_as_if_killed()
        self.open()

    @rule()
    def restart(self) -> None:
        self.db.close()
        self.open()

    @rule()
    def leases_of_the_dead_end(self) -> None:
        self.clock.now += RESTART_GRACE
        self.do(self.leases.expire())

    @rule(layer=st.integers(0, len(LAYERS) - 1), kind=st.sampled_from(["empty", "missing", "flipped"]))
    def break_a_blob_then_pull_again(self, layer: int, kind: str) -> None:
        path = self.root / "content" / "blobs" / "sha256" / DIGESTS[layer].hex
        if not path.exists():
            return
        path.unlink()
        if kind != "missing":
            path.write_bytes(b"" if kind == "empty" else bytes(len(LAYERS[layer])))
        assert self.store.info(DIGESTS[layer]) is None
        for name in sorted(self.table.visible):
            if layer in IMAGES[name]:
                self.do(self.pull(name))

    @invariant()
    def visible_images_are_whole(self) -> None:
        for name in getattr(self, "table", ImageTable()).visible:
            for layer in IMAGES[name]:
                assert self.store.check(DIGESTS[layer], deep=True) is None
                with self.store.reader(DIGESTS[layer]) as reader:
                    assert reader.read_at(0, 1000) == LAYERS[layer]

    def close_as_if_killed(self) -> None:
        self.db._stop_writer()
        self.db._env.close()
        os.close(self.db._lock_fd)

    def teardown(self) -> None:
        if not hasattr(self, "root"):
            return
        self.leases_of_the_dead_end()
        self.collect()
        needed = {DIGESTS[layer].hex for name in self.table.visible for layer in IMAGES[name]}
        assert set(os.listdir(self.root / "content/blobs/sha256")) == needed, "a leak, or a loss"
        self.db.close()
        self.threads.close()
        self.loop.close()
        shutil.rmtree(self.root)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute of processor time
def test_c_d7_ten_thousand_operations() -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(max_examples=100, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)),
    )
