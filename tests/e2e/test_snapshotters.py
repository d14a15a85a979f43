"""What the node's file system can do, as Status tells; containerd's options of overlayfs; owners for user namespaces without idmapped mounts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.base import failpoints
from imgsvc.base.removal import unmount_below
from tests.e2e.conftest import BUSYBOX
from tests.snapshot.layers import Entry, link, tar
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon
from tests.support.registries import RealRegistry

pytestmark = pytest.mark.root

OPTIONS = """
[images.overlayfs]
mount_options = ["volatile", "metacopy=off"]
upperdir_label = true
sync_remove = true
slow_chown = false
"""


def storage(daemon: Daemon) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(daemon.runtime().Status(pb.StatusRequest(verbose=True), timeout=RPC_TIMEOUT).info["storage"])
    return shown


def started(daemon: Daemon, registry: RealRegistry) -> Daemon:
    daemon.map_host("docker.io", registry.address)
    daemon.start()
    cri.pull(daemon.images(), BUSYBOX)
    return daemon


def test_containerds_options_of_overlayfs(make_daemon: Callable[..., Daemon], registry: RealRegistry, busybox: str) -> None:
    daemon = started(make_daemon(network=True, settings=OPTIONS), registry)
    shown = storage(daemon)
    assert shown["snapshotter"] == "overlayfs"
    assert "overlayfs works" in shown["detected"]
    options = shown["overlayfs"]
    assert options["mount_options"] == ["volatile", "metacopy=off"]
    assert (options["upperdir_label"], options["sync_remove"], options["slow_chown"]) == (True, True, False)
    runtime, pod = daemon.runtime(), cri.pod_config(daemon)
    sandbox = cri.run_pod(runtime, pod)
    script = "echo written > /file; cat /file"
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sh", "-c", script]), pod)
    (mounted,) = [line for line in Path("/proc/self/mounts").read_text().splitlines() if container in line and line.startswith("overlay ")]
    assert any(option in ("volatile", "fsync=volatile") for option in mounted.split()[3].split(","))  # as old kernels, and new ones show it
    cri.start(runtime, container)
    assert cri.wait_for_exit(runtime, container).exit_code == 0
    cri.remove_pod(runtime, sandbox)
    assert not list((daemon.root / "snapshots/overlayfs/trash").iterdir())
    assert daemon.leftovers() == []


@pytest.mark.parametrize("option", ["lowerdir=/", "upperdir=/", "a,b", ""])
def test_options_that_are_imgsvcs_own_are_refused(make_daemon: Callable[..., Daemon], option: str) -> None:
    daemon = make_daemon(settings=f"[images.overlayfs]\nmount_options = [{json.dumps(option)}]\n")
    done = daemon.cli("config", "check", str(daemon.config))
    assert done.returncode == 1
    assert "images.overlayfs.mount_options" in done.stderr + done.stdout


@contextlib.contextmanager
def overlay_root(daemon: Daemon) -> Iterator[None]:
    """--root on an overlayfs, as in a container: it can be neither an overlay's upper directory nor ID-mapped."""
    places = [daemon.directory / name for name in ("lower", "upper", "work", "root")]
    for place in places:
        place.mkdir()
    lower, upper, work, root = map(str, places)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "imgsvc-test", root], check=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", root], check=True, timeout=10)


def test_user_namespaces_get_copies_where_owners_cannot_be_mapped(
    make_daemon: Callable[..., Daemon], registry: RealRegistry, busybox: str
) -> None:
    """Two pods with other mappings use one image; a third one without sees the image's own owners."""
    daemon = make_daemon(network=True)
    with overlay_root(daemon):
        started(daemon, registry)
        shown = storage(daemon)
        assert shown["snapshotter"] == "native"
        assert "without idmapped mounts" in shown["detected"]
        for first in (0, 300_000, 500_000):
            assert owners(daemon, first) == ["0", "0", "0", "7"]
        daemon.remove_all_pods()
        assert daemon.stop() == 0


def owners(daemon: Daemon, first: int) -> list[str]:
    """What a container sees: its own user, of a file of the image, of one it makes, of one it gives away. first: of the mapping, 0 for none."""
    daemon.directory.chmod(0o711)  # as /run is: who is root in a user namespace has to reach its root file system
    mapping = [pb.IDMapping(host_id=first, container_id=0, length=65536)]
    user = pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping) if first else None
    namespaces = pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER, userns_options=user)
    runtime, pod = daemon.runtime(), cri.pod_config(daemon, f"mapped-{first}")
    pod.linux.security_context.namespace_options.CopyFrom(namespaces)
    sandbox = cri.run_pod(runtime, pod)
    script = "id -u; stat -c %u /bin/busybox; touch /new; stat -c %u /new; chown 7 /new; stat -c %u /new"
    config = cri.container_config(BUSYBOX, ["sh", "-c", script])
    config.linux.security_context.namespace_options.CopyFrom(namespaces)
    container = cri.create(runtime, sandbox, config, pod)
    cri.start(runtime, container)
    done = cri.wait_for_exit(runtime, container)
    return [line.text for line in cri.read_log(Path(done.log_path))]


