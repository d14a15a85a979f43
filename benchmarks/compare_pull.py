"""Pulls of the same images by imgsvc and by a peer, in turn, both through CRI PullImage; prints ratios.

    python -m benchmarks.compare_pull [--containerd PATH] [--rounds N] [--directory DIR] [--sync full|none] [--snapshotter NAME] [--layers N …] [--tree PATH …]

The image is made of the trees, once for each N of --layers as that many layers. Both daemons keep their data below --directory
(default: a tmpfs), so the file system is the same; both pull from one docker-registry on loopback through a mirror in
hosts.toml. For each image it prints, as medians of the rounds and of the ratios round by round:

* wall time and CPU seconds of either daemon and of all its descendants, also those that ended; and their peak memory, the
  largest sum of their resident pages, shared ones counted once, sampled during one more pull: looking at a process's pages
  keeps it from getting others.
* the floor: what the parts cost without any service, the same layers through `curl | igzip -d | tar -x`, two at a time. It
  neither hashes what it gets, nor keeps the blobs, nor syncs; containerd does not sync layers either. We do all of that;
  --sync none leaves the last out.
* how either daemon answers Version, ListContainers and ListImages every 10 ms during one more pull, and the memory of ours and
  of its workers. The registry and the clients are on the same processors: the more layers come in at once, the more of a
  call's time is waiting for one of them.

Goals: 0.30 x the peer's wall time, 0.5 x its CPU, 1.3 x the floor; p99 10 ms; daemon 120 MiB, worker 64 MiB. They are for a
machine that does nothing else. File times are whole seconds, as builders of images write them. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.latency import Clients
from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.base.oci import KIB, MIB
from tests.support.images import BuiltDocument, Layer, image, layer
from tests.support.registries import RealRegistry, real_registry

HOST = "bench.example"
SAMPLE_S = 0.05
LEFT_FILES = 200  # what either daemon keeps for itself without an image; every image here has thousands
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """One pull [seconds]."""

    wall: float
    cpu: float


class Peer:
    """A CRI server as a child process, with its descendants measured."""

    def __init__(self, name: str, command: Sequence[str], socket: Path, log: Path) -> None:
        self.name = name
        self._directory = log.parent
        with log.open("wb") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream)
        self.pid = self._process.pid
        self._address = f"unix://{socket}"
        self._channel = self.connect()
        grpc.channel_ready_future(self._channel).result(timeout=30)
        self._images = cri_pb2_grpc.ImageServiceStub(self._channel)

    def connect(self) -> grpc.Channel:
        """A connection of its own."""
        return grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])

    def pull(self, reference: str) -> None:
        """Pull, and have nothing looked at meanwhile."""
        self._images.PullImage(cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=reference)), timeout=600)

    def measure(self, reference: str) -> Cost:
        """Pull and measure."""
        cpu, began = _cpu(self.pid), time.monotonic()
        self.pull(reference)
        wall = time.monotonic() - began
        return Cost(wall, _cpu(self.pid) - cpu)

    def peak(self, reference: str) -> int:
        """The most memory that a pull takes [bytes]."""
        with _sampling(self.pid) as sampled:
            self.pull(reference)
        return sampled.peak

    def remove(self, reference: str) -> None:
        """Forget the image and wait until its files are gone, so that the next pull starts from nothing."""
        self._images.RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)), timeout=600)
        deadline = time.monotonic() + 60
        while sum(len(files) for _, _, files in os.walk(self._directory)) > LEFT_FILES:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name} did not give back the image's files within a minute")
            time.sleep(0.2)

    def stop(self) -> None:
        """End it."""
        self._channel.close()
        self._process.terminate()
        self._process.wait(timeout=30)


class _Sampler:
    def __init__(self) -> None:
        self.peak = 0


@contextlib.contextmanager
def _sampling(pid: int) -> Iterator[_Sampler]:
    sampler, stop = _Sampler(), threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            sampler.peak = max(sampler.peak, sum(_resident(p) for p in _family(pid)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield sampler
    finally:
        stop.set()
        thread.join()


def _family(pid: int) -> list[int]:
    """A process and all its living descendants."""
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{current}/task"):
                waiting += [int(child) for child in Path(f"/proc/{current}/task/{task}/children").read_text().split()]
    return found


def _cpu(pid: int) -> float:
    """CPU seconds of a process and its descendants, ended and waited-for ones included."""
    total = 0.0
    for member in _family(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(ticks) for ticks in fields[11:15]) / TICKS
    return total


def _resident(pid: int) -> int:
    """Memory of a process [bytes], of pages that several share its share."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * KIB
    return 0


