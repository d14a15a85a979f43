"""Watching a daemon from outside while a test mistreats it: whether it answers, what it takes, what it gives back."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import grpc

from imgsvc.api import cri_pb2, cri_pb2_grpc
from tests.support.daemon import Daemon
from tests.support.disk import Disk
from tests.support.leftovers import mounts_below

INTERVAL: Final = 0.02  # [seconds] between two looks
GIVES_BACK: Final = 10.0  # [seconds] until everything is given back; removal goes on in the background


class Vigil:
    """Looks at a daemon on a thread of its own, over and over.

    slowest: Version's longest answer, without waiting for a processor that others had [seconds]. peak: resident memory of the
    daemon and its descendants, added up [bytes]. worker_peak: of one unpack worker [bytes]. workers: process IDs met. odd:
    what no worker may do, one line each.
    """

    def __init__(self, daemon: Daemon) -> None:
        self.slowest = 0.0
        self.peak = self.worker_peak = 0
        self.workers: set[int] = set()
        self.odd: list[str] = []
        self._daemon = daemon
        self._stop = threading.Event()

    def look(self) -> None:
        """Once."""
        resident = {pid: _resident(pid) for pid in family(self._daemon.pid)}
        self.peak = max(self.peak, sum(resident.values()))
        for pid in workers(self._daemon.pid):
            self.workers.add(pid)
            self.worker_peak = max(self.worker_peak, peak(pid))
            self._judge(pid)

    def _judge(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            root, mapped = os.readlink(f"/proc/{pid}/root"), Path(f"/proc/{pid}/maps").read_text()
            if root != "/":
                self.odd.append(f"worker {pid} changed its root to {root}")
            if f"{self._daemon.root}/snapshots" in mapped:
                self.odd.append(f"worker {pid} has mapped a file of an image")

    def _queued(self) -> float:
        """How long the daemon's main thread and this one have waited for a processor, which others had [seconds]."""
        files = (f"/proc/{self._daemon.pid}/schedstat", "/proc/thread-self/schedstat")
        return sum(int(Path(file).read_text().split()[1]) for file in files) / 1e9

    def _run(self) -> None:
        with grpc.insecure_channel(self._daemon.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            runtime = cri_pb2_grpc.RuntimeServiceStub(channel)
            while not self._stop.wait(INTERVAL):
                began, queued = time.monotonic(), self._queued()
                try:
                    runtime.Version(cri_pb2.VersionRequest(), timeout=10)
                except grpc.RpcError as error:
                    self.odd.append(f"Version: {error}")
                self.slowest = max(self.slowest, time.monotonic() - began - (self._queued() - queued))
                self.look()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="vigil")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def family(pid: int) -> list[int]:
    """A process and all its living descendants."""
    return [pid, *(each for child in children(pid) for each in family(child))]


def children(pid: int) -> list[int]:
    """Of all threads of a process; none when it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def workers(daemon: int) -> list[int]:
    """Living unpack workers: children of the worker server, which is a child of the daemon."""
    return [pid for server in children(daemon) for pid in children(server) if _resident(pid)]


def held(daemon: Daemon) -> dict[str, Any]:
    """What a daemon holds for work in hand. Empty values when it is idle, apart from the files it has open all the time."""
    disk = Disk(daemon.root)
    snapshots = disk.records("snapshots")
    return {
        "files": sorted(_files(daemon.pid)),
        "workers": workers(daemon.pid),
        "mounts": mounts_below(daemon.directory),
        "leases": disk.records("leases"),
        "unfinished writes": sorted(path.name for path in (daemon.root / "content" / "ingest").iterdir()),
        "unfinished snapshots": [name for name, record in snapshots.items() if record.get("kind") == "active"],
        "trash": [str(path) for path in (daemon.root / "snapshots").glob("*/trash/*")],
    }


def at_rest(daemon: Daemon) -> dict[str, Any]:
    """What `held` says once the daemon has finished what it does in the background. Raises: AssertionError when it never does."""
    deadline = time.monotonic() + GIVES_BACK
    before: dict[str, Any] = {}
    while (seen := held(daemon)) != before or seen["trash"] or seen["workers"]:
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
        before = seen
    return seen


def _files(pid: int) -> Iterator[str]:
    """Open files by name, without connections: those to registries are kept for the next pull."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/{pid}/fd/{fd}")
            if not name.startswith("socket:"):
                yield name.partition(":[")[0]


def threads(pid: int) -> int:
    """How many a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def eventually(look: Callable[[], Any], wanted: Any, within: float = GIVES_BACK) -> None:
    """Wait until `look` sees what is wanted. Raises: AssertionError with what it sees instead."""
    deadline = time.monotonic() + within
    while (seen := look()) != wanted:
        assert time.monotonic() < deadline, {"seen": seen, "wanted": wanted}
        time.sleep(0.02)


def peak(pid: int) -> int:
    """Most resident memory a process has had [bytes]; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0
