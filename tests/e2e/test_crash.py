"""C-D1 through the daemon: SIGKILL at every failpoint between a pull and the collection of its image, restart, look.

An image is absent or complete, whatever happened; what was acknowledged is there; nothing half-made stays; the next pull
works and takes what is missing only. The points of pods are in tests/runtime/test_crash.py, those that no call of the
daemon passes (UNREACHED) in tests/content/test_crash.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from imgsvc.api import admin_pb2, cri_pb2
from imgsvc.base import failpoints
from imgsvc.base.oci import Digest
from tests.e2e.twoimages import APP, BASE, LAYERS, admin, check, collect, offer, pull, remove
from tests.fakes.registry import FakeRegistry, Request
from tests.support import cri
from tests.support.daemon import RPC_TIMEOUT, Daemon, new_daemon
from tests.support.disk import Disk, Expected

pytestmark = pytest.mark.root

OTHER = "docker.io/two/app:other"
STRAY, UNFINISHED = b"a blob that a power cut left without a record", "abandoned two days ago"
UNREACHED = {
    "content.update": "labels of blobs are changed by no call yet",
    "content.truncate": "no download cuts what it has",
    "metadb.migrate": "there is one format so far",
}
IN_A_WORKER = {name for name in failpoints.POINTS if name.startswith("unpack.")}
OF_PODS = {name for name in failpoints.POINTS if name.startswith(("sandbox.", "container.", "watch."))}
OF_EROFS = {"snapshot.built"}  # in test_snapshotters.py
POINTS = [name for name in failpoints.POINTS if name not in UNREACHED.keys() | IN_A_WORKER | OF_PODS | OF_EROFS]
AGAIN = [  # where the first time is during the start, or of the first of several layers
    ("metadb.commit", 5),
    ("metadb.committed", 9),
    ("content.written", 3),
    ("content.commit.renamed", 4),
    ("layer.prepared", 2),
    ("layer.committed", 2),
    ("gc.removed", 3),
]


@dataclass(frozen=True, slots=True)
class Scene:
    """A root as a killed daemon left it, with BASE and rubbish of all kinds; the registry; what images have to look like."""

    root: Path
    registry: FakeRegistry
    expected: dict[str, Expected]
    blobs: dict[str, str]  # digest of a layer's blob → name of its snapshot


LEAVE_RUBBISH = """
import os, sys, asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from imgsvc.content.local import LocalStore
from imgsvc.images.leases import LeaseBook
from imgsvc.base.metadb.database import MetaDB

before = lambda: datetime.now(UTC) - timedelta(days=2)
root = Path(sys.argv[1])
db = MetaDB(root / "metadata")
writer = LocalStore(root, db, sync=False, clock=before).writer(sys.argv[2], total=100)
writer.write(b"x" * 10)
for file in (root / "content/ingest").glob("*/data"):
    os.utime(file, (before().timestamp(),) * 2)
asyncio.run(LeaseBook(db, before).hold([("content", "sha256:" + "0" * 64)], expires_in=timedelta(days=1), purpose="expired"))
os._exit(0)  # without closing anything
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with FakeRegistry() as registry:
        offer(registry)
        place = tmp_path_factory.mktemp("scene")
        daemon = new_daemon(network=False, settings="enabled = false\n")
        try:
            daemon.map_host("docker.io", registry.address)
            daemon.start()
            pull(daemon, BASE)
            pull(daemon, APP)
            names = {x["descriptor"]["digest"]: x["snapshot"] for i in Disk(daemon.root).images().values() for x in i["layers"]}
            remove(daemon, APP)
            collect(daemon)
            assert daemon.stop() == 0
            subprocess.run([sys.executable, "-c", LEAVE_RUBBISH, str(daemon.root), UNFINISHED], check=True, timeout=180)
            (daemon.root / "content/blobs/sha256" / Digest.of(STRAY).hex).write_bytes(STRAY)
            copy(daemon.root, place / "root")
        finally:
            daemon.close()
        expected = {name: Expected(place / name.split("/")[2], LAYERS[name]) for name in LAYERS}
        yield Scene(place / "root", registry, expected, names)


def copy(source: Path, target: Path) -> None:
    """With owners, times, extended attributes, and device files as what they are."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True, timeout=60)


@pytest.fixture
def node(scene: Scene, make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon on a copy of the scene's root; not started."""
    daemon = make_daemon(settings=f'enabled = false\n[prepull]\ndirectory = "/tmp/{os.getpid()}/prepull.d"\n')
    daemon.map_host("docker.io", scene.registry.address)
    copy(scene.root, daemon.root)
    return daemon


def lead_a_life(daemon: Daemon, armed: str) -> list[str]:
    """Start, pull, tag, remove, collect, stop, until it dies. Returns what was acknowledged."""
    acknowledged: list[str] = []
    steps: dict[str, Callable[[], object]] = {
        "started": lambda: daemon.start({failpoints.ENV: armed}),
        "pulled": lambda: pull(daemon, APP),
        "tagged": lambda: admin(daemon).Tag(admin_pb2.TagRequest(source=APP, target=OTHER), timeout=RPC_TIMEOUT),
        "removed": lambda: remove(daemon, BASE),
        "collected": lambda: collect(daemon),
        "stopped": lambda: os.kill(daemon.pid, signal.SIGTERM),
    }
    for name, step in steps.items():
        try:
            step()
            acknowledged.append(name)
        except (grpc.RpcError, AssertionError):
            break
    return acknowledged


