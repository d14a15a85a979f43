"""Odd paths and odd mounts: links, names outside ASCII, mounts where something is removed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from imgsvc import config
from imgsvc.api import cri_pb2 as pb
from imgsvc.base import kernel, procfs, removal
from imgsvc.daemon import preflight
from imgsvc.runtime import model, podfiles
from tests.e2e.conftest import BUSYBOX
from tests.runtime.harness import TIMEOUT_S, Daemon, wait_for
from tests.runtime.test_life import MakeNode
from tests.support import cri, daemon
from tests.support.registries import RealRegistry

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
    for _ in range(2100):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    removal.remove_tree(tmp_path / "d")
    assert not list(tmp_path.iterdir())


ODD = b"gr\xf6\xdfe \xff\\\n"  # Latin-1, a blank, a byte of no encoding, a backslash, a line's end


@pytest.fixture
def odd_mount(directory: Path) -> Iterator[None]:
    """A bind mount whose source and place no encoding takes."""
    source, place = (os.path.join(os.fsencode(directory), name + ODD) for name in (b"source-", b"place-"))
    for made in (source, place):
        os.mkdir(made)
    subprocess.run(["mount", "--bind", source, place], check=True)
    yield
    subprocess.run(["umount", place], check=True)


def test_S5_a_mount_of_any_bytes_changes_nothing(make_node: MakeNode, odd_mount: None) -> None:
    node = make_node()
    pod = node.run_pod()
    container = node.run(pod, "sleep 100")
    node.stop()
    node.start()
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container), timeout=TIMEOUT_S)
    node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=TIMEOUT_S)
    node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    assert not list((node.directory / "s/containers").iterdir())
    assert not list((node.directory / "s/sandboxes").iterdir())


def test_S5_mountinfo_is_read_in_bytes(odd_mount: None, directory: Path) -> None:
    (found,) = [mount for mount in procfs.mounts() if b"place-" in mount.point]
    assert found.point == os.path.join(os.fsencode(directory), b"place-" + ODD)
    assert found.root.endswith(b"source-" + ODD)
    fd = os.open(found.point, os.O_RDONLY)
    assert procfs.mount_id(fd) == found.id
    os.close(fd)
    (parsed,) = procfs.parse_mounts([b"36 35 98:0 /a\\040b /m\\134\xff rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n"])
    assert parsed == procfs.Mount(
        36, 35, "98:0", b"/a b", b"/m\\\xff", ("rw", "noatime"), ("master:1", "shared:7"), "ext3", b"/dev/root", b"rw,errors=continue"
    )


def test_S5_shared_mounts_with_names_outside_ascii_are_recognised(make_node: MakeNode, directory: Path) -> None:
    node = make_node()
    files = directory / "größe"
    files.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", files], check=True)
    try:
        subprocess.run(["mount", "--make-shared", files], check=True)
        pod = node.run_pod(privileged=True)
        both_ways = pb.Mount(host_path=str(files), container_path="/data", propagation=pb.PROPAGATION_BIDIRECTIONAL)
        security = pb.LinuxContainerSecurityContext(privileged=True)
        assert node.output(pod, "touch /data/größe; cd /data; echo *", mounts=[both_ways], security=security) == ["größe"]
    finally:
        subprocess.run(["umount", files], check=True)


def test_S5_a_process_of_any_name_is_reaped_and_an_interface_of_any_name_is_told() -> None:
    odd = subprocess.Popen(
        [sys.executable, "-c", "import ctypes; ctypes.CDLL(None).prctl(15, b') Z \\xff\\n'); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert odd.stdout
    assert odd.stdout.readline() == b"\n"
    found = procfs.process(odd.pid)
    assert found
    assert not found.ended
    assert found.start > 0
    assert not procfs.nested(odd.pid)
    odd.communicate(b"\n")
    assert procfs.process(odd.pid) is None
    lines = [b"Inter-|\n", b" face |\n", b"    lo: 1 2\n", b"  e\xff:0:3 4\n", b"eth0: 5 6\n"]
    assert procfs.parse_interfaces(lines) == {"e\\xff:0": [3, 4], "eth0": [5, 6]}


def test_S5_the_nodes_own_files_may_be_of_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_bytes(b"10.0.0.1 n\xf6de\n")
    monkeypatch.setattr(podfiles, "_read", lambda path: (tmp_path / "hosts").read_bytes())
    host = model.NamespaceOption(network=model.NamespaceMode.NODE)
    linux = model.LinuxPodSandboxConfig(security_context=model.LinuxSandboxSecurityContext(namespace_options=host))
    (tmp_path / "pod").mkdir()
    podfiles.write(tmp_path / "pod", model.PodSandboxConfig(linux=linux), "")
    assert (tmp_path / "pod/hosts").read_bytes() == b"10.0.0.1 n\xf6de\n"


@pytest.mark.usefixtures("busybox")
def test_K1_root_state_and_socket_below_links_and_outside_ascii_serve_pods(
    make_daemon: Callable[..., daemon.Daemon], registry: RealRegistry
) -> None:
    node = make_daemon()
    node.directory.chmod(0o711)  # for user namespaces
    for name in ("root", "state"):
        (node.directory / f"{name} größe%20").mkdir()
        (node.directory / name).symlink_to(f"{name} größe%20")
    node.map_host("docker.io", registry.address)
    assert node.cli("config", "check", str(node.config)).returncode == 0
    node.start()
    runtime = node.runtime()
    assert cri.pull(node.images(), BUSYBOX)
    pod = cri.pod_config(node)
    pod.linux.security_context.namespace_options.CopyFrom(USER_POD)
    sandbox = cri.run_pod(runtime, pod)
    good = cri.container_config(BUSYBOX, ["sh", "-c", "id -u; cd /data; echo *"])
    good.linux.security_context.namespace_options.CopyFrom(USER_POD)
    (node.directory / "users/größe").mkdir(parents=True)
    good.mounts.append(mapped(node.directory / "users", "/data"))
    container = cri.create(runtime, sandbox, good, pod)
    cri.start(runtime, container)
    ended = cri.wait_for_exit(runtime, container)
    assert [line.text for line in cri.read_log(Path(ended.log_path))] == ["0", "größe"]
    assert json.loads(node.cli("images", "--json").stdout)
    bad = cri.container_config(BUSYBOX, ["true"], "bad")
    bad.linux.CopyFrom(good.linux)
    bad.mounts.extend([mapped(node.directory / "users", "/data"), pb.Mount(host_path="/tmp", container_path="/x", mount_options=["bogus"])])
    cri.refusal(lambda: cri.create(runtime, sandbox, bad, pod))
    assert (node.directory / "users/größe").exists()
    node.remove_all_pods()
    assert node.leftovers() == []
    assert node.stop() == 0


@pytest.mark.parametrize(
    "text, what",
    [
        ('root = "/etc/passwd"', "/etc/passwd"),
        ('state = "/"', "can own"),
        ('root = "/nowhere/x"\nstate = "/nowhere/x"', "same directory"),
        ('root = "/nowhere/a:b"\n[images]\nsnapshotter = "overlayfs"', "colon"),
    ],
)
def test_K1_the_check_refuses_directories_that_cannot_be_used(text: str, what: str) -> None:
    (problem,) = preflight.inspect(
        config.parse(f"version = 1\n{text}\n[registry]\nconfig_path = '/nowhere'\n[prepull]\ndirectory = '/nowhere'\n", "file")
    ).problems
    assert what in problem


def refused(node: daemon.Daemon) -> str:
    """What a daemon that does not start says."""
    with pytest.raises(AssertionError, match="the daemon ended with 1"):
        node.start()
    node.process = None
    return node.log


def configure(node: daemon.Daemon, key: str, value: object) -> None:
    """Give one key of the first table another value."""
    text = re.sub(rf"^{key} = .*$", f'{key} = "{value}"', node.config.read_text(), flags=re.MULTILINE)
    node.config.write_text(text)


def test_S6_a_second_daemon_takes_neither_state_nor_socket_of_the_first(make_daemon: Callable[..., daemon.Daemon]) -> None:
    first, second = make_daemon(), make_daemon()
    first.start()
    mark = first.state / "containers/a-pod-of-the-first"
    mark.mkdir()
    configure(second, "state", first.state)
    assert f"the state directory is in use by another imgsvc (process {first.pid})" in refused(second)
    configure(second, "state", second.directory / "state")
    second.config.write_text(second.config.read_text() + f'[grpc]\naddress = "{first.address}"\n')
    assert "another server listens on the socket" in refused(second)
    assert mark.exists()
    assert first.runtime().Version(pb.VersionRequest(), timeout=TIMEOUT_S).runtime_name == "imgsvc"
    # The socket of the first goes by hand: the second may have it, and the first leaves it alone when it stops.
    (first.state / "imgsvc.sock").unlink()
    second.start()
    assert first.stop() == 0
    assert cri.image_status(first.images(), "nothing") is None  # by the second's daemon
    second.kill()
    second.start()  # over what a killed one leaves
    assert second.stop() == 0
    assert not (first.state / "imgsvc.sock").exists()
    assert mark.exists()


def test_S6_pods_of_another_root_are_not_swept(make_daemon: Callable[..., daemon.Daemon]) -> None:
    node = make_daemon()
    node.start()
    node.kill()
    mark = node.state / "sandboxes/a-pod"
    mark.mkdir()
    configure(node, "root", node.directory / "another")
    assert f"there are pods of the imgsvc whose root is {node.root}" in refused(node)
    assert mark.exists()
    mark.rmdir()
    node.start()
    assert node.stop() == 0


def test_S6_a_file_is_not_taken_for_a_socket_of_ours(make_daemon: Callable[..., daemon.Daemon]) -> None:
    node = make_daemon()
    (node.directory / "file").write_text("theirs")
    node.config.write_text(node.config.read_text() + f'[grpc]\naddress = "unix://{node.directory}/file"\n')
    assert "not a socket" in refused(node)
    assert (node.directory / "file").read_text() == "theirs"


def test_S12_pods_whose_state_was_wiped_are_stopped_beside_serving(make_node: MakeNode) -> None:
    node = make_node(bridge="rtwiped")
    shared = pb.NamespaceOption()
    pods = [node.run_pod("own"), node.run_pod("shared", namespaces=shared)]
    security = pb.LinuxContainerSecurityContext(namespace_options=shared)
    running = [
        node.run(pods[0], "sleep 300 & exec sleep 300", "a"),
        node.run(pods[1], "sleep 300 & exec sleep 300", "b", security=security),
    ]
    node.kill()
    removal.unmount_below(node.directory / "s")
    removal.remove_tree(node.directory / "s")
    node.start()
    for pod in node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items:
        assert pod.state == pb.SANDBOX_NOTREADY
        node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=TIMEOUT_S)
    assert {node.status(container).state for container in running} == {pb.CONTAINER_EXITED}
    node.remove_all()
    assert node.leftovers() == []


def runtime_ready(node: Daemon) -> bool:
    conditions = node.cri.Status(pb.StatusRequest(), timeout=TIMEOUT_S).status.conditions
    return next(condition.status for condition in conditions if condition.type == "RuntimeReady")


def test_S10_a_full_state_directory_keeps_pods_stoppable_and_the_handler_comes_back(make_node: MakeNode, directory: Path) -> None:
    state = directory / "s"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", state], check=True)
    try:
        node = make_node()
        pod = node.run_pod()
        container = node.run(pod, "sleep 300")
        node.stop()
        filler = state / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)):
                pass
        node.start()
        assert not runtime_ready(node)
        node.cri.StopContainer(pb.StopContainerRequest(container_id=container), timeout=TIMEOUT_S)
        node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
        node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
        filler.unlink()
        wait_for(lambda: runtime_ready(node))
        assert node.output(node.run_pod("next"), "echo here") == ["here"]
        node.remove_all()
    finally:
        subprocess.run(["umount", "--lazy", state], check=True)


def test_S16_too_few_open_files_are_one_clear_error_at_the_start(make_daemon: Callable[..., daemon.Daemon]) -> None:
    node = make_daemon()
    command = ["prlimit", "--nofile=64", sys.executable, "-m", "imgsvc.cli", "serve", "--config", str(node.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "imgsvc: this process may open 64 files, and needs 1024; raise the hard limit: LimitNOFILE= of the unit, ulimit -Hn"
    ]


def test_P18_a_half_made_pod_whose_network_cannot_be_left_is_listed_not_ready(make_node: MakeNode, directory: Path) -> None:
    node = make_node(bridge="rtp18")
    plugins, broken = directory / "plugins", directory / "broken"
    plugins.mkdir()
    for name in ("bridge", "host-local"):
        refuse = f'[ -e {broken} ] && [ "$CNI_COMMAND" = DEL ] && {{ echo "{{\\"code\\":11,\\"msg\\":\\"later\\"}}"; exit 1; }}'
        (plugins / name).write_text(f"#!/bin/sh\n{refuse}\nexec /usr/lib/cni/{name}\n")
        (plugins / name).chmod(0o755)
    node.stop()
    node.extra["cni"] = {"bin_dirs": [str(plugins)]}
    node.start(failpoint="sandbox.network=kill")
    with pytest.raises(grpc.RpcError):
        node.run_pod("half")
    node.wait_dead()
    broken.touch()
    node.start()
    (pod,) = node.cri.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=TIMEOUT_S).items
    assert (pod.metadata.name, pod.state) == ("half", pb.SANDBOX_NOTREADY)
    node.stop()
    broken.unlink()
    node.start()
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=TIMEOUT_S)
    node.run_pod("half")
    node.remove_all()
    assert node.leftovers() == []
