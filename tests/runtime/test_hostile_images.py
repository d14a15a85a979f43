"""Images and pods that point at the host (C-X4, C-C2, C-C5, C-C6, C-C16, C-C17, C-C23)."""

from __future__ import annotations

import itertools
import os
import stat
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.base import removal
from imgsvc.base.errors import ImgsvcError, InvalidArgument, NotFound
from imgsvc.runtime.spec import volumes
from tests.runtime.harness import Daemon
from tests.runtime.images import BUSYBOX
from tests.runtime.test_life import MakeNode
from tests.snapshot.trees import read_tree
from tests.support.swapper import DIRECTORY, Swapper

pytestmark = pytest.mark.root


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "host").mkdir()
    (tmp_path / "host/secret").write_text("of the host")
    return tmp_path / "host"


@pytest.mark.parametrize("up", ["../../../../../../../..", ""])
def test_c_c5_a_declared_volume_is_copied_from_inside_the_image(tmp_path: Path, secret: Path, up: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "v").symlink_to(f"{up}{secret}" if up else secret)
    volumes.declared_volume(root, "/v", tmp_path / "storage")
    assert list((tmp_path / "storage").iterdir()) == []


def test_c_c5_symlinks_in_a_declared_volume_stay_symlinks(tmp_path: Path, secret: Path) -> None:
    root = tmp_path / "root"
    (root / "v/sub").mkdir(parents=True)
    (root / "v/link").symlink_to(secret)
    (root / "v/sub/file").write_text("x")
    os.chown(root / "v/sub/file", 7, 8)
    os.chmod(root / "v/sub/file", 0o4711)
    os.mkfifo(root / "v/fifo")
    volumes.declared_volume(root, "/v", tmp_path / "storage")
    assert os.readlink(tmp_path / "storage/link") == str(secret)
    copied = (tmp_path / "storage/sub/file").stat()
    assert (copied.st_uid, copied.st_gid, copied.st_mode & 0o7777) == (7, 8, 0o4711)
    assert (tmp_path / "storage/fifo").is_fifo()


def test_c_c5_a_declared_volume_is_copied_with_everything(tmp_path: Path) -> None:
    volume = tmp_path / "root/v"
    (volume / "sub").mkdir(parents=True)
    (volume / "sub/file").write_bytes(b"x")
    os.link(volume / "sub/file", volume / "again")
    os.setxattr(volume / "sub", "user.note", b"\0x")
    os.mknod(volume / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (volume / "dangling").symlink_to("nowhere")
    with (volume / "sparse").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(600_000)
        file.write(b"middle")
    for number, path in enumerate((volume / "sub/file", volume / "sub", volume / "null", volume)):
        os.chown(path, number, 70_000 + number)
        path.chmod(0o4755 - number)
        os.utime(path, ns=(number, 10**18 + number))
    volumes.declared_volume(tmp_path / "root", "/v", tmp_path / "storage")
    assert read_tree(tmp_path / "storage") == read_tree(volume)
    assert (tmp_path / "storage/sparse").stat().st_blocks < 1024


def test_c_c5_a_declared_volume_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "/".join(["v"] * 300)).mkdir(parents=True)
    with pytest.raises(InvalidArgument):
        volumes.declared_volume(tmp_path / "root", "/v", tmp_path / "storage")


def volume_to_swap(rootfs: Path, secret: Path) -> None:
    """A volume /v with a directory to swap for a link to the directory `secret`, in which everything has the same name."""
    (rootfs / "v" / DIRECTORY / "deep").mkdir(parents=True)
    (secret / "deep").mkdir()
    for name in ("deep/0", *map(str, range(100))):
        (rootfs / "v" / DIRECTORY / name).write_text("of the image")
        (secret / name).write_text("of the host")


