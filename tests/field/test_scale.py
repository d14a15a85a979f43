"""What thousands of images cost, counted in commits: seconds depend on the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imgsvc.images.leases import Node
from imgsvc.images.upkeep.collector import Collectable, SweepReport, removal_order, sweep
from imgsvc.images.upkeep.nodes import Blobs, Snapshots, snapshot_node
from imgsvc.snapshot.interfaces import Key, Name
from tests.support.stored import Stored

BLOBS = 100
CHAINS = 20
DEPTH = 3


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    made = Stored(tmp_path)
    for number in range(BLOBS):
        made.put(f"blob {number}")
    for chain in range(CHAINS):
        parent: Name | None = None
        for level in range(DEPTH):
            parent = made.unpack(f"layer {chain} {level}", parent)
    return made


def collected(stored: Stored) -> SweepReport:
    """Everything that is there, as one slice."""
    kinds: list[Collectable] = [Blobs(stored.content), Snapshots([stored.snapshotter])]
    removers: dict[str, Callable[..., None]] = {kind.kind: kind.remove for kind in kinds}
    edges = {node: needs for kind in kinds for node, needs in kind.walk()}
    report = SweepReport()
    sweep(removal_order(list(edges), edges), edges, edges, lambda *nodes: removers[nodes[0].kind](*nodes), report)
    return report


def test_scale_a_collection_commits_once_for_all_that_can_go_together(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = 0
    submit = stored.db.submit

    def counted(change: Callable[..., object]) -> object:
        nonlocal commits
        commits += 1
        return submit(change)

    monkeypatch.setattr(stored.db, "submit", counted)
    report = collected(stored)
    assert len(report.removed) == BLOBS + CHAINS * DEPTH
    assert not report.failed
    assert commits <= 1 + DEPTH
    assert not list(stored.content.walk())
    assert not list(stored.snapshotter.walk())
    stored.close()


def test_scale_one_that_cannot_go_keeps_what_it_needs_and_nothing_else(stored: Stored) -> None:
    """A container begins on a layer between the mark and the sweep."""
    blobs, snapshots = Blobs(stored.content), Snapshots([stored.snapshotter])
    edges = dict(snapshots.walk())
    top = next(node for node in edges if not any(node in needs for needs in edges.values()))
    stored.snapshotter.prepare(Key("container"), Name(top.id.partition("/")[2]))
    report = SweepReport()
    sweep(removal_order(list(edges), edges), edges, edges, snapshots.remove, report)
    assert list(report.failed) == [top]
    assert len(report.removed) == (CHAINS - 1) * DEPTH
    kept = {snapshot_node("native", info.id) for info in stored.snapshotter.walk() if info.id != "container"}
    needed: set[Node] = {top}
    for _ in range(DEPTH):
        needed |= {below for node in needed for below in edges[node]}
    assert kept == needed
    assert len(list(blobs.walk())) == BLOBS
    stored.close()
