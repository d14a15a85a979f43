"""The store: what durability costs, what a collection of a large node costs.

Run: python -m benchmarks.store [--images N] [--layers N] [DIRECTORY]. DIRECTORY decides which disk is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from imgsvc.base.concurrency import Threads
from imgsvc.base.metadb.database import MetaDB, WriteTxn
from imgsvc.base.oci import KIB, MIB, OCI_MANIFEST, Descriptor, Digest, ImageConfig, Platform
from imgsvc.content.local import LocalStore
from imgsvc.images.leases import LeaseBook
from imgsvc.images.records import Image, ImageStore, Layer, _encode
from imgsvc.images.upkeep.collector import Collector, Policy
from imgsvc.images.upkeep.nodes import Blobs, Images, Ingests
from imgsvc.snapshot.overlay import overlay
from tests.support.stored import put_blob

ROUNDS = 5
# One image as registries have them: a few small layers, a large one.
SIZES = (2 * KIB, 8 * KIB, 300 * KIB, 4 * MIB, 30 * MIB, 60 * MIB)
LAYERS_PER_IMAGE = 15
BATCH = 2000  # records per transaction while the large node is made up


def durability(directory: Path) -> None:
    """Time to store one image's blobs, sync full against none."""
    blobs = [os.urandom(size) for size in SIZES]
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for sync in (True, False):
            root = Path(tempfile.mkdtemp(dir=directory))
            db = MetaDB(root / "meta", sync=sync)
            store = LocalStore(root, db, sync=sync)
            began = time.perf_counter()
            for blob in blobs:
                put_blob(store, blob)
            times[sync].append(time.perf_counter() - began)
            db.close()
            shutil.rmtree(root)
    full, none = statistics.median(times[True]), statistics.median(times[False])
    total = sum(SIZES) / MIB
    print(
        f"durability: {len(SIZES)} blobs, {total:.0f} MiB: full {full:.3f} s ({total / full:.0f} MiB/s), none {none:.3f} s; ratio {full / none:.2f}"
    )


def _digest(*parts: object) -> Digest:
    return Digest.of(repr(parts).encode())


def _image(number: int, layers: int) -> Image:
    used = [_digest("layer", (number * 7 + at * at) % layers) for at in range(LAYERS_PER_IMAGE)]
    documents = (_digest("manifest", number), _digest("config", number))
    return Image(
        image_id=documents[1],
        manifest=Descriptor(OCI_MANIFEST, documents[0], 1000),
        config=ImageConfig(platform=Platform.host(), diff_ids=(), raw={"architecture": "amd64", "os": "linux"}),
        layers=tuple(Layer(Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", d, 10 * MIB), d, f"{d}") for d in used),
        documents=documents,
        size=1,
        created_at=float(number),
        repo_tags=(f"registry.example/app-{number}:1",),
    )


def _put_all(table: str, records: Sequence[tuple[str, Mapping[str, Any]]], txn: WriteTxn) -> None:
    for key, record in records:
        txn.put(table, key, record)


def _make_up(db: MetaDB, images: int, layers: int) -> None:
    """Records as a large node has them; no files, which a collection does not look at."""

    def put(table: str, records: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        for start in range(0, len(records), BATCH):
            db.write(partial(_put_all, table, records[start : start + BATCH]))

    blob = {"size": 10 * MIB, "created": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:00:00+00:00", "labels": {}, "stamp": [0, 0]}
    made = [_image(number, layers) for number in range(images)]
    put("images", [(image.image_id, _encode(image)) for image in made])
    put("content", [(digest, blob) for image in made for digest in image.documents])
    put("content", [(_digest("layer", number), blob) for number in range(layers)])


async def collection(directory: Path, images: int, layers: int) -> None:
    """Time and memory of one collection that finds what no image uses."""
    root = Path(tempfile.mkdtemp(dir=directory))
    db = MetaDB(root / "meta", sync=False)
    store = LocalStore(root, db, sync=False)
    _make_up(db, images, layers)
    records = ImageStore(db)
    threads = Threads(2, "gc")
    overlayfs = overlay(root / "overlayfs", db)
    source = Images(records, store, {overlayfs.name: overlayfs}, [overlayfs.name])
    collector = Collector(
        keepers=[source],
        collectables=[Blobs(store), Ingests(store)],
        cache=source,
        leases=LeaseBook(db),
        threads=threads,
        root=root,
        policy=Policy(),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    longest, watching = 0.0, True

    async def watch() -> None:
        nonlocal longest
        while watching:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began)

    watcher = asyncio.create_task(watch())
    report = await collector.collect()
    watching = False
    await watcher
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / KIB
    removed = len(report.sweep.removed)
    print(
        f"collection: {images} images, {layers} layers, database {db.size() / MIB:.0f} MiB: marked {report.live} in {report.mark_s:.2f} s,"
    )
    print(f"  swept {removed} in {report.sweep_s:.2f} s ({report.sweep_s / max(1, removed) * 1e3:.2f} ms each), memory +{grown:.0f} MiB,")
    print(f"  longest wait on the event loop meanwhile {longest * 1e3:.0f} ms")
    threads.close()
    db.close()
    shutil.rmtree(root)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=100_000)
    arguments = parser.parse_args()
    durability(arguments.directory)
    asyncio.run(collection(arguments.directory, arguments.images, arguments.layers))


if __name__ == "__main__":
    main()