def died(daemon: Daemon) -> bool:
    """Whether it ended by SIGKILL."""
    process, daemon.process = daemon.process, None
    assert process is not None
    try:
        return process.wait(timeout=60) == -signal.SIGKILL
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def check_what_is_shown(scene: Scene, daemon: Daemon, acknowledged: list[str]) -> None:
    """Right after the restart, before anything is asked of it."""
    disk = Disk(daemon.root)
    shown = disk.images()
    listed = daemon.images().ListImages(cri_pb2.ListImagesRequest(), timeout=RPC_TIMEOUT).images
    assert {tag for found in listed for tag in found.repo_tags} == {name for name in shown if "@" not in name}
    assert ("pulled" not in acknowledged) or APP in shown
    assert ("tagged" not in acknowledged) or OTHER in shown
    assert ("removed" not in acknowledged) or BASE not in shown
    assert ("tagged" in acknowledged) or BASE in shown
    for name in shown.keys() & {BASE, APP}:
        status = cri.image_status(daemon.images(), name)
        assert status is not None
        assert status.id == shown[name]["image_id"]
        scene.expected[name].check(disk, shown[name])
    assert [finding for finding in check(daemon) if finding["broken"]] == []


def check_nothing_half_made(daemon: Daemon, failed: Collection[str] = ()) -> None:
    """After a collection: everything on disk has a record, everything unfinished is of a pull that may come back.

    failed: blobs of a pull that was refused, not killed; it holds nothing any more, and what it has of them waits for the next one.
    """
    disk = Disk(daemon.root)
    snapshots = disk.snapshots()
    assert {record["kind"] for record in snapshots.values()} <= {"committed"}
    assert disk.directories() == {record["number"] for record in snapshots.values()}
    assert disk.blobs() == set(disk.records("content"))
    leased = {name for lease in disk.records("leases").values() for _, name in lease["resources"]}
    assert {ingest["expected"] for ingest in disk.ingests()} <= leased.union(failed)


def is_sample(request: Request, registry: FakeRegistry) -> bool:
    """Whether a repository is only to show that it has a blob: what a pull that was killed saw of it was not recorded."""
    first, _, last = request.headers.get("range", "").removeprefix("bytes=").partition("-")
    size = int(last) - int(first) + 1 if last else len(registry.blobs[request.path.rpartition("/")[2]])
    return size <= 4096


def check_the_next_pull(scene: Scene, daemon: Daemon) -> None:
    """It fetches the blobs of layers that are not there, and those only."""
    disk = Disk(daemon.root)
    there = set(disk.records("content")) | {blob for blob, name in scene.blobs.items() if name in disk.snapshots()}
    before = len(scene.registry.seen("/blobs/", "GET"))
    pull(daemon, APP)
    pull(daemon, BASE)
    asked = [request for request in scene.registry.seen("/blobs/", "GET")[before:] if not is_sample(request, scene.registry)]
    fetched = [request.path.rpartition("/")[2] for request in asked]
    assert not there.intersection(fetched)
    assert sorted(set(fetched)) == sorted(fetched), "something came twice"
    shown = disk.images()
    for name in (BASE, APP):
        scene.expected[name].check(disk, shown[name])
    collect(daemon)
    check_nothing_half_made(daemon)
    assert disk.ingests() == []
    assert [finding for finding in check(daemon) if finding["broken"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("point, hit", [*((name, 1) for name in POINTS), *AGAIN])
def test_c_d1_killed_at_a_failpoint(scene: Scene, node: Daemon, point: str, hit: int) -> None:
    if point.startswith("prepull."):
        settings = node.config.read_text()
        wanted = node.directory / "prepull.d"
        wanted.mkdir()
        (wanted / "app.toml").write_text(f'version = 1\n[[image]]\nreference = "{APP}"\n')
        node.config.write_text(settings.replace(f"/tmp/{os.getpid()}/prepull.d", str(wanted)))
    acknowledged = lead_a_life(node, f"{point}=kill@{hit}")
    assert died(node), f"{point} is not reached: {acknowledged}\n{node.log[-3000:]}"
    node.start()
    check_what_is_shown(scene, node, acknowledged)
    collect(node)
    check_nothing_half_made(node)
    check_the_next_pull(scene, node)
    assert node.stop() == 0


@pytest.mark.parametrize("point, hit", [(name, 1) for name in sorted(IN_A_WORKER)] + [("unpack.entry", 20)])
def test_c_d1_an_unpack_worker_killed_at_a_failpoint(scene: Scene, node: Daemon, point: str, hit: int) -> None:
    node.start({failpoints.ENV: f"{point}=kill@{hit}"})
    code, text = cri.refusal(lambda: pull(node, APP))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "unpack worker was killed" in text
    check_what_is_shown(scene, node, [])
    collect(node)
    check_nothing_half_made(node, scene.blobs.keys())
    assert node.stop() == 0
    node.start()
    check_the_next_pull(scene, node)


def test_c_d1_a_daemon_killed_while_its_workers_unpack(scene: Scene, node: Daemon) -> None:
    node.start({failpoints.ENV: "unpack.entry=delay:60000*1@2"})
    call = node.images().PullImage.future(cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=APP)), timeout=RPC_TIMEOUT)
    deadline = time.monotonic() + 60
    while len(workers := [pid for pid in descendants(node.pid) if "imgsvc.snapshot.unpack.worker" in words(pid)]) < 3:
        assert time.monotonic() < deadline, f"only {workers} are at it"
        time.sleep(0.02)
    node.kill()
    call.exception()
    while any(words(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers live longer than their daemon"
        time.sleep(0.02)
    node.start()
    check_what_is_shown(scene, node, [])
    collect(node)
    check_nothing_half_made(node)
    check_the_next_pull(scene, node)


def words(pid: int) -> list[str]:
    """A process's command line; nothing for one that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    return []


def descendants(pid: int) -> list[int]:
    """Children and theirs."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
        return [each for child in children for each in (child, *descendants(child))]
    return []
