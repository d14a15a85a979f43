"""Unpacking by our workers against `igzip -d | tar -x`, the same layers two at a time on the same file system.

    python -m benchmarks.unpack [--rounds N] [--directory DIR] [TREE ...]

Every TREE becomes one layer; without any, two made-up ones: 60 000 small files like node_modules, 8 000 larger ones like a
system. Prints wall and CPU seconds, best of the rounds, the ratio of both, and the largest worker.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import os
import random
import resource
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import MIB, Digest
from imgsvc.snapshot.interfaces import Key, LayerInput, Limits
from imgsvc.snapshot.overlay import OverlaySnapshotter
from imgsvc.snapshot.unpack.unpacker import WorkerUnpacker

AT_A_TIME = 2


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("trees", nargs="*", type=Path)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="imgsvc-bench-", dir=options.directory) as scratch:
        root = Path(scratch)
        layers = [_packed(_tree(tree), root / f"{i}.tar.gz") for i, tree in enumerate(options.trees)] or [
            _packed(_made_up(files, size), root / f"{files}.tar.gz") for files, size in ((60_000, 1200), (8_000, 30_000))
        ]
        diff_ids = [_diff_id(layer) for layer in layers]
        floor = _best(options.rounds, lambda: _floor(root, layers))
        ours = _best(options.rounds, lambda: _ours(root, layers, diff_ids))
    for name, (wall, cpu) in (("igzip | tar", floor), ("imgsvc", ours)):
        print(f"{name:12} wall {wall:6.3f} s   cpu {cpu:6.3f} s")
    print(f"{'ratio':12} wall {ours[0] / floor[0]:6.2f}     cpu {ours[1] / floor[1]:6.2f}")


def _best(rounds: int, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    found = [measure() for _ in range(rounds)]
    return min(wall for wall, _ in found), min(cpu for _, cpu in found)


def _made_up(files: int, size: int) -> bytes:
    source = random.Random(files)
    text = b" ".join(b"%x" % source.getrandbits(20) for _ in range(size))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(files):
            if number % 10 == 0:
                where = f"opt/{number // 1000}/package-{number // 10}"
                entry = tarfile.TarInfo(where)
                entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, 1_600_000_000
                archive.addfile(entry)
            entry = tarfile.TarInfo(f"opt/{number // 1000}/package-{number // 10}/file-{number}.js")
            entry.size, entry.mtime = source.randrange(2 * size), 1_600_000_000
            start = source.randrange(len(text) - entry.size)
            archive.addfile(entry, io.BytesIO(text[start : start + entry.size]))
    return out.getvalue()


def _tree(tree: Path) -> bytes:
    return subprocess.run(["tar", "-C", str(tree), "-cf", "-", "."], capture_output=True, check=True).stdout


def _packed(layer: bytes, path: Path) -> Path:
    path.write_bytes(subprocess.run(["igzip", "-c"], input=layer, capture_output=True, check=True).stdout)
    return path


def _diff_id(layer: Path) -> Digest:
    return Digest.from_hash("sha256", hashlib.sha256(subprocess.run(["igzip", "-dc", str(layer)], capture_output=True).stdout).hexdigest())


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _floor(root: Path, layers: Sequence[Path]) -> tuple[float, float]:
    target = root / "floor"
    target.mkdir()

    def work() -> None:
        command = 'mkdir "$1" && igzip -dc "$0" | tar -x -p --numeric-owner --xattrs --xattrs-include=* -C "$1"'
        pending = list(enumerate(layers))
        running: list[subprocess.Popen[bytes]] = []
        while pending or running:
            while pending and len(running) < AT_A_TIME:
                number, layer = pending.pop(0)
                running.append(subprocess.Popen(["sh", "-c", command, str(layer), str(target / str(number))]))
            if running.pop(0).wait():
                raise SystemExit("tar failed")

    try:
        before, began = _cpu(), time.monotonic()
        work()
        return time.monotonic() - began, _cpu() - before
    finally:
        shutil.rmtree(target)


def _ours(root: Path, layers: Sequence[Path], diff_ids: Sequence[Digest]) -> tuple[float, float]:
    db = MetaDB(root / "db", sync=False)
    snapshotter = OverlaySnapshotter(root / "overlayfs", db)
    unpacker = WorkerUnpacker(max_concurrent=AT_A_TIME, limits=Limits(0, 0, 0))

    async def one(layer: Path, diff_id: Digest, key: Key) -> None:
        fd = os.open(layer, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = layer.stat().st_size
            mounts = snapshotter.prepare(key, None)
            job = await unpacker.start(LayerInput("layer.tar+gzip", diff_id, diff_id, fd, size), mounts, rebase=True)
            job.advance(size)
            applied = await job.finish()
            await unpacker.settle(mounts, job)
            if applied.peak_memory > 64 * MIB:
                print(f"a worker took {applied.peak_memory // MIB} MiB")
        finally:
            os.close(fd)

    async def work() -> float:
        await unpacker.warm()  # as it is in a daemon that has pulled before
        began = time.monotonic()
        keys = [Key(str(layer)) for layer in layers]
        await asyncio.gather(*(one(*each) for each in zip(layers, diff_ids, keys, strict=True)))
        wall = time.monotonic() - began
        await unpacker.close()
        return wall

    before = _cpu()
    try:
        wall = asyncio.run(work())
        return wall, _cpu() - before
    finally:
        snapshotter.close()
        db.close()
        shutil.rmtree(root / "overlayfs")
        shutil.rmtree(root / "db")


if __name__ == "__main__":
    main()