@pytest.mark.parametrize("first", [0, 300_000, 500_000])
def test_user_namespaces_share_an_image_through_idmapped_mounts(pod_daemon: Daemon, first: int) -> None:
    shown = storage(pod_daemon)
    assert shown["overlayfs"]["idmapped"]
    assert owners(pod_daemon, first) == ["0", "0", "0", "7"]


def test_pods_run_from_images_that_are_files(make_daemon: Callable[..., Daemon], registry: RealRegistry, busybox: str) -> None:
    daemon = started(make_daemon(network=True, settings='[images]\nsnapshotter = "erofs"'), registry)
    assert storage(daemon)["erofs"] == "usable"
    runtime, pod = daemon.runtime(), cri.pod_config(daemon)
    sandbox = cri.run_pod(runtime, pod)
    for number in range(2):
        script = "test ! -e /bin/new && echo written > /bin/new && cat /bin/new"
        config = cri.container_config(BUSYBOX, ["sh", "-c", script], f"c{number}")
        container = cri.create(runtime, sandbox, config, pod)
        cri.start(runtime, container)
        assert cri.wait_for_exit(runtime, container).exit_code == 0
    (mounted,) = images_mounted(daemon)
    layer = Path(mounted).parent
    assert not os.access(f"{mounted}/bin/new", os.F_OK)
    with pytest.raises(OSError, match="Read-only"):
        Path(mounted, "bin/new").touch()
    daemon.kill()
    daemon.start()
    cri.remove_pod(daemon.runtime(), sandbox)
    assert json.loads(daemon.cli("fsck", "--deep", "--json").stdout)["clean"]
    for lost in ("layer.erofs", "mnt"):  # as after a reboot
        unmount_below(layer)
        (layer / lost).unlink() if lost.startswith("layer") else (layer / lost).rmdir()
    sandbox = cri.run_pod(daemon.runtime(), pod)
    container = cri.create(daemon.runtime(), sandbox, cri.container_config(BUSYBOX, ["true"]), pod)
    cri.start(daemon.runtime(), container)
    assert cri.wait_for_exit(daemon.runtime(), container).exit_code == 0
    cri.remove_pod(daemon.runtime(), sandbox)
    daemon.images().RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=BUSYBOX)), timeout=RPC_TIMEOUT)
    assert daemon.cli("gc").returncode == 0
    assert not layer.exists()
    assert not images_mounted(daemon)


