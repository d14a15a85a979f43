"""How fast the daemon answers while a large image comes in, and how much memory that takes; prints numbers, judges nothing.

    python -m benchmarks.latency [--files N] [--mebibytes N] [--seconds S] [--realtime]

Two images of one gzip layer each, one of a single large file and one of many small files, are pulled through CRI PullImage from
a registry on loopback; the second one is removed again. Meanwhile three clients call Version, ListContainers and ListImages every
10 ms; the same is measured on the idle daemon first. Goals on a quiet machine: p99 at most 10 ms, the daemon's peak at most 120 MiB, a
worker's at most 64 MiB. The clients are Python, too: what the idle daemon shows is theirs. On a machine that does other things,
--realtime puts daemon and clients before those (not the workers and the registry). Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from isal import igzip

from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.base.oci import MIB, Digest
from tests.support import cri
from tests.support.daemon import Daemon, new_daemon
from tests.support.images import Layer, image, layer
from tests.support.registries import real_registry
from tests.support.vigil import children, peak, workers

INTERVAL_S = 0.01  # between two calls of one client
LOOK_S = 0.1  # [seconds] between two looks at the processes, which take time from those that are measured
FILE = 2000  # [bytes] of each small file


def large(mebibytes: int) -> Layer:
    """One file, of which a quarter does not compress."""
    piece = os.urandom(MIB // 4) + bytes(MIB - MIB // 4)
    return _packed([("large", piece * mebibytes)])


def small(files: int) -> Layer:
    """Many files of a few kilobytes, a hundred to a directory."""
    text = bytes(range(250)) * (FILE // 250)
    return _packed([(f"d{number // 100}/f{number}", text) for number in range(files)])


def _packed(files: list[tuple[str, bytes]]) -> Layer:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    plain = out.getvalue()
    return Layer(layer(b"").media_type, igzip.compress(plain, 1), Digest.of(plain))


class Clients:
    """Call until stopped; seconds of every call, by method. worker_peak: memory of the largest worker [bytes]."""

    def __init__(self, pid: int, connect: Callable[[], grpc.Channel]) -> None:
        self.seconds: dict[str, list[float]] = {"Version": [], "ListContainers": [], "ListImages": []}
        self.worker_peak = 0
        self._pid = pid
        self._connect = connect
        self._stop = threading.Event()

    def _call(self, method: str) -> None:
        channel = self._connect()
        runtime, images = cri_pb2_grpc.RuntimeServiceStub(channel), cri_pb2_grpc.ImageServiceStub(channel)
        calls: dict[str, Callable[[], object]] = {
            "Version": lambda: runtime.Version(cri_pb2.VersionRequest()),
            "ListContainers": lambda: runtime.ListContainers(cri_pb2.ListContainersRequest()),
            "ListImages": lambda: images.ListImages(cri_pb2.ListImagesRequest()),
        }
        calls[method]()  # connected
        while not self._stop.wait(INTERVAL_S):
            began = time.perf_counter()
            calls[method]()
            self.seconds[method].append(time.perf_counter() - began)

    def _look(self) -> None:
        while not self._stop.wait(LOOK_S):
            for pid in workers(self._pid):
                self.worker_peak = max(self.worker_peak, peak(pid))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For a `with` block. The daemon's peak starts anew."""
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        threads = [threading.Thread(target=self._call, args=(method,)) for method in self.seconds]
        threads.append(threading.Thread(target=self._look))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def report(self) -> None:
        """Print how long calls took."""
        for method, seconds in self.seconds.items():
            shares = statistics.quantiles(seconds, n=100, method="inclusive")
            print(
                f"  {method:15} {len(seconds):5} calls   p50 {shares[49] * 1000:6.2f} ms   p99 {shares[98] * 1000:6.2f} ms   "
                f"longest {max(seconds) * 1000:7.2f} ms"
            )

    def report_memory(self) -> None:
        """Print what our daemon's processes took."""
        named = {"daemon": peak(self._pid), "worker": self.worker_peak}
        for pid in children(self._pid):
            program = Path(f"/proc/{pid}/cmdline").read_bytes()
            named["download process" if b"bulk_worker" in program else "worker server"] = peak(pid)
        print("  peak memory: " + ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in named.items()))


def remove(daemon: Daemon, name: str) -> None:
    """Remove an image, and wait until its files are gone."""
    spec = cri_pb2.ImageSpec(image=name)
    daemon.images().RemoveImage(cri_pb2.RemoveImageRequest(image=spec))
    while any((daemon.root / "snapshots").glob("*/*/fs/d0")) or any((daemon.root / "snapshots").glob("*/trash/*")):
        time.sleep(LOOK_S)


def measure(name: str, daemon: Daemon, work: Callable[[], object]) -> None:
    """Do `work` while clients call, and print how that went."""
    clients = Clients(daemon.pid, daemon.channel)
    began = time.monotonic()
    with clients.running():
        work()
    print(f"\n{name}: {time.monotonic() - began:.1f} s")
    clients.report()
    clients.report_memory()


def put_first(pid: int) -> None:
    """All threads of a process, and those they start, run before anything ordinary on this machine."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(1))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=70_000)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long the idle daemon is asked")
    parser.add_argument("--realtime", action="store_true", help="daemon and clients run before everything else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imgsvc-bench-") as place, real_registry(Path(place)) as registry:
        registry.push(image([large(arguments.mebibytes)]), "bench/large")
        registry.push(image([small(arguments.files)]), "bench/small")
        daemon = new_daemon(network=False)
        try:
            daemon.map_host("docker.io", registry.address)
            daemon.start()
            if arguments.realtime:
                put_first(daemon.pid)
                put_first(os.getpid())
            measure("idle", daemon, lambda: time.sleep(arguments.seconds))
            for name in ("large", "small"):
                pull = functools.partial(cri.pull, daemon.images(), f"docker.io/bench/{name}:latest")
                measure(f"pull of one layer, {name}", daemon, pull)
            measure("removal of the small files", daemon, functools.partial(remove, daemon, "docker.io/bench/small:latest"))
        finally:
            daemon.close()


if __name__ == "__main__":
    main()
