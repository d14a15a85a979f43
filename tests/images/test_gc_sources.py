"""Real stores under the collector: what images, containers and unfinished work keep, and what goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from imgsvc.base.concurrency import Threads
from imgsvc.base.oci import Digest
from imgsvc.images.leases import LeaseBook, Node
from imgsvc.images.upkeep.collector import CollectionReport, Collector, Policy, Verdict
from imgsvc.images.upkeep.nodes import INGEST_AGE, Blobs, Images, Ingests, Snapshots, content_node, snapshot_node, stored_sizes
from imgsvc.snapshot.interfaces import Key
from tests.support.stored import Stored


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Stored]:
    stored = Stored(tmp_path)
    yield stored
    stored.close()


async def _with_collector(
    node: Stored, policy: Policy, started: datetime, now: datetime, explain: bool
) -> CollectionReport | list[Verdict]:
    images = Images(node.images, node.content, {node.snapshotter.name: node.snapshotter}, [node.snapshotter.name])
    snapshots = Snapshots([node.snapshotter], clock=lambda: started)
    threads = Threads(2, "gc")
    collector = Collector(
        keepers=[images, snapshots],
        collectables=[Blobs(node.content), Ingests(node.content, clock=lambda: now), snapshots],
        cache=images,
        leases=LeaseBook(node.db),
        threads=threads,
        root=node.root,
        policy=policy,
    )
    try:
        return await (collector.explain() if explain else collector.collect())
    finally:
        threads.close()


def collect(
    node: Stored, policy: Policy | None = None, *, started: datetime | None = None, now: datetime | None = None
) -> CollectionReport:
    clock = datetime.now(UTC)
    done = asyncio.run(_with_collector(node, policy or Policy(), started or clock, now or clock, False))
    assert isinstance(done, CollectionReport)
    assert done.sweep.failed == {}
    return done


def here(node: Stored) -> set[Node]:
    return set(stored_sizes(node.content, node.content, [node.snapshotter]))


def test_removing_an_image_frees_what_only_it_needed(node: Stored) -> None:
    kept = node.add("kept", ["base", "kept"])
    gone = node.add("gone", ["base", "gone"])
    assert collect(node).sweep.removed == []
    asyncio.run(node.images.remove(gone.image_id))
    collect(node)
    images = Images(node.images, node.content, {"native": node.snapshotter}, ["native"])
    assert here(node) == set(images.needs(kept))


def test_explain_names_the_image(node: Stored) -> None:
    image = node.add("app", ["base"])
    verdicts = asyncio.run(_with_collector(node, Policy(), datetime.now(UTC), datetime.now(UTC), True))
    assert isinstance(verdicts, list)
    by_node = {verdict.node: verdict for verdict in verdicts}
    assert by_node[content_node(image.documents[0])].why == ("image docker.io/library/app:1",)


def test_a_container_keeps_its_image_layers_through_a_restart(node: Stored) -> None:
    """Issue 4: the image is removed while its container runs; the daemon restarts; the layers must stay."""
    image = node.add("app", ["base", "app"])
    top = image.layers[-1].snapshot
    node.snapshotter.prepare(Key("container-1"), top)  # type: ignore[arg-type]
    asyncio.run(LeaseBook(node.db).hold([snapshot_node("native", "container-1")], lease_id="container-1", permanent=True))
    asyncio.run(node.images.remove(image.image_id))
    collect(node, started=datetime.now(UTC) + timedelta(hours=1))
    assert {node.id for node in here(node)} == {f"native/{name}" for name in ("container-1", image.layers[0].snapshot, top)}
    asyncio.run(LeaseBook(node.db).release("container-1"))
    collect(node, started=datetime.now(UTC) + timedelta(hours=1))
    assert here(node) == set()


def test_work_in_progress_of_this_daemon_stays_and_that_of_a_dead_one_goes(node: Stored) -> None:
    node.snapshotter.prepare(Key("unpack-1"), None)
    collect(node, started=datetime.now(UTC) - timedelta(seconds=5))
    assert here(node) == {snapshot_node("native", "unpack-1")}
    collect(node, started=datetime.now(UTC) + timedelta(seconds=5))
    assert here(node) == set()


def test_unfinished_writes_go_when_they_are_old(node: Stored) -> None:
    writer = node.content.writer("layer-x", total=100)
    writer.write(b"x" * 50)
    writer.close()
    collect(node)
    assert node.content.status("layer-x") is not None
    collect(node, now=datetime.now(UTC) + INGEST_AGE + timedelta(seconds=1))
    assert node.content.status("layer-x") is None


def test_unfinished_writes_of_a_dead_daemon_go_once_their_blob_is_here(node: Stored) -> None:
    data = b"manifest app " * 100
    for name in ("document-1", "document-2"):
        writer = node.content.writer(name, total=len(data), expected=Digest.of(data))
        writer.write(data if name == "document-2" else data[:80])
        writer.close()
    node.content.writer("layer-y", total=800, expected=Digest.of(b"somewhere else")).close()
    later = datetime.now(UTC) + timedelta(seconds=5)
    collect(node, now=later)
    assert len(node.content.list_statuses()) == 3
    node.add("app", [])
    collect(node, now=later - timedelta(seconds=15))
    assert len(node.content.list_statuses()) == 3, "this daemon may still be at it"
    collect(node, now=later)
    assert [status.ingest_ref for status in node.content.list_statuses()] == ["layer-y"]


def test_without_cache_layer_blobs_go_and_documents_snapshots_and_artifacts_stay(node: Stored) -> None:
    """discard_unpacked_layers is budget 0."""
    image = node.add("app", ["base", "shared with the artifact"])
    artifact = node.add("model", ["shared with the artifact", "weights"], artifact=True)
    report = collect(node, Policy(cache_budget=0))
    assert report.sweep.removed == [content_node(image.layers[0].descriptor.digest)]
    images = Images(node.images, node.content, {"native": node.snapshotter}, ["native"])
    assert here(node) == {*images.needs(image), *images.needs(artifact)} - set(report.sweep.removed)
    assert node.snapshotter.stat(image.layers[0].snapshot) is not None


def test_sizes_count_everything_once(node: Stored) -> None:
    node.add("a", ["base"])
    node.content.writer("layer-x", total=100).write(b"x" * 50)
    node.snapshotter.prepare(Key("c"), None)
    sizes = stored_sizes(node.content, node.content, [node.snapshotter])
    assert sizes[content_node(Digest.of(b"base" * 100))] == 400
    assert sizes[Node("ingest", "layer-x")] == 50
    assert sum(size for at, size in sizes.items() if at.kind == "snapshot" and at.id != "native/c") == 1000
