"""C-D9: thousands of pulls, removals and collections leave memory, descriptors, threads and the database as they were.

`SOAK=100000 python -m pytest tests/images/test_store_soak.py` runs it longer and prints its figures with -s.
"""

from __future__ import annotations

import asyncio
import gc as python_gc
import os
import threading
from pathlib import Path

import pytest

from imgsvc.base.concurrency import Threads
from imgsvc.base.oci import MIB
from imgsvc.images.leases import LeaseBook
from imgsvc.images.upkeep.collector import Collector, Policy
from imgsvc.images.upkeep.nodes import Blobs, Images, Ingests, Snapshots, content_node
from tests.support.stored import Stored, put_blob

CYCLES = int(os.environ.get("SOAK", "1500"))
EVERY = 100  # cycles between two collections
WARM_UP = 500  # cycles until the database has its working size


def figures(node: Stored) -> dict[str, int]:
    python_gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "database": node.db.size(),
        "files": sum(len(files) for _, _, files in os.walk(node.root / "content")),
    }


async def cycles(node: Stored, threads: Threads, leases: LeaseBook, collector: Collector, first: int, count: int) -> None:
    for cycle in range(first, first + count):
        data = os.urandom(2000)
        lease = await leases.hold([("content", f"sha256:{cycle:064x}")])
        digest = await threads.run(put_blob, node.content, data)
        await leases.add(lease, [content_node(digest)])
        node.content.update(digest, {"cycle": str(cycle)})
        node.content.writer(f"abandoned-{cycle}", total=10).close()
        node.content.abort(f"abandoned-{cycle}")
        await leases.release(lease)
        if cycle % EVERY == 0:
            assert not (await collector.collect()).sweep.failed
    await collector.collect()


@pytest.mark.slow
@pytest.mark.timeout(0 if CYCLES > 1500 else 120)
def test_c_d9_soak(tmp_path: Path) -> None:
    asyncio.run(_soak(Stored(tmp_path)))


async def _soak(node: Stored) -> None:
    leases, threads = LeaseBook(node.db), Threads(1, "soak")
    images, snapshots = Images(node.images, node.content, {"native": node.snapshotter}, ["native"]), Snapshots([node.snapshotter])
    collector = Collector(
        keepers=[images, snapshots],
        collectables=[Blobs(node.content), Ingests(node.content), snapshots],
        cache=images,
        leases=leases,
        threads=threads,
        root=node.root,
        policy=Policy(),
    )
    await cycles(node, threads, leases, collector, 0, WARM_UP)
    before = figures(node)
    await cycles(node, threads, leases, collector, WARM_UP, CYCLES)
    after = figures(node)
    print(f"\nafter {WARM_UP}: {before}\nafter {WARM_UP + CYCLES}: {after}")
    assert {key: after[key] for key in ("fds", "threads", "files")} == {key: before[key] for key in ("fds", "threads", "files")}
    assert after["database"] <= before["database"] * 1.5
    assert after["rss"] - before["rss"] < 8 * MIB
    assert leases.leases() == []
    threads.close()
    node.close()