def images_mounted(daemon: Daemon) -> list[str]:
    """Where images of a daemon are mounted."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[2] == "erofs" and line.split()[1].startswith(str(daemon.root))]


def test_a_layer_that_does_not_fit_on_those_below_fails_the_pull(make_daemon: Callable[..., Daemon], registry: RealRegistry) -> None:
    daemon = make_daemon(settings='[images]\nsnapshotter = "erofs"')
    daemon.map_host("docker.io", registry.address)
    daemon.start()
    base, top = images.layer(tar([Entry("file")])), images.layer(tar([link("name", "nowhere")]))
    registry.push(images.image([base, top]), "library/unfit")
    with pytest.raises(grpc.RpcError, match="nowhere") as failed:
        cri.pull(daemon.images(), "docker.io/library/unfit:latest")
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert cri.image_status(daemon.images(), "docker.io/library/unfit:latest") is None


def as_driver(daemon: Daemon, name: str) -> None:
    """Start again with another default snapshotter."""
    assert daemon.stop() == 0
    daemon.config.write_text(re.sub(r'snapshotter = "\w+"', f'snapshotter = "{name}"', daemon.config.read_text()))
    daemon.start()


def runs(daemon: Daemon) -> bool:
    """Whether a new container of busybox does what it is told."""
    runtime, pod = daemon.runtime(), cri.pod_config(daemon)
    sandbox = cri.run_pod(runtime, pod)
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sh", "-c", "cat /bin/busybox > /copy"]), pod)
    cri.start(runtime, container)
    code = cri.wait_for_exit(runtime, container).exit_code
    cri.remove_pod(runtime, sandbox)
    return code == 0


def layers_in(daemon: Daemon, name: str) -> int:
    """How many snapshots a driver has on disk."""
    return sum(path.name.isdigit() for path in (daemon.root / "snapshots" / name).iterdir())


def test_images_of_another_driver_are_used_and_moved(make_daemon: Callable[..., Daemon], registry: RealRegistry, busybox: str) -> None:
    daemon = started(make_daemon(network=True, settings='[images]\nsnapshotter = "overlayfs"\ndiscard_unpacked_layers = true'), registry)
    as_driver(daemon, "erofs")
    assert runs(daemon)
    assert not images_mounted(daemon), "the container was on overlayfs"
    place = daemon.directory / "mounted"
    place.mkdir()
    assert daemon.cli("mount", BUSYBOX, str(place)).returncode == 0
    moved = json.loads(daemon.cli("gc", "--migrate", "--json").stdout)
    assert moved["moved"] == [BUSYBOX]
    assert not moved["failed"]
    assert layers_in(daemon, "overlayfs"), "a mount is on it"
    assert (place / "bin/busybox").exists()
    assert daemon.cli("unmount", str(place)).returncode == 0
    assert json.loads(daemon.cli("gc", "--migrate", "--json").stdout)["moved"] == []
    assert not layers_in(daemon, "overlayfs")
    assert layers_in(daemon, "erofs")
    assert runs(daemon)
    as_driver(daemon, "overlayfs")
    assert runs(daemon)
    cri.pull(daemon.images(), BUSYBOX)  # moves it, too
    assert daemon.cli("gc").returncode == 0
    assert not layers_in(daemon, "erofs")
    assert not images_mounted(daemon)
    assert runs(daemon)


@pytest.mark.parametrize(
    "point", ["layer.prepared", "unpack.laid", "layer.synced", "layer.committed", "snapshot.built", "image.add", "snapshot.discarded"]
)
def test_c_d1_killed_while_an_image_of_files_comes_or_goes(
    make_daemon: Callable[..., Daemon], registry: RealRegistry, busybox: str, point: str
) -> None:
    daemon = make_daemon(settings='[images]\nsnapshotter = "erofs"')
    daemon.map_host("docker.io", registry.address)
    daemon.start({failpoints.ENV: f"{point}=kill"})
    with contextlib.suppress(grpc.RpcError):
        cri.pull(daemon.images(), BUSYBOX)
        daemon.images().RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=BUSYBOX)), timeout=RPC_TIMEOUT)
        daemon.cli("gc")
    daemon.kill()
    daemon.start()
    assert cri.image_status(daemon.images(), BUSYBOX) is None
    assert json.loads(daemon.cli("fsck", "--json").stdout)["clean"]
    cri.pull(daemon.images(), BUSYBOX)
    assert daemon.cli("gc").returncode == 0
    assert layers_in(daemon, "erofs") == 1
    checked = json.loads(daemon.cli("fsck", "--deep", "--json").stdout)
    assert [finding for finding in checked["findings"] if finding["broken"]] == []
    (mounted,) = images_mounted(daemon)
    assert os.access(f"{mounted}/bin/busybox", os.X_OK)
    assert not list(Path(mounted).parent.glob(".*"))


def test_a_layer_that_is_a_file_proves_itself(make_daemon: Callable[..., Daemon], registry: RealRegistry, busybox: str) -> None:
    """Without its blob and without a registry: the stream has the diff ID, and gives the index that is there."""
    daemon = started(make_daemon(settings='[images]\nsnapshotter = "erofs"\ndiscard_unpacked_layers = true'), registry)
    assert daemon.cli("gc").returncode == 0
    daemon.map_host("docker.io", "127.0.0.1:1")
    checked = json.loads(daemon.cli("fsck", "--deep", "--json").stdout)
    assert checked["clean"]
    assert not [finding for finding in checked["findings"] if finding["kind"] == "layer"]
    for name in ("layer.tar", "layer.index"):
        (file,) = (daemon.root / "snapshots/erofs").rglob(name)
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1]))
        (finding,) = json.loads(daemon.cli("fsck", "--deep", "--json").stdout)["findings"]
        assert finding["kind"] == "layer"
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            stream.write(byte)
    (file,) = (daemon.root / "snapshots/erofs").rglob("layer.index")
    os.truncate(file, 10)
    daemon.cli("fsck", "--repair")
    assert not layers_in(daemon, "erofs")
    assert daemon.stop() == 0
    assert not images_mounted(daemon)
