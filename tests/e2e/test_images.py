"""Images through CRI: pulled only through a mirror, by every layer compression; every failure one clear error."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2
from imgsvc.base.oci import Digest, Platform
from tests.e2e.conftest import BUSYBOX
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon, below
from tests.support.images import BuiltDocument, Compression, Entry
from tests.support.registries import RealRegistry, ScriptedRegistry, free_port


def small(text: str = "hello", compression: Compression = "gzip", *, docker: bool = False) -> BuiltDocument:
    """A two-layer image of a few bytes."""
    base = images.layer([Entry("etc", kind="dir"), Entry("etc/base", b"base")], compression, docker=docker)
    return images.image([base, images.layer([Entry("etc/text", text.encode())], compression, docker=docker)], docker=docker, Cmd=["none"])


def listed(daemon: Daemon) -> list[cri_pb2.Image]:
    return list(daemon.images().ListImages(cri_pb2.ListImagesRequest(), timeout=RPC_TIMEOUT).images)


def half_made(daemon: Daemon) -> list[str]:
    """Images, and blobs that are not what their name says."""
    blobs = (daemon.root / "content" / "blobs").glob("*/*")
    broken = [b for b in blobs if str(Digest.of(b.read_bytes(), b.parent.name)) != f"{b.parent.name}:{b.name}"]
    return [f"image {image.id}" for image in listed(daemon)] + [f"broken blob {b}" for b in broken]


def remove(daemon: Daemon, name: str) -> None:
    daemon.images().RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name)), timeout=RPC_TIMEOUT)


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
def test_every_kind_of_layer_is_pulled_and_unpacked(
    image_daemon: Daemon, registry: RealRegistry, compression: Compression, docker: bool
) -> None:
    made = small(f"{compression} {docker}", compression, docker=docker)
    registry.push(made, f"e2e/layers-{compression}-{docker}".lower())
    name = f"e2e/layers-{compression}-{docker}".lower()
    assert cri.pull(image_daemon.images(), name) == str(made.config_digest)
    unpacked = [p.read_text() for p in below(image_daemon.root / "snapshots") if p.parts[-2:] == ("etc", "text") and "trash" not in p.parts]
    assert unpacked == [f"{compression} {docker}"]
    for digest in (made.digest, made.config_digest):
        assert (image_daemon.root / "content" / "blobs" / "sha256" / digest.hex).exists()


def test_an_image_has_names_digests_and_an_id(image_daemon: Daemon, registry: RealRegistry) -> None:
    made = small()
    registry.push(made, "e2e/names", "one")
    registry.push(made, "e2e/names", "two")
    client = image_daemon.images()
    wanted = str(made.config_digest)
    names = ["docker.io/e2e/names:one", "docker.io/e2e/names:two"]
    pinned = f"docker.io/e2e/names@{made.digest}"
    for name in ("e2e/names:one", "docker.io/e2e/names:two", pinned):
        assert cri.pull(client, name) == wanted
    (image,) = listed(image_daemon)
    assert (image.id, sorted(image.repo_tags), list(image.repo_digests)) == (wanted, names, [pinned])
    assert image.size >= sum(len(blob) for blob in made.blobs.values()) // 2
    for name in (*names, "e2e/names:one", pinned, wanted, wanted.removeprefix("sha256:"), wanted[7:19]):
        seen = cri.image_status(client, name)
        assert seen, name
        assert seen.id == wanted
    assert cri.image_status(client, "e2e/names:three") is None

    remove(image_daemon, "e2e/names:one")  # one name stands for the image with all its names
    assert listed(image_daemon) == []
    for name in ("e2e/names:one", wanted, "e2e/never-there"):
        remove(image_daemon, name)


def test_a_tag_that_moved_is_pulled_again(image_daemon: Daemon, registry: RealRegistry) -> None:
    first, second = small("first"), small("second")
    for made in (first, second):
        registry.push(made, "e2e/moving")
        assert cri.pull(image_daemon.images(), "e2e/moving") == str(made.config_digest)
        seen = cri.image_status(image_daemon.images(), "e2e/moving")
        assert seen
        assert seen.id == str(made.config_digest)


def test_the_manifest_for_this_node_is_chosen(image_daemon: Daemon, registry: RealRegistry) -> None:
    ours, other = str(Platform.host()), "linux/s390x" if Platform.host().architecture != "s390x" else "linux/amd64"
    wrong, right = (images.image([images.layer([Entry("a", platform.encode())])], platform=platform) for platform in (other, ours))
    registry.push(images.index({other: wrong, ours: right}), "e2e/platforms")
    assert cri.pull(image_daemon.images(), "e2e/platforms") == str(right.config_digest)
    registry.push(images.index({other: wrong}), "e2e/elsewhere")
    code, text = cri.refusal(lambda: cri.pull(image_daemon.images(), "e2e/elsewhere"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert other in text


def test_the_file_system_is_accounted_for(image_daemon: Daemon, registry: RealRegistry) -> None:
    registry.push(small(), "e2e/usage")
    cri.pull(image_daemon.images(), "e2e/usage")
    answer = image_daemon.images().ImageFsInfo(cri_pb2.ImageFsInfoRequest(), timeout=RPC_TIMEOUT)
    (usage,) = answer.image_filesystems
    assert Path(usage.fs_id.mountpoint).is_relative_to(image_daemon.root)
    assert (usage.used_bytes.value, usage.inodes_used.value) == _on_disk(image_daemon)
    assert usage.inodes_used.value > 0
    assert abs(usage.timestamp - time.time_ns()) < 60e9
    request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image="e2e/usage"))
    image_daemon.images().RemoveImage(request, timeout=RPC_TIMEOUT)
    assert image_daemon.cli("gc").returncode == 0
    (usage,) = image_daemon.images().ImageFsInfo(cri_pb2.ImageFsInfoRequest(), timeout=RPC_TIMEOUT).image_filesystems
    assert (usage.used_bytes.value, usage.inodes_used.value) == (0, 0)


def _on_disk(daemon: Daemon) -> tuple[int, int]:
    """(bytes, inodes) of all layers, as du counts."""
    layers = [str(path) for path in (daemon.root / "snapshots").glob("*/*/fs")]
    counted = [subprocess.run(["du", "-s", how, *layers], capture_output=True, text=True).stdout for how in ("-B1", "--inodes")]
    size, inodes = (sum(int(line.split()[0]) for line in text.splitlines()) for text in counted)
    return size, inodes


@pytest.mark.parametrize(
    "name",
    ["", "UPPER", "a b", "a/../b", "busybox:", "busybox@sha256:12", "http://x/y", "sha256:" + "a" * 64, "x\x1b[31m"],
)
def test_a_bad_reference_is_an_invalid_argument(image_daemon: Daemon, name: str) -> None:
    code, text = cri.refusal(lambda: cri.pull(image_daemon.images(), name))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert text.isprintable()


def test_an_absent_image_is_not_found_and_says_where_it_was_looked_for(image_daemon: Daemon, registry: RealRegistry) -> None:
    image_daemon.map_host("docker.io", registry.address, upstream=f"http://{registry.address}")
    code, text = cri.refusal(lambda: cri.pull(image_daemon.images(), "e2e/absent:1"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "docker.io/e2e/absent:1" in text
    assert registry.address in text
    assert half_made(image_daemon) == []


@pytest.mark.parametrize("victim", ["manifest", "config", "layer"])
def test_a_digest_mismatch_is_data_loss_and_nothing_stays(
    make_daemon: Callable[..., Daemon], scripted: ScriptedRegistry, victim: str
) -> None:
    made = small()
    last_layer = [digest for digest in made.blobs if digest != made.config_digest][-1]
    lie = {"manifest": made.digest, "config": made.config_digest, "layer": last_layer}[victim]
    honest = made.data if victim == "manifest" else made.blobs[lie]
    forged = honest[:-2] + bytes([honest[-2] ^ 1]) + honest[-1:]
    daemon = make_daemon()
    daemon.map_host("docker.io", scripted.address)
    daemon.start()
    name = f"e2e/forged@{made.digest}" if victim == "manifest" else "e2e/forged:1"
    scripted.serve(made, "e2e/forged", "1", instead={lie: forged})
    code, text = cri.refusal(lambda: cri.pull(daemon.images(), name))
    assert code == grpc.StatusCode.DATA_LOSS, text
    assert lie in text
    assert scripted.address in text
    assert half_made(daemon) == []
    # The same pull works once the registry is honest: nothing broken was kept.
    scripted.serve(made, "e2e/forged", "1")
    assert cri.pull(daemon.images(), name) == str(made.config_digest)


def test_a_layer_that_is_not_what_the_config_promised_is_refused(image_daemon: Daemon, registry: RealRegistry) -> None:
    good = images.layer([Entry("a", b"1")])
    swapped = images.Layer(good.media_type, images.layer([Entry("a", b"2")]).blob, good.diff_id)
    registry.push(images.image([swapped]), "e2e/diffid")
    code, text = cri.refusal(lambda: cri.pull(image_daemon.images(), "e2e/diffid"))
    assert code == grpc.StatusCode.DATA_LOSS
    assert good.diff_id in text
    assert half_made(image_daemon) == []


def test_an_unreachable_registry_says_so_and_the_pull_can_be_repeated(make_daemon: Callable[..., Daemon], registry: RealRegistry) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    daemon = make_daemon()
    daemon.map_host("docker.io", nobody)
    daemon.start()
    code, text = cri.refusal(lambda: cri.pull(daemon.images(), "e2e/later"))
    assert code == grpc.StatusCode.UNKNOWN, "the kubelet looks for the reason only then"
    assert text.startswith("RegistryUnavailable")
    assert nobody in text
    assert half_made(daemon) == []
    registry.push(small(), "e2e/later")
    daemon.map_host("docker.io", registry.address)
    assert cri.pull(daemon.images(), "e2e/later")


def test_pulling_the_same_image_many_times_at_once_is_one_download(make_daemon: Callable[..., Daemon], scripted: ScriptedRegistry) -> None:
    made = small()
    scripted.serve(made, "e2e/many", "1")
    daemon = make_daemon()
    daemon.map_host("docker.io", scripted.address)
    daemon.start()
    spec = cri_pb2.ImageSpec(image="e2e/many:1")
    client = daemon.images()
    calls = [client.PullImage.future(cri_pb2.PullImageRequest(image=spec), timeout=RPC_TIMEOUT) for _ in range(20)]
    assert {call.result().image_ref for call in calls} == {str(made.config_digest)}
    fetched = [request for request in scripted.requests if "/blobs/" in request and str(made.config_digest) not in request]
    assert sorted(fetched) == sorted(f"GET /v2/e2e/many/blobs/{digest}" for digest in made.blobs if digest != made.config_digest)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB; a store keeps 32 MiB of that free for its own records."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=700", "imgsvc-test", str(disk)], check=True, timeout=10)
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=10)


@pytest.mark.root
@pytest.mark.parametrize("size", [50, 80], ids=["full-while-unpacking", "full-while-downloading"])
def test_c_d3_a_full_disk_is_one_clear_error_and_the_space_comes_back(
    make_daemon: Callable[..., Daemon], registry: RealRegistry, small_disk: Path, size: int
) -> None:
    big = images.image([images.layer([Entry("big", os.urandom(1024) * 1024 * size)], "plain")])
    registry.push(big, f"e2e/big-{size}")
    registry.push(small(), "e2e/small")
    daemon = make_daemon(settings="[gc]\nmin_free = 0\n")
    daemon.root.symlink_to(small_disk)
    daemon.map_host("docker.io", registry.address)
    daemon.start()
    try:
        before = os.statvfs(small_disk).f_bavail
        code, text = cri.refusal(lambda: cri.pull(daemon.images(), f"e2e/big-{size}"))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED, text
        assert str(small_disk) in text or str(daemon.root) in text
        assert half_made(daemon) == []
        deadline = time.monotonic() + 60
        while os.statvfs(small_disk).f_bavail < before * 0.9:
            assert time.monotonic() < deadline, subprocess.run(["du", "-a", str(small_disk)], capture_output=True, text=True).stdout
            time.sleep(0.1)
        assert cri.pull(daemon.images(), "e2e/small")
    finally:
        daemon.stop()


@pytest.mark.root
def test_nobody_else_can_read_the_store_or_speak_to_the_socket(image_daemon: Daemon, busybox: str) -> None:
    assert cri.pull(image_daemon.images(), BUSYBOX) == busybox
    for path in (image_daemon.root, image_daemon.state):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 & ~0o011 == 0, path
    assert stat.S_IMODE((image_daemon.state / "imgsvc.sock").stat().st_mode) & 0o007 == 0