def imgsvc(directory: Path, hosts: Path, settings: str = "") -> Peer:
    """Our daemon on its defaults, apart from `settings` (TOML)."""
    directory.mkdir()
    config = directory / "config.toml"
    config.write_text(
        f'version = 1\nroot = "{directory}/root"\nstate = "{directory}/state"\nimports = []\n'
        f'[registry]\nconfig_path = "{hosts}"\n[gc]\nstartup_delay = "0s"\nschedule_delay = "0s"\n{settings}'
    )
    command = [sys.executable, "-m", "imgsvc.cli", "serve", "--config", str(config)]
    return Peer("imgsvc", command, directory / "state" / "imgsvc.sock", directory / "log")


def containerd(program: str, directory: Path, hosts: Path) -> Peer:
    """Containerd with its CRI plugin, otherwise on its defaults."""
    directory.mkdir()
    config = directory / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n[grpc]\naddress = "{directory}/c.sock"\n'
        f'[plugins."io.containerd.grpc.v1.cri"]\n[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{hosts}"\n'
        f'[plugins."io.containerd.grpc.v1.cri".cni]\nconf_dir = "{directory}/cni"\n'
    )
    return Peer("containerd", [program, "--config", str(config)], directory / "c.sock", directory / "log")


def tree_layer(paths: Sequence[Path]) -> tuple[Layer, int]:
    """Directories and files of this machine as one gzip layer; and how many entries it has."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            archive.add(path, arcname=str(path).lstrip("/"), filter=_whole_seconds)
        entries = len(archive.getmembers())
    return layer(buffer.getvalue()), entries


def build(trees: Sequence[Path], parts: int) -> tuple[BuiltDocument, int]:
    """The children of all trees spread over `parts` layers; and how many entries those have."""
    children = sorted(child for tree in trees for child in tree.iterdir())
    layers = [tree_layer(children[number::parts]) for number in range(parts)]
    return image([each for each, _ in layers]), sum(entries for _, entries in layers)


def _whole_seconds(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mtime = int(entry.mtime)
    return entry


def floor(registry: RealRegistry, repository: str, document: BuiltDocument, directory: Path) -> Cost:
    """What `curl | igzip -d | tar -x` takes for the same layers, two at a time."""
    digests = [digest for digest in document.blobs if digest != document.config_digest]
    waiting = list(enumerate(digests))
    running: list[subprocess.Popen[bytes]] = []
    before, began = os.times(), time.monotonic()
    while waiting or running:
        while waiting and len(running) < 2:
            number, digest = waiting.pop(0)
            target = directory / str(number)
            target.mkdir(parents=True)
            url = f"{registry.url}/v2/{repository}/blobs/{digest}"
            pipeline = ["bash", "-o", "pipefail", "-c", 'curl -sL "$0" | igzip -d | tar -x -C "$1"', url, str(target)]
            running.append(subprocess.Popen(pipeline))
        for process in running:
            if process.poll():
                raise SystemExit("curl, igzip (of Debian's isal) or tar failed")
        running = [process for process in running if process.returncode is None]
        time.sleep(0.002)
    wall, after = time.monotonic() - began, os.times()
    return Cost(wall, after.children_user + after.children_system - before.children_user - before.children_system)


def compare(
    name: str, built: tuple[BuiltDocument, int], registry: RealRegistry, peers: Sequence[Peer], rounds: int, directory: Path
) -> None:
    """Pull one image `rounds` times with each peer in turn and print medians and ratios."""
    document, entries = built
    registry.push(document, f"bench/{name}")
    reference = f"{HOST}/bench/{name}:latest"
    costs: dict[str, list[Cost]] = {peer.name: [] for peer in peers}
    floors: list[Cost] = []
    for _ in range(rounds):
        for peer in peers:
            costs[peer.name].append(peer.measure(reference))
            peer.remove(reference)
        scratch = directory / "floor"
        floors.append(floor(registry, f"bench/{name}", document, scratch))
        shutil.rmtree(scratch)
    memory: dict[str, int] = {}
    for peer in peers:
        memory[peer.name] = peer.peak(reference)
        peer.remove(reference)
    size = sum(len(data) for data in document.blobs.values())
    layers = len(document.blobs) - 1
    print(f"\n{name}: {layers} layers of {entries} entries, {size / MIB:.0f} MiB compressed; medians of {rounds} rounds")
    for who, found in costs.items():
        print(
            f"  {who:11} wall {_median(found, lambda c: c.wall):7.3f} s   cpu {_median(found, lambda c: c.cpu):7.3f} s   "
            f"peak {memory[who] / MIB:6.0f} MiB"
        )
    print(f"  {'floor':11} wall {_median(floors, lambda c: c.wall):7.3f} s   cpu {_median(floors, lambda c: c.cpu):7.3f} s")
    ours, theirs = (costs[peer.name] for peer in peers)
    for label, pick in (("wall", lambda c: c.wall), ("cpu", lambda c: c.cpu)):
        print(f"  ratio {label:7} {_ratio(ours, theirs, pick):5.2f} x {peers[1].name}   {_ratio(ours, floors, pick):5.2f} x floor")
    print(f"  ratio memory  {memory[peers[0].name] / memory[peers[1].name]:5.2f} x {peers[1].name}")
    for peer in peers:
        print(f"  {peer.name} meanwhile:")
        clients = Clients(peer.pid, peer.connect)
        with clients.running():
            peer.pull(reference)
        clients.report()
        if peer is peers[0]:
            clients.report_memory()
        peer.remove(reference)


def _ratio(ours: Sequence[Cost], theirs: Sequence[Cost], pick: Callable[[Cost], float]) -> float:
    return statistics.median(pick(a) / max(pick(b), 1e-9) for a, b in zip(ours, theirs, strict=True))


def _median(costs: Sequence[Cost], pick: Callable[[Cost], float]) -> float:
    return statistics.median(pick(cost) for cost in costs)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--containerd", default=shutil.which("containerd") or "containerd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where both keep their data; default: a tmpfs made for this run")
    parser.add_argument("--sync", choices=("full", "none"), default="full", help="our images.sync")
    parser.add_argument("--snapshotter", default="auto", help="our images.snapshotter")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 12])
    parser.add_argument("--tree", type=Path, action="append", help="directories that make up the image (default: this Python's packages)")
    arguments = parser.parse_args()
    packages = Path(next(p for p in sys.path if p.endswith("site-packages")))
    trees = arguments.tree or [packages]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imgsvc-bench-", dir=arguments.directory)))
        if arguments.directory is None:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(directory)], check=True)
        store = directory / "registry"
        store.mkdir()
        registry = stack.enter_context(real_registry(store))
        hosts = directory / "hosts.d" / HOST
        hosts.mkdir(parents=True)
        # containerd 1.6 refuses a file without a [host] table.
        (hosts / "hosts.toml").write_text(f'server = "http://{registry.address}"\n[host."http://{registry.address}"]\n')
        settings = f'[images]\nsync = "{arguments.sync}"\nsnapshotter = "{arguments.snapshotter}"\n'
        peers = [
            imgsvc(directory / "imgsvc", hosts.parent, settings),
            containerd(arguments.containerd, directory / "containerd", hosts.parent),
        ]
        for peer in peers:
            stack.callback(peer.stop)
        for layers in arguments.layers:
            compare(f"layers-{layers}", build(trees, layers), registry, peers, arguments.rounds, directory)


if __name__ == "__main__":
    main()
