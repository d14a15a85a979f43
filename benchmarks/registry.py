"""Fetching one blob: against curl and sha256sum, and over parallel ranges where each connection is slow.

Run: python -m benchmarks.registry [--size MIB] [--rounds N] [DIRECTORY]. nginx serves on loopback, both sides in one run,
alternating; times are medians. The blob goes into a real content store (verified, synced) on the disk of DIRECTORY.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import MIB, OCI_MANIFEST, Descriptor, Digest
from imgsvc.base.reference import Reference
from imgsvc.content.interfaces import Writer
from imgsvc.content.local import LocalStore
from imgsvc.registry.client import RegistryClient, RegistrySettings
from imgsvc.registry.http.bulk import BulkTransport
from tests.registry.support import hosts_d
from tests.support.registries import free_port

SLOW_RATE = 16  # [MiB/s] per connection of the limited server
SLOW_SIZE = 256  # [MiB]
GOAL_SPEED, GOAL_PARALLEL = 0.8, 3.5
LOOP_STEP = 0.002  # [s] how often the event loop is looked at


class StoreSink:
    """The way a pull writes: one hop to a thread per chunk."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.missing = writer.missing

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """See BlobSink."""
        await asyncio.to_thread(self._writer.write_at, offset, data)


@contextlib.contextmanager
def nginx(directory: Path, rate: int = 0) -> Iterator[str]:
    """Serve DIRECTORY/www, limited per connection to `rate` MiB/s. Yields "127.0.0.1:PORT"."""
    port = free_port()
    limit = f"limit_rate {rate}m;" if rate else ""
    config = directory / f"nginx-{port}.conf"
    config.write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx-{port}.pid; error_log stderr;"
        "events { worker_connections 256; }"
        f"http {{ access_log off; sendfile on; default_type {OCI_MANIFEST}; server {{ listen 127.0.0.1:{port}; root {directory}/www; {limit} }} }}"
    )
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    assert program, "nginx is not installed"
    with subprocess.Popen([program, "-p", str(directory), "-c", str(config)], stderr=subprocess.DEVNULL) as process:
        try:
            time.sleep(0.5)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def make_blob(directory: Path, size: int) -> Descriptor:
    """Noise of `size` MiB where a registry has it."""
    blobs = directory / "www" / "v2" / "library" / "bench" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with (blobs / "new").open("wb") as out:
        for _ in range(size):
            chunk = os.urandom(MIB)
            digest.update(chunk)
            out.write(chunk)
    name = Digest.from_hash("sha256", digest.hexdigest())
    (blobs / "new").rename(blobs / name)
    return Descriptor("application/vnd.oci.image.layer.v1.tar", name, size * MIB)


def with_curl(directory: Path, address: str, blob: Descriptor) -> float:
    """Curl -o, then sha256sum."""
    target = directory / "curl.out"
    began = time.perf_counter()
    subprocess.run(["curl", "-sf", "-o", target, f"http://{address}/v2/library/bench/blobs/{blob.digest}"], check=True)
    shown = subprocess.run(["sha256sum", target], check=True, capture_output=True, text=True).stdout
    elapsed = time.perf_counter() - began
    assert shown.startswith(blob.digest.hex)
    target.unlink()
    return elapsed


async def with_client(directory: Path, address: str, blob: Descriptor, extra: int = 24) -> tuple[float, float]:
    """The registry client into a content store. Returns (seconds, longest stretch of the event loop [s])."""
    root = Path(tempfile.mkdtemp(dir=directory))
    database = MetaDB(root / "meta")
    store = LocalStore(root / "content", database, sync=False)  # curl does not sync either
    roots = hosts_d(root / "hosts.d", {"docker.io": f'server = "http://{address}"\n'})
    bulk = BulkTransport()
    await bulk.warm()
    client = RegistryClient(RegistrySettings((str(roots),), max_extra_connections=extra, environ={}), bulk=bulk)
    watch = asyncio.create_task(longest_stretch())
    began = time.perf_counter()
    writer = await asyncio.to_thread(lambda: store.writer("bench", total=blob.size, expected=blob.digest))
    await client.fetcher(Reference.parse("docker.io/bench")).download(blob, StoreSink(writer))
    await asyncio.to_thread(writer.commit, blob.size, blob.digest)
    elapsed = time.perf_counter() - began
    watch.cancel()
    stretch = await watch
    await client.close()
    await bulk.aclose()
    database.close()
    shutil.rmtree(root)
    return elapsed, stretch


async def longest_stretch() -> float:
    """CPU time of the loop's thread in its longest turn, until cancelled: what other processes take is not ours."""
    longest = 0.0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)
            await asyncio.sleep(LOOP_STEP / 2)
    return longest


def speed(directory: Path, size: int, rounds: int) -> None:
    """Against curl and sha256sum."""
    blob = make_blob(directory, size)
    theirs, ours, stretches = [], [], []
    with nginx(directory) as address:
        for _ in range(rounds):
            theirs.append(with_curl(directory, address, blob))
            elapsed, stretch = asyncio.run(with_client(directory, address, blob))
            ours.append(elapsed)
            stretches.append(stretch)
    a, b = statistics.median(theirs), statistics.median(ours)
    print(f"one blob, {size} MiB: curl -o; sha256sum {a:.2f} s, ours to a verified blob {b:.2f} s ({size / b:.0f} MiB/s)")
    print(f"  ratio {a / b:.2f} (goal {GOAL_SPEED}); longest turn of the event loop {statistics.median(stretches) * 1000:.1f} ms of CPU")


def parallel(directory: Path) -> None:
    """One connection against parallel ranges at a server that limits each connection."""
    blob = make_blob(directory, SLOW_SIZE)
    with nginx(directory, SLOW_RATE) as address:
        one, _ = asyncio.run(with_client(directory, address, blob, extra=0))
        many, _ = asyncio.run(with_client(directory, address, blob))
    print(f"parallel ranges, {SLOW_SIZE} MiB at {SLOW_RATE} MiB/s per connection: one {one:.2f} s, ours {many:.2f} s")
    print(f"  ratio {one / many:.2f} (goal {GOAL_PARALLEL})")


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="of the blob [MiB]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        os.chmod(directory, 0o755)  # nginx's worker reads it as another user
        speed(Path(directory), arguments.size, arguments.rounds)
        parallel(Path(directory))


if __name__ == "__main__":
    main()
