"""C-D4, C-D5 through the daemon: what is broken on disk is found, never served, and healed by pulling again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import lmdb
import pytest

from imgsvc.base.oci import KIB
from tests.e2e.conftest import BUSYBOX
from tests.e2e.twoimages import APP, BASE, LAYERS, check, offer, pull
from tests.fakes.registry import FakeRegistry, Reply
from tests.support import cri
from tests.support.daemon import Daemon
from tests.support.disk import Disk, Expected

pytestmark = pytest.mark.root


@pytest.fixture
def source() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        offer(registry)
        yield registry


@pytest.fixture
def node(make_daemon: Callable[..., Daemon], source: FakeRegistry) -> Daemon:
    """A daemon that has pulled both images."""
    daemon = make_daemon(settings="enabled = false\n")
    daemon.map_host("docker.io", source.address)
    daemon.start()
    pull(daemon, BASE)
    pull(daemon, APP)
    return daemon


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir(mode=0o755)


LOSSES: dict[str, Callable[[Path], object]] = {
    "files gone": empty,
    "fs gone": shutil.rmtree,
    "snapshot directory gone": lambda path: shutil.rmtree(path.parent),
}


def flip(path: Path) -> None:
    """One bit, by a disk that tells nobody: size and times stay. The change time cannot."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("position", [0, 2])
def test_c_d4_a_layer_that_lost_its_files(node: Daemon, source: FakeRegistry, tmp_path: Path, loss: str, position: int) -> None:
    disk = Disk(node.root)
    name = disk.images()[APP]["layers"][position]["snapshot"]
    LOSSES[loss](disk.layer_directory(name))
    used_by = {BASE, APP} if position == 0 else {APP}
    for image in (BASE, APP):
        assert (cri.image_status(node.images(), image) is None) == (image in used_by), "the kubelet pulls what is not there"
    found = check(node, deep=False)
    assert found[0]["kind"] == "layer"
    assert found[0]["id"] == f"overlayfs/{name}"
    assert {f["id"] for f in found if f["kind"] == "image"} == used_by
    assert node.cli("fsck").returncode == 1
    downloads = len(source.seen("/blobs/", "GET"))
    for image in used_by:
        pull(node, image)
        Expected(tmp_path / image.replace("/", "-"), LAYERS[image]).check(disk, disk.images()[image])
    assert len(source.seen("/blobs/", "GET")) == downloads, "its blob was here"
    assert check(node) == []
    assert node.cli("fsck", "--deep").returncode == 0


def test_c_d4_lost_layers_are_healed_after_a_restart_too(node: Daemon, tmp_path: Path) -> None:
    disk = Disk(node.root)
    node.kill()
    for layer in disk.images()[APP]["layers"][:2]:
        shutil.rmtree(disk.layer_directory(layer["snapshot"]).parent)
    node.start()
    assert cri.image_status(node.images(), APP) is None
    pull(node, APP)
    assert cri.image_status(node.images(), BASE) is not None, "it shares what came back"
    for image in (BASE, APP):
        Expected(tmp_path / image.replace("/", "-"), LAYERS[image]).check(disk, disk.images()[image])
    assert check(node) == []


def relink(path: Path) -> None:
    target = path.readlink()
    path.unlink()
    path.symlink_to(str(target).replace("tool", "lool"))


ALTERATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "contents": (lambda root: flip(root / "bin/tool"), "/bin/tool: "),
    "a file gone": (lambda root: (root / "etc/passwd").unlink(), "/etc/passwd: is missing"),
    "a file more": (lambda root: (root / "etc/more").touch(), "/etc/more: is not in the layer"),
    "mode": (lambda root: (root / "bin/tool").chmod(0o755), "/bin/tool: another type or mode"),
    "owner": (lambda root: os.chown(root / "etc", 0, 0), "/etc: another owner"),
    "xattr": (lambda root: os.removexattr(root / "bin/tool", "user.note"), "/bin/tool: other extended attributes"),
    "link target": (lambda root: relink(root / "sh"), "/sh: another t"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_c_d4_an_altered_layer_is_found_by_a_deep_check(node: Daemon, tmp_path: Path, alteration: str) -> None:
    disk = Disk(node.root)
    name = disk.images()[BASE]["layers"][0]["snapshot"]
    alter, problem = ALTERATIONS[alteration]
    alter(disk.layer_directory(name))
    (found,) = check(node)
    assert (found["kind"], found["id"], found["repaired"]) == ("layer", f"overlayfs/{name}", "")
    assert found["problem"].startswith(problem)
    repaired = check(node, repair=True)
    assert repaired[0]["repaired"] == "forgotten with 3 on top of it, the next pull unpacks it"
    for image in (BASE, APP):
        assert cri.image_status(node.images(), image) is None
        pull(node, image)
        Expected(tmp_path / image.replace("/", "-"), LAYERS[image]).check(disk, disk.images()[image])
    assert check(node) == []


def give_up_blobs(node: Daemon) -> None:
    """As the cache does it: file and record."""
    disk = Disk(node.root)
    for image in (BASE, APP):
        for layer in disk.images()[image]["layers"]:
            digest = layer["descriptor"]["digest"]
            (node.root / "content/blobs/sha256" / digest.removeprefix("sha256:")).unlink(missing_ok=True)
    check(node, deep=False, repair=True)


def test_c_d4_a_deep_check_fetches_blobs_that_were_given_up(node: Daemon) -> None:
    give_up_blobs(node)
    disk = Disk(node.root)
    name = disk.images()[APP]["layers"][-1]["snapshot"]
    (disk.layer_directory(name) / "more").touch()
    (found,) = check(node)
    assert (found["id"], found["problem"]) == (f"overlayfs/{name}", "/more: is not in the layer")


def test_a_deep_check_says_which_layers_it_could_not_compare(node: Daemon, source: FakeRegistry) -> None:
    give_up_blobs(node)
    source.rule(FakeRegistry.on("/blobs/", Reply(404)))
    notes = check(node)
    assert len(notes) == 4
    assert not any(note["broken"] for note in notes)
    assert node.cli("fsck", "--deep").returncode == 0


FOREIGN: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "link": lambda path: path.symlink_to("/etc/shadow"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_c_d4_what_is_no_blob_stops_neither_start_nor_check(node: Daemon, kind: str) -> None:
    stray = node.root / "content/blobs/sha256" / ("ab" * 32)
    layer = Disk(node.root).images()[APP]["layers"][-1]["descriptor"]["digest"].removeprefix("sha256:")
    node.kill()
    FOREIGN[kind](stray)
    (node.root / "content/ingest/foreign").touch()
    node.start()
    assert not os.path.lexists(stray)
    FOREIGN[kind](stray)
    (stray.parent / layer).unlink()
    FOREIGN[kind](stray.parent / layer)
    assert [finding["problem"] for finding in check(node)[:2]] == ["no regular file", "without a record"]
    assert all(finding["repaired"] for finding in check(node, repair=True))
    pull(node, APP)
    assert check(node) == []


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), flip, Path.unlink], ids=["zero-length", "bit-flip", "missing"])
@pytest.mark.parametrize("which", ["config", "layer"])
def test_c_d4_a_damaged_blob(node: Daemon, tmp_path: Path, damage: Callable[[Path], object], which: str) -> None:
    disk = Disk(node.root)
    image = disk.images()[APP]
    digest = image["image_id"] if which == "config" else image["layers"][1]["descriptor"]["digest"]
    path = node.root / "content/blobs/sha256" / digest.removeprefix("sha256:")
    path.chmod(0o600)
    damage(path)
    assert digest in {finding["id"] for finding in check(node)}
    assert node.cli("export", "--output", str(tmp_path / "app.tar"), APP).returncode == 1 or which == "layer"
    check(node, repair=True)
    pull(node, APP)
    findings = [finding for finding in check(node) if finding["broken"]]
    assert findings == []
    Expected(tmp_path / "app", LAYERS[APP]).check(disk, disk.images()[APP])


