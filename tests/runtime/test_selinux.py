"""SELinux labels. The kernel here has no SELinux: what is tested is which label goes where, as extended attributes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.base.errors import InvalidArgument, ResourceExhausted
from imgsvc.runtime import podfiles, rootfs
from imgsvc.runtime.interfaces import RootMount
from imgsvc.runtime.model import LinuxContainerSecurityContext, PodSandboxConfig, SELinuxOption
from imgsvc.runtime.spec import security, selinux
from imgsvc.runtime.spec.selinux import ATTRIBUTE, Contexts
from tests.runtime.test_life import MakeNode

POD = "system_u:system_r:container_t:s0:c1,c2"
FILE = "system_u:object_r:container_file_t:s0:c1,c2"


def label_of(path: Path) -> str | None:
    try:
        return os.getxattr(path, ATTRIBUTE, follow_symlinks=False).decode().rstrip("\0")
    except OSError:
        return None


def test_a_level_is_the_pods_alone() -> None:
    taken = {f"system_u:system_r:container_t:s0:c{a},c{b}" for a in range(4) for b in range(a + 1, 4)} - {POD}
    assert selinux.new_level(taken, 4) == "s0:c1,c2"
    with pytest.raises(ResourceExhausted):
        selinux.new_level(taken | {POD}, 4)
    low, high = (int(part.lstrip("c")) for part in selinux.new_level(set(), 1024).removeprefix("s0:").split(","))
    assert 0 <= low < high < 1024


@pytest.mark.parametrize(
    "option, expected",
    [
        (None, POD),
        (SELinuxOption(), POD),
        (SELinuxOption(level="s0:c7,c9"), "system_u:system_r:container_t:s0:c7,c9"),
        (SELinuxOption(type="spc_t"), "system_u:system_r:spc_t:s0:c1,c2"),
        (SELinuxOption("u", "r", "t", "s0-s0:c0.c1023"), "u:r:t:s0-s0:c0.c1023"),
    ],
)
def test_a_container_has_the_pods_label_where_it_asks_for_nothing_else(option: SELinuxOption | None, expected: str) -> None:
    assert security.container_label(LinuxContainerSecurityContext(selinux_options=option), POD) == expected
    assert security.container_label(LinuxContainerSecurityContext(selinux_options=option), "") == ""


@pytest.mark.parametrize(
    "option", [SELinuxOption(type="a:b"), SELinuxOption(level='s0",x="'), SELinuxOption(user="a b"), SELinuxOption(role="r\n")]
)
def test_what_is_no_part_of_a_label_is_refused(option: SELinuxOption) -> None:
    with pytest.raises(InvalidArgument):
        selinux.process_label(Contexts().process, option, "s0")


def test_files_have_the_level_of_their_process() -> None:
    assert selinux.file_label(Contexts().file, POD) == FILE
    assert selinux.file_label(Contexts().file, "") == ""


def test_the_nodes_policy_names_the_contexts(tmp_path: Path) -> None:
    assert selinux.read_contexts(tmp_path) == Contexts()
    (tmp_path / "config").write_text("# which policy\nSELINUX=enforcing\nSELINUXTYPE=mls\n")
    (tmp_path / "mls/contexts").mkdir(parents=True)
    (tmp_path / "mls/contexts/lxc_contexts").write_text('process = "a:b:c:s0"\nfile = "a:b:f:s0"\n')
    assert selinux.read_contexts(tmp_path) == Contexts("a:b:c:s0", Contexts().machine, "a:b:f:s0")


@pytest.mark.root
def test_c_c13_only_what_is_in_the_volume_is_relabelled(tmp_path: Path) -> None:
    volume, outside = tmp_path / "volume", tmp_path / "outside"
    (volume / "a/b").mkdir(parents=True)
    (volume / "a/file").touch()
    outside.touch()
    (volume / "link").symlink_to(outside)
    (volume / "a/directory").symlink_to(tmp_path)
    selinux.relabel_volume(str(volume), FILE)
    assert {label_of(p) for p in (volume, volume / "a", volume / "a/b", volume / "a/file", volume / "link")} == {FILE}
    assert label_of(outside) is None
    assert label_of(tmp_path) is None


@pytest.mark.parametrize("path", ["/", "/etc", "/etc/hosts", "/var/lib", os.path.expanduser("~")])
def test_c_c13_directories_of_the_system_are_not_relabelled(path: str) -> None:
    before = label_of(Path(path))
    with pytest.raises(InvalidArgument):
        selinux.relabel_volume(path, FILE)
    assert label_of(Path(path)) == before


@pytest.mark.root
def test_c_c13_the_files_we_make_have_the_pods_label(tmp_path: Path) -> None:
    before = label_of(Path("/etc/hosts"))
    podfiles.write(tmp_path, PodSandboxConfig(hostname="h"), FILE)
    assert {label_of(tmp_path / name) for name in ("hosts", "resolv.conf", "hostname")} == {FILE}
    assert label_of(Path("/etc/hosts")) == before


@pytest.mark.root
def test_a_root_is_mounted_with_its_label(tmp_path: Path) -> None:
    overlay = RootMount("overlay", "overlay", ("lowerdir=/a:/b",))
    assert rootfs.labelled(overlay, FILE) == (f'context="{FILE}"',)
    assert rootfs.labelled(overlay, "") == ()
    (tmp_path / "own").mkdir()
    (tmp_path / "shared").mkdir()
    assert rootfs.labelled(RootMount("bind", str(tmp_path / "own"), ("rbind", "rw")), FILE) == ()
    assert rootfs.labelled(RootMount("bind", str(tmp_path / "shared"), ("rbind", "ro")), FILE) == ()
    assert (label_of(tmp_path / "own"), label_of(tmp_path / "shared")) == (FILE, None)


@pytest.mark.root
def test_a_kernel_without_selinux_gives_no_labels(make_node: MakeNode, tmp_path: Path) -> None:
    if os.path.exists("/sys/fs/selinux/enforce"):
        pytest.skip("this kernel runs SELinux")
    node = make_node({"enable_selinux": True})
    pod = node.run_pod("pod")
    mount = pb.Mount(host_path=str(tmp_path), container_path="/v", selinux_relabel=True)
    asked = pb.LinuxContainerSecurityContext(selinux_options=pb.SELinuxOption(type="t", level="s0"))
    assert node.output(pod, "echo runs", security=asked, mounts=[mount]) == ["runs"]
    assert label_of(tmp_path) is None
    assert "runs no SELinux" in (node.directory / "log").read_text()