def test_c_x4_a_volume_is_copied_from_inside_while_somebody_swaps_it_for_a_link(tmp_path: Path, secret: Path) -> None:
    volume_to_swap(tmp_path / "root", secret)
    numbers = itertools.count()
    seen: set[str] = set()

    def copy() -> None:
        storage = tmp_path / f"storage{next(numbers)}"
        volumes.declared_volume(tmp_path / "root", "/v", storage)
        seen.update(texts_below(storage))

    with Swapper(str(tmp_path / "root/v"), secret) as swapper:
        swapper.race(copy, 50_000)
    assert seen == {"of the image"}


def texts_below(storage: Path) -> set[str]:
    """What is in all files there; no link is followed."""
    return {path.read_text() for path in storage.rglob("*") if stat.S_ISREG(path.lstat().st_mode)}


def test_c_x4_end_to_end(make_node: MakeNode, secret: Path) -> None:
    """Containers are made of an image whose volume is being swapped; what they see there is the image's."""
    node = make_node({"image": {"volumes": ["/v"]}})
    volume_to_swap(node.directory / "images/rootfs", secret)
    pod = node.run_pod("pod")
    seen: set[str] = set()

    def create() -> None:
        container = node.create(pod, node.container("true", f"c{len(seen)}-{time.monotonic_ns()}"))
        seen.update(*(texts_below(place) for place in node.directory.rglob(f"volumes/{container}/*")))

    with Swapper(str(node.directory / "images/rootfs/v"), secret) as swapper:
        swapper.race(create, 20_000)
    assert seen == {"of the image"}


@pytest.mark.parametrize("kind", ["fifo", "device", "file"])
def test_c_c5_a_declared_volume_that_is_no_directory_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    match kind:
        case "fifo":
            os.mkfifo(root / "v")
        case "device":
            os.mknod(root / "v", 0o20666, os.makedev(1, 3))
        case "file":
            (root / "v").touch()
    with pytest.raises(InvalidArgument):
        volumes.declared_volume(root, "/v", tmp_path / "storage")


@pytest.mark.parametrize("path", ["../..", "/etc", "a/../../b", "missing", "file", "out", "a/out/x"])
def test_c_c6_sub_paths_that_are_refused(tmp_path: Path, secret: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "file").touch()
    (root / "out").symlink_to(secret)
    (root / "a/out").symlink_to("../../host")
    with pytest.raises((InvalidArgument, NotFound)):
        volumes.sub_path_of_image(root, path, tmp_path / "view")
    assert not os.path.ismount(tmp_path / "view")


def test_c_c6_a_sub_path_is_mounted_by_what_it_is_not_by_its_name(tmp_path: Path, secret: Path) -> None:
    root = tmp_path / "root"
    (root / "good").mkdir(parents=True)
    (root / "good/inside").write_text("image")
    (root / "link").symlink_to("/good")
    volumes.sub_path_of_image(root, "link", tmp_path / "view")
    try:
        (root / "good").rename(root / "gone")
        (root / "good").symlink_to(secret)
        assert (tmp_path / "view/inside").read_text() == "image"
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "view/new").touch()
    finally:
        removal.unmount_below(tmp_path / "view")


def refuse(node: Daemon, pod: str, config: pb.ContainerConfig) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        node.start_container(node.create(pod, config))
    return caught.value.details() or ""


def test_c_c6_image_volumes_end_to_end(node: Daemon) -> None:
    pod = node.run_pod("imgvol")
    source = pb.ImageSpec(image=BUSYBOX)

    def mount(**fields: Any) -> pb.Mount:
        values: dict[str, Any] = {"container_path": "/vol", "image": source, "readonly": True} | fields
        return pb.Mount(**values)

    assert "bin" in node.output(pod, "ls /vol; touch /vol/x || echo refused", mounts=[mount()])
    assert "refused" in node.output(pod, "touch /vol/x || echo refused", mounts=[mount()])
    assert "busybox" in node.output(pod, "ls /vol", mounts=[mount(image_sub_path="bin")])
    for n, bad in enumerate((mount(readonly=False), mount(image_sub_path="../.."), mount(image_sub_path="nope"), mount(host_path="/etc"))):
        refuse(node, pod, node.container("x", f"bad{n}", mounts=[bad]))
    assert not [r for r in (node.directory / "images/roots").iterdir() if "volume" in r.name]


