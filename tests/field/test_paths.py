"""Odd paths and odd mounts: links, names outside ASCII, mounts where something is removed."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from imgsvc import kernel, removal
from imgsvc.api import cri_pb2 as pb
from tests.runtime.harness import TIMEOUT_S
from tests.runtime.test_life import MakeNode

pytestmark = pytest.mark.root

MAPPING = [pb.IDMapping(host_id=300000, container_id=0, length=65536)]
USER_POD = pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER, userns_options=pb.UserNamespace(mode=pb.POD, uids=MAPPING, gids=MAPPING))


@pytest.fixture
def users_files(directory: Path) -> Iterator[Path]:
    """A directory of a user's, with a file and a mount of its own file system in it, both of which must survive everything."""
    files, disk = directory / "users", directory / "disk"
    for made in (files, disk):
        made.mkdir()
        (made / "file").write_text("theirs")
    (files / "below").mkdir()
    for source, place in ((files, files), (disk, files / "below")):
        subprocess.run(["mount", "--bind", source, place], check=True)
        subprocess.run(["mount", "--make-shared", place], check=True)
    yield files
    try:
        assert (files / "file").read_text() == "theirs"
        assert (files / "below/file").read_text() == "theirs", "the user's own mount is gone"
    finally:
        subprocess.run(["umount", "--recursive", files], check=True)
    assert (disk / "file").read_text() == "theirs"


@pytest.fixture(params=["s", "größe"])
def linked_state(directory: Path, request: pytest.FixtureRequest) -> Path:
    """The harness's state directory is a symbolic link to one of this name."""
    real = directory / f"real-{request.param}"
    real.mkdir(0o711)
    (directory / "s").symlink_to(real.name)
    return real


def mapped(host_path: Path, container_path: str) -> pb.Mount:
    return pb.Mount(host_path=str(host_path), container_path=container_path, uidMappings=MAPPING, gidMappings=MAPPING)


@pytest.mark.usefixtures("linked_state")
def test_K1_a_create_that_fails_deletes_nothing_behind_mounts(make_node: MakeNode, users_files: Path) -> None:
    node = make_node()
    pod = node.run_pod("userns", namespaces=USER_POD)
    security = pb.LinuxContainerSecurityContext(namespace_options=USER_POD)
    for number, bad in enumerate(
        [
            pb.Mount(host_path=str(users_files), container_path="/bad", mount_options=["bogus"]),  # refused by us
            pb.Mount(host_path=str(users_files), container_path="/bin/busybox/below-a-file"),  # refused by the runtime
        ]
    ):
        config = node.container("true", f"c{number}", security=security, mounts=[mapped(users_files, "/data"), bad])
        with pytest.raises(grpc.RpcError):
            node.create(pod, config)
    assert (node.directory / "images/rootfs/bin/busybox").exists()
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    assert not [left for left in node.leftovers() if not left.startswith(str(users_files))]


def test_K1_a_removal_deletes_nothing_behind_foreign_mounts(make_node: MakeNode, users_files: Path) -> None:
    node = make_node()
    pod = node.run_pod()
    container = node.run(pod, "sleep 100")
    for place in (f"s/containers/{container}", f"s/sandboxes/{pod}", "s/containers/of-nobody", f"root/volumes/{container}/0"):
        foreign = node.directory / place / "foreign"
        foreign.mkdir(parents=True)
        subprocess.run(["mount", "--rbind", users_files, foreign], check=True)
    node.stop()
    node.start()  # sweeps what belongs to nobody
    assert not (node.directory / "s/containers/of-nobody").exists()
    node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=TIMEOUT_S)
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    assert not [left for left in node.leftovers() if not left.startswith(str(users_files))]


@pytest.fixture(params=["openat2", "mount IDs"])
def without_openat2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as on a kernel before 5.6."""

    def missing(*arguments: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if request.param == "mount IDs":
        monkeypatch.setattr(kernel, "openat2", missing)


@pytest.mark.usefixtures("without_openat2")
def test_K1_a_tree_is_removed_up_to_the_mounts_and_links_in_it(directory: Path, users_files: Path) -> None:
    doomed = directory / "doomed"
    (doomed / "a/b/mounted").mkdir(parents=True)
    (doomed / "a/b/file").touch()
    (doomed / "a/single").touch()
    (doomed / "z/y").mkdir(parents=True)
    (doomed / "link").symlink_to(users_files)
    mounted = {users_files: doomed / "a/b/mounted", users_files / "file": doomed / "a/single"}
    for source, place in mounted.items():
        subprocess.run(["mount", "--bind", source, place], check=True)
    try:
        with pytest.raises(OSError, match=r"doomed/a/(single|b/mounted)'$"):
            removal.remove_tree(doomed)
        assert sorted(p.relative_to(doomed).as_posix() for p in doomed.rglob("*") if users_files.name not in p.parts) == [
            "a",
            "a/b",
            "a/b/mounted",
            "a/b/mounted/below",
            "a/b/mounted/file",
            "a/single",
        ]
    finally:
        removal.unmount_below(doomed)
    removal.remove_tree(doomed)
    removal.remove_tree(doomed)
    assert not doomed.exists()


@pytest.mark.usefixtures("without_openat2")
def test_K1_a_directory_moved_away_during_its_removal_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("doomed/a/b/c", "elsewhere/kept"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere/kept/file").touch()
    real = removal.enter

    def enter(dir_fd: int, name: bytes) -> int:
        fd = real(dir_fd, name)
        if name == b"c":
            (tmp_path / "doomed/a/b").rename(tmp_path / "elsewhere/b")
        return fd

    monkeypatch.setattr(removal, "enter", enter)
    with pytest.raises(OSError, match="moved"):
        removal.remove_tree(tmp_path / "doomed")
    assert (tmp_path / "elsewhere/kept/file").exists()


def test_K1_a_tree_deeper_than_descriptors_and_paths_last_is_removed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    removal.remove_tree(tmp_path / "d")
    assert not list(tmp_path.iterdir())
