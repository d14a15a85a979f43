"""A daemon with thousands of images: its start, its listing, removing them all, and the collection after that.

    python -m benchmarks.scale [--images N] [--directory DIR] [--sync none|full]

The store is written directly: every image has a manifest, a config and one layer of its own, all tiny. Prints seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.base.concurrency import in_thread
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import OCI_MANIFEST, Descriptor, Digest, config_from_json
from imgsvc.content.local import LocalStore
from imgsvc.images.records import Image, ImageStore, Layer
from imgsvc.snapshot.interfaces import Key, Name, Usage
from imgsvc.snapshot.overlay import OverlaySnapshotter
from tests.support.daemon import Daemon

IMAGES = 3000
LISTINGS = 20


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=IMAGES)
    arguments.add_argument("--directory", type=Path)
    arguments.add_argument("--sync", choices=("none", "full"), default="full")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="imgsvc-bench-", dir=options.directory) as scratch:
        directory = Path(scratch)
        _timed("building the store", lambda: asyncio.run(fill(directory / "root", options.images)))
        measure(directory, options.sync)


def measure(directory: Path, sync: str) -> None:
    """Of a daemon on the store below `directory`."""
    daemon = Daemon(directory, None, "")
    (directory / "hosts.d").mkdir()
    daemon.config.write_text(
        f'version = 1\nroot = "{daemon.root}"\nstate = "{daemon.state}"\n[grpc]\naddress = "{daemon.address}"\n'
        f'[images]\nsync = "{sync}"\n[registry]\nconfig_path = "{directory}/hosts.d"\n[gc]\nstartup_delay = 3600\nschedule_delay = 3600\n'
    )
    try:
        _timed("start to ready", daemon.start)
        service = daemon.images()
        images = list(service.ListImages(cri_pb2.ListImagesRequest()).images)
        taken = [_seconds(lambda: service.ListImages(cri_pb2.ListImagesRequest())) for _ in range(LISTINGS)]
        print(f"{'ListImages':24} {statistics.median(taken):8.3f} s median of {LISTINGS}")
        _timed(f"removing {len(images)} images", lambda: _remove(service, [image.id for image in images]))
        _timed("the collection after it", lambda: _collect(daemon))
    finally:
        daemon.close()


def _remove(service: cri_pb2_grpc.ImageServiceStub, ids: list[str]) -> None:
    for image in ids:
        service.RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=image)))


def _collect(daemon: Daemon) -> None:
    done = daemon.cli("gc", "--json")
    if done.returncode:
        raise SystemExit(done.stderr)


def _timed(what: str, work: Callable[[], object]) -> None:
    print(f"{what:24} {_seconds(work):8.3f} s", flush=True)


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


async def fill(root: Path, count: int) -> None:
    """Put `count` images into the stores below `root`. Nothing is synced."""
    db = MetaDB(root / "metadata", sync=False)
    content = LocalStore(root, db, sync=False)
    snapshotter = OverlaySnapshotter(root / "snapshots" / "overlayfs", db)
    images = ImageStore(db)
    try:
        for start in range(0, count, 64):
            await asyncio.gather(*(_add(number, content, snapshotter, images) for number in range(start, min(start + 64, count))))
    finally:
        snapshotter.close()
        db.close()


async def _add(number: int, content: LocalStore, snapshotter: OverlaySnapshotter, images: ImageStore) -> None:
    manifest, config, layer = await asyncio.gather(
        *(in_thread(_put, content, f"{what} {number}") for what in ("manifest", "config", "layer"))
    )
    key, name = Key(f"unpack-{number}"), Name(f"layer-{number}")
    await in_thread(snapshotter.prepare, key, None)
    await in_thread(lambda: snapshotter.commit(name, key, usage=Usage(4096, 1)))
    document = {"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]}, "rootfs": {"type": "layers", "diff_ids": [layer]}}
    image = Image(
        image_id=config,
        manifest=Descriptor(OCI_MANIFEST, manifest, 20),
        config=config_from_json(document, "a made-up image"),
        layers=(Layer(Descriptor("application/vnd.oci.image.layer.v1.tar", layer, 20), layer, name),),
        documents=(manifest, config),
        size=60,
        created_at=float(number),
    )
    await images.add(image, f"registry.example/made-up/{number}:1", f"registry.example/made-up/{number}@{manifest}")


def _put(content: LocalStore, text: str) -> Digest:
    data = text.encode()
    digest = Digest.of(data)
    with contextlib.closing(content.writer(text, total=len(data), expected=digest)) as writer:
        writer.write(data)
        writer.commit(len(data), digest)
    return digest


if __name__ == "__main__":
    main()