def test_c_c23_links_in_the_image_keep_our_files_inside(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node()
    etc = node.directory / "images/rootfs/etc"
    etc.rename(etc.parent / "etc.real")
    etc.symlink_to(f"../../../../../../../../..{tmp_path}")
    pod = node.run_pod("pod")
    config = node.container("cat /etc/hostname")
    try:
        container = node.create(pod, config)
        node.start_container(container)
        node.wait_exit(container)
    except grpc.RpcError:
        pass  # refusing is as good
    assert list(tmp_path.iterdir()) == []


def test_c_c23_generated_files_as_links(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node()
    target = tmp_path / "victim"
    target.write_text("untouched")
    for name in ("hosts", "resolv.conf", "mtab", "hostname"):
        path = node.directory / "images/rootfs/etc" / name
        path.unlink(missing_ok=True)
        path.symlink_to(f"../../../../../../../../../..{target}")
    pod = node.run_pod("pod")
    try:
        container = node.run(pod, "echo x > /etc/hosts")
        node.wait_exit(container)
    except grpc.RpcError:
        pass
    assert target.read_text() == "untouched"


def test_c_c2_a_passwd_of_ten_gigabytes_end_to_end(make_node: MakeNode) -> None:
    node = make_node({"image": {"user": "ann"}})
    os.truncate(node.directory / "images/rootfs/etc/passwd", 10 * 1024**3)
    pod = node.run_pod("pod")
    assert "passwd" in refuse(node, pod, node.container("x"))


def test_c_c5_end_to_end(make_node: MakeNode, secret: Path) -> None:
    node = make_node({"image": {"volumes": ["/data", "/evil"]}})
    rootfs = node.directory / "images/rootfs"
    (rootfs / "data").mkdir()
    (rootfs / "data/given").write_text("by the image\n")
    (rootfs / "evil").symlink_to(f"../../../../../../../..{secret}")
    pod = node.run_pod("pod")
    try:
        lines = node.output(pod, "cat /data/given; ls /evil/; touch /data/new && echo writable")
    except grpc.RpcError:
        return
    assert "by the image" in lines
    assert "writable" in lines
    assert "secret" not in lines


def test_c_c16_paths_are_hidden_in_the_container(node: Daemon) -> None:
    pod = node.run_pod("masked")
    security = pb.LinuxContainerSecurityContext(masked_paths=["/proc/kcore", "/proc/timer_list"], readonly_paths=["/proc/sys"])
    script = (
        "wc -c < /proc/timer_list; ls /sys/devices/virtual/powercap 2>/dev/null | wc -l; echo 1 > /proc/sys/vm/drop_caches || echo refused"
    )
    lines = node.output(pod, script, security=security)
    assert lines[0] == "0"
    assert lines[1] == "0"
    assert "refused" in " ".join(lines)


@pytest.mark.parametrize("path", ["/proc/self/fd/7", "/proc/self/fd/8"])
def test_c_c17_working_directories_end_to_end(node: Daemon, path: str) -> None:
    pod = node.run_pod(f"wd{path[-1]}")
    assert "working directory" in refuse(node, pod, node.container("x", working_dir=path))


def test_privileged_and_not(node: Daemon) -> None:
    plain = node.run_pod("plain")
    security = pb.LinuxContainerSecurityContext(privileged=True)
    assert "privileged" in refuse(node, plain, node.container("x", security=security))
    pod = node.run_pod("privileged", privileged=True)
    lines = node.output(pod, "ls /dev | wc -l; mount -t tmpfs none /tmp && echo mounted", security=security)
    assert int(lines[0]) > 30
    assert "mounted" in lines
    lines = node.output(plain, "ls /dev | wc -l; mount -t tmpfs none /tmp 2>/dev/null || echo refused")
    assert int(lines[0]) < 25
    assert "refused" in lines


def test_errors_of_the_image_side_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ImgsvcError):
        volumes.sub_path_of_image(tmp_path / "none", "x", tmp_path / "view")
