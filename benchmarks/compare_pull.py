"""Pulls of the same images by imgsvc and by a peer, in turn, both through CRI PullImage; prints ratios.

    python -m benchmarks.compare_pull [--image py|many|node|ml …] [--snapshotter overlayfs|erofs …] [--peer-config default|tuned …]
        [--containerd PATH] [--rounds N] [--directory DIR] [--sync full|none] [--tls] [--load N] [--layers N …] [--tree PATH …]

The images are those of sample_images.py; or, with --layers, made of the trees, once for each N as that many layers. All daemons,
one of ours for each --snapshotter and one of the peer's for each --peer-config, keep their data below --directory
(default: a tmpfs), so the file system is the same; all pull from one docker-registry on loopback through a mirror in
hosts.toml. "tuned" is max_concurrent_unpacks = 3 of containerd 2.2 and later. For each image it prints, as medians of the rounds and of
the ratios round by round:

* wall time and CPU seconds of either daemon and of all its descendants, also those that ended; and their peak memory, the
  largest sum of their resident pages, shared ones counted once, sampled during one more pull: looking at a process's pages
  keeps it from getting others.
* the floor: what the parts cost without any service, the same layers through `curl | igzip -d | tar -x`, two at a time. It
  neither hashes what it gets, nor keeps the blobs, nor syncs; containerd does not sync layers either. We do all of that;
  --sync none leaves the last out.
* how either daemon answers Version, ListContainers and ListImages every 10 ms during one more pull, and the memory of ours and
  of its workers. The registry and the clients are on the same processors: the more layers come in at once, the more of a
  call's time is waiting for one of them.

--load N has N processes count beside everything, as on a busy node. The machine's load is printed with each image; ratios of one
round are of pulls within the same minute, so they bear other work better than times do. Needs root.
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

from benchmarks import sample_images
from benchmarks.latency import Clients
from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.base.oci import KIB, MIB
from tests.support.images import BuiltDocument, Layer, image, layer
from tests.support.registries import RealRegistry, real_registry

HOST = "bench.example"
SAMPLE_S = 0.05
LEFT_FILES = 100  # more than before the pull is what a daemon may keep for itself
LEFT_SHARE = 0.1  # of an image's compressed size, likewise: databases grow
REMOVAL_S = 600  # [seconds]; ext4 takes minutes for a tree of 74 000 files
CONFIGS = {"default": "", "tuned": '[plugins."io.containerd.transfer.v1.local"]\nmax_concurrent_unpacks = 3\n'}
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
        self._empty = _stored(self._directory)

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

    def remove(self, reference: str, size: int) -> None:
        """Forget the image, `size` bytes compressed, and wait until its files are gone, so that the next pull starts from nothing."""
        self._images.RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)), timeout=600)
        deadline = time.monotonic() + REMOVAL_S
        files, used = self._empty
        while (now := _stored(self._directory)) > (files + LEFT_FILES, 0) or now[1] > used + LEFT_SHARE * size:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name} still has {now[0] - files} files, {(now[1] - used) / MIB:.0f} MiB, of the image")
            time.sleep(0.3)

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


def _stored(directory: Path) -> tuple[int, int]:
    """Files below a directory and what they take [bytes]; not what is mounted there."""
    device = directory.stat().st_dev
    files = used = 0
    todo = [str(directory)]
    while todo:
        with contextlib.suppress(FileNotFoundError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not entry.is_dir(follow_symlinks=False):
                        files, used = files + 1, used + status.st_blocks * 512
                    elif status.st_dev == device:
                        todo.append(entry.path)
    return files, used


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


def imgsvc(name: str, directory: Path, hosts: Path, settings: str = "") -> Peer:
    """Our daemon on its defaults, apart from `settings` (TOML)."""
    directory.mkdir()
    config = directory / "config.toml"
    config.write_text(
        f'version = 1\nroot = "{directory}/root"\nstate = "{directory}/state"\nimports = []\n'
        f'[registry]\nconfig_path = "{hosts}"\n[gc]\nstartup_delay = "0s"\nschedule_delay = "0s"\n{settings}'
    )
    command = [sys.executable, "-m", "imgsvc.cli", "serve", "--config", str(config)]
    return Peer(name, command, directory / "state" / "imgsvc.sock", directory / "log")


def containerd(name: str, program: str, directory: Path, hosts: Path, settings: str = "") -> Peer:
    """Containerd with its CRI plugin, otherwise on its defaults, apart from `settings` (TOML)."""
    directory.mkdir()
    config = directory / "config.toml"
    config.write_text(
        f'version = 2\nimports = []\nroot = "{directory}/root"\nstate = "{directory}/state"\n[grpc]\naddress = "{directory}/c.sock"\n'
        f'[plugins."io.containerd.grpc.v1.cri"]\n[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{hosts}"\n'
        f'[plugins."io.containerd.grpc.v1.cri".cni]\nconf_dir = "{directory}/cni"\n{settings}'
    )
    return Peer(name, [program, "--config", str(config)], directory / "c.sock", directory / "log")


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
    trusted = ["--cacert", str(registry.authority)] if registry.authority else []
    waiting = list(enumerate(digests))
    running: list[subprocess.Popen[bytes]] = []
    before, began = os.times(), time.monotonic()
    while waiting or running:
        while waiting and len(running) < 2:
            number, digest = waiting.pop(0)
            target = directory / str(number)
            target.mkdir(parents=True)
            url = f"{registry.url}/v2/{repository}/blobs/{digest}"
            pipeline = ["bash", "-o", "pipefail", "-c", 'curl -sL "${@:2}" "$0" | igzip -d | tar -x -C "$1"', url, str(target), *trusted]
            running.append(subprocess.Popen(pipeline))
        for process in running:
            if process.poll():
                raise SystemExit("curl, igzip (of Debian's isal) or tar failed")
        running = [process for process in running if process.returncode is None]
        time.sleep(0.002)
    wall, after = time.monotonic() - began, os.times()
    return Cost(wall, after.children_user + after.children_system - before.children_user - before.children_system)


def compare(
    name: str, built: tuple[BuiltDocument, int], registry: RealRegistry, ours: Sequence[Peer], theirs: Sequence[Peer], arguments: Settings
) -> None:
    """Pull one image in turn with each daemon and print medians and ratios."""
    document, entries = built
    registry.push(document, f"bench/{name}")
    reference = f"{HOST}/bench/{name}:latest"
    size = sum(len(data) for data in document.blobs.values())
    costs: dict[str, list[Cost]] = {peer.name: [] for peer in (*ours, *theirs)}
    costs["floor"] = []
    loads = []
    for _ in range(arguments.rounds):
        for peer in (*ours, *theirs):
            costs[peer.name].append(peer.measure(reference))
            peer.remove(reference, size)
        loads.append(os.getloadavg()[0])
        scratch = arguments.directory / "floor"
        costs["floor"].append(floor(registry, f"bench/{name}", document, scratch))
        shutil.rmtree(scratch)
    memory = {}
    for peer in (*ours, *theirs):
        memory[peer.name] = peer.peak(reference)
        peer.remove(reference, size)
    layers = len(document.blobs) - 1
    print(
        f"\n{name}: {layers} layers of {entries} entries, {size / MIB:.0f} MiB compressed; medians of {arguments.rounds} rounds; "
        f"load of the machine {min(loads):.1f} to {max(loads):.1f}"
    )
    for who, found in costs.items():
        walls = [cost.wall for cost in found]
        peak = f"   peak {memory[who] / MIB:6.0f} MiB" if who in memory else ""
        print(
            f"  {who:20} wall {statistics.median(walls):7.3f} s ({min(walls):.3f} to {max(walls):.3f})   "
            f"cpu {_median(found, lambda c: c.cpu):7.3f} s{peak}"
        )
    for one in ours:
        for other in (*(peer.name for peer in theirs), "floor"):
            wall, cpu = (_ratio(costs[one.name], costs[other], pick) for pick in (lambda c: c.wall, lambda c: c.cpu))
            print(f"  {one.name:20} {wall:5.2f} x wall, {cpu:5.2f} x cpu of {other}")
    for peer in (*ours, *theirs):
        print(f"  {peer.name} meanwhile:")
        clients = Clients(peer.pid, peer.connect)
        with clients.running():
            peer.pull(reference)
        clients.report()
        if peer in ours:
            clients.report_memory()
        peer.remove(reference, size)
    sys.stdout.flush()


def _ratio(ours: Sequence[Cost], theirs: Sequence[Cost], pick: Callable[[Cost], float]) -> float:
    return statistics.median(pick(a) / max(pick(b), 1e-9) for a, b in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that count, for a `with` block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _median(costs: Sequence[Cost], pick: Callable[[Cost], float]) -> float:
    return statistics.median(pick(cost) for cost in costs)


@dataclass(frozen=True, slots=True)
class Settings:
    """rounds [count]. directory: where everything is kept."""

    rounds: int
    directory: Path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--containerd", default=shutil.which("containerd") or "containerd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where all keep their data; default: a tmpfs made for this run")
    parser.add_argument("--sync", choices=("full", "none"), default="full", help="our images.sync")
    parser.add_argument("--snapshotter", nargs="+", default=["auto"], help="our images.snapshotter")
    parser.add_argument("--peer-config", nargs="+", choices=CONFIGS, default=["default"])
    parser.add_argument("--image", nargs="+", choices=sample_images.IMAGES, default=[])
    parser.add_argument("--tls", action="store_true", help="the registry speaks TLS")
    parser.add_argument("--load", type=int, default=0, help="processes that keep the processors busy")
    parser.add_argument("--layers", type=int, nargs="+", default=[])
    parser.add_argument("--tree", type=Path, action="append", help="directories that make up the image (default: this Python's packages)")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    arguments = _arguments()
    packages = Path(next(p for p in sys.path if p.endswith("site-packages")))
    trees = arguments.tree or [packages]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imgsvc-bench-", dir=arguments.directory)))
        if arguments.directory is None:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(directory)], check=True)
        store = directory / "registry"
        store.mkdir()
        registry = stack.enter_context(real_registry(store, tls=arguments.tls))
        hosts = directory / "hosts.d" / HOST
        hosts.mkdir(parents=True)
        # containerd 1.6 refuses a file without a [host] table.
        trusted = f'ca = "{registry.authority}"\n' if registry.authority else ""
        (hosts / "hosts.toml").write_text(f'server = "{registry.url}"\n{trusted}[host."{registry.url}"]\n{trusted}')
        ours, theirs = [], []
        for driver in arguments.snapshotter:
            settings = f'[images]\nsync = "{arguments.sync}"\nsnapshotter = "{driver}"\n'
            ours.append(imgsvc(f"imgsvc {driver}", directory / driver, hosts.parent, settings))
            stack.callback(ours[-1].stop)
        for config in arguments.peer_config:
            name = f"containerd {config}"
            theirs.append(containerd(name, arguments.containerd, directory / f"containerd-{config}", hosts.parent, CONFIGS[config]))
            stack.callback(theirs[-1].stop)
        print(subprocess.run([arguments.containerd, "--version"], check=True, capture_output=True, text=True).stdout.strip())
        print(f"Linux {os.uname().release}, {len(os.sched_getaffinity(0))} processors, {arguments.directory or 'tmpfs'}")
        stack.enter_context(busy(arguments.load))
        for name in arguments.image:
            compare(name, sample_images.build(name), registry, ours, theirs, Settings(arguments.rounds, directory))
        for layers in arguments.layers or ([] if arguments.image else [1, 12]):
            compare(f"layers-{layers}", build(trees, layers), registry, ours, theirs, Settings(arguments.rounds, directory))


if __name__ == "__main__":
    main()