@pytest.mark.parametrize("keep", [0, 5000, 0.5], ids=["empty", "header only", "half"])
def test_c_d4_a_truncated_database_is_set_aside_by_an_offline_repair(node: Daemon, source: FakeRegistry, keep: float) -> None:
    assert node.cli("fsck", "--root", str(node.root)).returncode == 1, "a daemon runs on it"
    assert node.stop() == 0
    data = node.root / "metadata" / "data.mdb"
    os.truncate(data, int(data.stat().st_size * keep) if keep < 1 else int(keep))
    if keep:
        with pytest.raises(AssertionError, match=f"fsck --repair --root {node.root}"):
            node.start()
        assert "Traceback" not in node.log
        node.process = None
        assert node.cli("fsck", "--root", str(node.root)).returncode == 1
    repaired = node.cli("fsck", "--repair", "--root", str(node.root))
    assert repaired.returncode == 0, repaired
    assert node.cli("fsck", "--deep", "--root", str(node.root)).stdout == "clean\n"
    node.start()
    assert cri.image_status(node.images(), APP) is None
    before = source.sent
    pull(node, APP)
    # Who may have the blobs went with the metadata: the config is shown again, and a piece of each layer.
    assert source.sent - before < 64 * KIB, "the blobs outlived the metadata"
    assert check(node) == []


@pytest.mark.parametrize("table", ["images", "content", "snapshots"])
def test_c_d4_a_record_that_cannot_be_parsed_is_forgotten_alone(node: Daemon, source: FakeRegistry, tmp_path: Path, table: str) -> None:
    assert node.stop() == 0
    disk = Disk(node.root)
    images = disk.images()
    keys = {"images": images[APP]["image_id"], "content": images[APP]["image_id"]}
    key = keys.get(table, f"overlayfs/{images[APP]['layers'][-1]['snapshot']}")
    spoil(node.root / "metadata", table, key)
    assert node.cli("fsck", "--root", str(node.root)).stdout.startswith(f"metadata {table} {key}: the record cannot be parsed\n")
    assert node.cli("fsck", "--repair", "--root", str(node.root)).stdout.startswith(
        f"metadata {table} {key}: the record cannot be parsed; forgotten"
    )
    node.start()
    assert cri.image_status(node.images(), BASE) is not None
    downloads = len(source.seen("/blobs/", "GET"))
    pull(node, APP)
    assert len(source.seen("/blobs/", "GET")) == downloads
    Expected(tmp_path / "app", LAYERS[APP]).check(disk, disk.images()[APP])
    assert check(node) == []


def spoil(metadata: Path, table: str, key: str) -> None:
    with lmdb.open(str(metadata), max_dbs=20) as env, env.begin(write=True, db=env.open_db(table.encode())) as txn:
        record = txn.get(key.encode())
        assert record is not None
        txn.put(key.encode(), b"\x7a" + bytes(record)[1:])


def test_c_d5_images_are_whole_after_a_reboot_without_a_check(node: Daemon, tmp_path: Path) -> None:
    assert node.stop() == 0
    shutil.rmtree(node.state)
    node.start()
    disk = Disk(node.root)
    for image in (BASE, APP):
        assert cri.image_status(node.images(), image) is not None
        Expected(tmp_path / image.replace("/", "-"), LAYERS[image]).check(disk, disk.images()[image])
    last = node.log.rpartition("stopped")[2]
    assert "WARNING" not in last.replace("the runtime service is off", "").replace("WARNING imgsvc.daemon.build", ""), last


def test_c_d4_no_container_is_made_of_a_layer_that_lost_its_files(pod_daemon: Daemon) -> None:
    daemon = pod_daemon
    runtime = daemon.runtime()
    pod = cri.pod_config(daemon)
    sandbox = cri.run_pod(runtime, pod)
    disk = Disk(daemon.root)
    user = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["true"], "before"), pod)
    layer = disk.layer_directory(disk.images()[BUSYBOX]["layers"][0]["snapshot"])
    subprocess.run(["mv", str(layer), str(daemon.directory / "lost")], check=True)
    code, text = cri.refusal(lambda: cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["true"]), pod))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "not completely unpacked" in text
    (finding, _) = check(daemon, deep=False, repair=True)
    assert f"container-{user}" in finding["problem"]
    assert finding["repaired"] == ""
    pull(daemon, BUSYBOX)
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["true"]), pod)
    cri.start(runtime, container)
    assert cri.wait_for_exit(runtime, container).exit_code == 0
