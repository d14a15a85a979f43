"""Containers: volumes of pods and images, commands that cannot be started, what pods and handlers are configured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.errors import InvalidArgument
from imgsvc.runtime import volumes
from tests.runtime.harness import Daemon
from tests.runtime.images import BUSYBOX
from tests.runtime.test_life import MakeNode

pytestmark = pytest.mark.root


def pod_volume(node: Daemon, name: str, container_path: str, **fields: Any) -> pb.Mount:
    """A host path volume with a file `pod` in it."""
    source = node.directory / "host" / name
    source.mkdir(parents=True, exist_ok=True)
    source.chmod(0o777)
    (source / "pod").touch()
    return pb.Mount(container_path=container_path, host_path=str(source), **fields)


def image_volume(**fields: Any) -> pb.Mount:
    """The busybox image at /vol."""
    return pb.Mount(container_path="/vol", image=pb.ImageSpec(image=BUSYBOX), readonly=True, **fields)


def test_S8_an_image_volume_cannot_be_made_writable(make_node: MakeNode) -> None:
    node = make_node()
    pod = node.run_pod()
    for option in ("rw", "suid", "dev", "bogus", "nosuid,rw"):
        with pytest.raises(grpc.RpcError) as caught:
            node.create(pod, node.container("true", mounts=[image_volume(mount_options=[option])]))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, option
    security = pb.LinuxContainerSecurityContext(
        capabilities=pb.Capability(add_capabilities=["ALL"]), seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
    )
    script = "mount -o remount,rw,bind /vol; mount -o remount,rw /vol; grep -c ' /vol .*rw' /proc/self/mounts; touch /vol/x 2>/dev/null || echo kept"
    for number, fields in enumerate([{}, {"image_sub_path": "etc"}]):
        volume = image_volume(mount_options=["noatime", "noexec"], **fields)
        assert "kept" in node.output(pod, script, name=f"c{number}", mounts=[volume], security=security)
    assert not list((node.directory / "images/rootfs").rglob("x"))


def test_P1_a_pods_mount_lies_on_top_of_an_images_volume(make_node: MakeNode) -> None:
    node = make_node({"image": {"volumes": ["/", "//deep/a", "/data", "/inner/x", "/proc"]}})
    rootfs = node.directory / "images/rootfs"
    (rootfs / "data").mkdir()
    (rootfs / "data/image").touch()
    mounts = [pod_volume(node, "sub", "/data/sub"), pod_volume(node, "deep", "//deep/a/b/"), pod_volume(node, "inner", "/inner")]
    seen = ["/data/image", "/data/sub/pod", "/deep/a/b/pod", "/inner/pod", "/proc/self/stat"]
    script = f"touch /data/sub/new /inner/x/new; ls {' '.join(seen)}"
    (node.directory / "host/inner/x").mkdir(parents=True)
    assert node.output(node.run_pod(), script, mounts=mounts) == seen
    assert (node.directory / "host/sub/new").exists()
    assert (node.directory / "host/inner/x/new").exists()


def test_P20_an_images_volume_on_a_link_does_not_cover_the_links_target(make_node: MakeNode) -> None:
    node = make_node({"image": {"volumes": ["/link", "/opt/app/data", "/chain/v"]}})
    rootfs = node.directory / "images/rootfs"
    (rootfs / "target").mkdir()
    (rootfs / "opt/app/data").mkdir(parents=True)
    (rootfs / "link").symlink_to("/target")
    (rootfs / "short").symlink_to("../../opt/app/data")
    (rootfs / "chain").symlink_to("dangling")
    (rootfs / "dangling").symlink_to("/made/later")
    mounts = [pod_volume(node, "target", "/target/sub"), pod_volume(node, "short", "/short"), pod_volume(node, "chain", "/made/later/v/w")]
    seen = ["/made/later/v/w/pod", "/opt/app/data/pod", "/target/sub/pod"]
    assert node.output(node.run_pod(), f"ls {' '.join(seen)}", mounts=mounts) == seen


def test_P1_paths_have_one_spelling(tmp_path: Path) -> None:
    assert [volumes.clean(p) for p in ("//a", "/a/", "a", "/a/./b/..", "/", "//", "/../a")] == ["/a", "/a", "/a", "/a", "/", "/", "/a"]
    assert [volumes.depth(p) for p in ("/", "//", "/a", "//a//b/")] == [0, 0, 1, 2]
    (tmp_path / "a").symlink_to("/b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InvalidArgument):
        volumes.Places(tmp_path).find("/a/x")


def test_P20_what_lies_below_a_mount_is_not_looked_up_in_the_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to("/c")
    places = volumes.Places(tmp_path, {"/dev"})
    assert places.find("/a/b") == "/c"
    assert places.mount("/a") == "/a"
    assert places.mount("/a/b") == "/a/b"
    assert places.is_covered("/a/b/c")
    assert places.is_covered("/dev/x")
    assert not places.is_covered("/c")
