"""The daemon dies at every step; what the next one finds and does (C-C27, C-D6)."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.base import failpoints, kernel, procfs
from imgsvc.base.metadb.database import MetaDB, WriteTxn
from tests.runtime.harness import TIMEOUT_S, Daemon, assert_clean, wait_for
from tests.runtime.test_life import MakeNode

pytestmark = pytest.mark.root

POINTS = [name for name in failpoints.POINTS if name.startswith(("sandbox.", "container."))]


def whole_life(node: Daemon) -> None:
    shared = pb.NamespaceOption()
    pod = node.run_pod("victim", namespaces=shared)
    container = node.run(pod, "sleep 100", security=pb.LinuxContainerSecurityContext(namespace_options=shared))
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container), timeout=TIMEOUT_S)
    node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=TIMEOUT_S)
    node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)


@pytest.mark.parametrize("point", POINTS)
def test_c_c27_killed_at_every_point_nothing_is_left(make_node: MakeNode, point: str) -> None:
    node = make_node(bridge="rtkill", failpoint=f"{point}=kill")
    with pytest.raises(grpc.RpcError):
        whole_life(node)
    node.wait_dead()
    node.start()
    whole_life_of_others(node)
    node.remove_all()
    assert_clean(node)


def whole_life_of_others(node: Daemon) -> None:
    """A new pod of the same name can be had once the old one is removed."""
    node.remove_all()
    pod = node.run_pod("victim")
    assert node.output(pod, "echo alive") == ["alive"]


@pytest.mark.parametrize("point", POINTS)
def test_c_c27_failing_at_every_point_can_be_repeated(make_node: MakeNode, point: str) -> None:
    node = make_node(bridge="rtfail", failpoint=f"{point}=error:ENOSPC*1")
    with pytest.raises(grpc.RpcError) as caught:
        whole_life(node)
    assert "failpoint" in (caught.value.details() or "")
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    node.remove_all()
    whole_life(node)
    assert_clean(node)


def test_c_c27_a_network_that_cannot_be_left_is_left_later(make_node: MakeNode) -> None:
    node = make_node(bridge="rtdel")
    plugins = node.directory / "plugins"
    plugins.mkdir()
    broken = node.directory / "broken"
    for name in ("bridge", "host-local"):
        body = f'#!/bin/sh\n[ -e {broken} ] && [ "$CNI_COMMAND" = "$(cat {broken})" ] && {{ echo "{{\\"code\\":11,\\"msg\\":\\"later\\"}}"; exit 1; }}\nexec /usr/lib/cni/{name}\n'
        (plugins / name).write_text(body)
        (plugins / name).chmod(0o755)
    node.stop()
    node.extra["cni"] = {"bin_dirs": [str(plugins)]}
    node.start()
    broken.write_text("ADD")
    with pytest.raises(grpc.RpcError) as caught:
        node.run_pod("never")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "later" in (caught.value.details() or "")
    assert_clean(node)
    broken.unlink()
    pod = node.run_pod("stuck")
    broken.write_text("DEL")
    with pytest.raises(grpc.RpcError):
        node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    status = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    assert status.state == pb.SANDBOX_NOTREADY
    node.kill()
    broken.unlink()
    node.start()
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    assert_clean(node)


@pytest.mark.parametrize("point", ["sandbox.namespaces", "sandbox.network", "container.root", "container.created"])
def test_c_c27_a_caller_that_leaves_leaves_nothing(make_node: MakeNode, point: str) -> None:
    node = make_node(bridge="rtleave", failpoint=f"{point}=delay:700*1")
    pod = "" if point.startswith("sandbox") else node.run_pod("victim")
    with pytest.raises(grpc.RpcError):
        impatient(node, pod)
    time.sleep(1)
    if point.startswith("sandbox"):
        assert_clean(node)
    whole_life_of_others(node)
    node.remove_all()
    assert_clean(node)


def impatient(node: Daemon, pod: str) -> None:
    """Make a pod, or a container in one, and go away in the middle."""
    if not pod:
        node.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=node.pod("victim")), timeout=0.4)
        return
    request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=node.container("sleep 100"))
    node.cri.CreateContainer(request, timeout=0.4)


def test_c_d6_containers_outlive_the_daemon(make_node: MakeNode) -> None:
    node = make_node()
    pod = node.run_pod("pod")
    short = node.run(pod, "sleep 1.5; exit 4", "short")
    long = node.run(pod, "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.01; done", "long")
    before = {c.id: c.created_at for c in node.cri.ListContainers(pb.ListContainersRequest()).containers}
    node.kill()
    time.sleep(2)
    node.start()
    assert {c.id: c.created_at for c in node.cri.ListContainers(pb.ListContainersRequest()).containers} == before
    assert node.wait_exit(short).exit_code == 4
    status = node.status(long)
    assert status.state == pb.CONTAINER_RUNNING
    assert node.exec(long, "echo", "still").stdout == b"still\n"
    node.cri.StopContainer(pb.StopContainerRequest(container_id=long, timeout=0), timeout=TIMEOUT_S)
    assert node.status(long).exit_code == 137
    lines = node.log(status.log_path)
    assert lines[:100] == [f"line {n}" for n in range(100)]
    assert len(lines) > 150  # it went on while nobody was there


def test_c_d6_ends_are_noticed_after_a_restart(make_node: MakeNode) -> None:
    node = make_node()
    pod = node.run_pod("pod")
    container = node.run(pod, "while [ ! -e /go ]; do sleep 0.05; done; exit 5")
    node.kill()
    node.start()
    assert node.status(container).state == pb.CONTAINER_RUNNING
    node.exec(container, "touch", "/go")
    assert node.wait_exit(container).exit_code == 5


def test_commands_that_were_under_way_end_with_the_daemon_and_leave_no_files(make_node: MakeNode) -> None:
    node = make_node()
    container = node.run(node.run_pod("pod"), "sleep 100")
    command = pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", "touch /started; sleep 77"], timeout=60)
    call = node.cri.ExecSync.future(command, timeout=TIMEOUT_S)
    wait_for(lambda: node.exec(container, "test", "-e", "/started").exit_code == 0)
    node.kill()
    assert call.exception()
    node.start()
    wait_for(lambda: b"sleep 77" not in node.exec(container, "ps").stdout)
    assert node.status(container).state == pb.CONTAINER_RUNNING
    assert list((node.directory / "s/containers").glob("*/exec-*")) == []


def test_killed_while_it_tests_its_oci_runtime_it_leaves_no_container(make_node: MakeNode, directory: Path, tmp_path: Path) -> None:
    program = tmp_path / "runtime"  # kills the daemon once, when its container is there
    program.write_text(
        "#!/bin/sh\n"
        f'runc "$@" || exit\ncase "$*" in *" create "*) [ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; kill -9 $PPID; }};; esac\n'
    )
    program.chmod(0o755)
    with pytest.raises(AssertionError):
        make_node({"handlers": {"default": {"path": str(program)}}})
    (left,) = (directory / "s").glob("selftest-*")
    groups = [path for path in Path("/sys/fs/cgroup").glob(f"*/imgsvc-selftest/{left.name}") if (path / "cgroup.procs").read_text()]
    assert groups
    make_node({"handlers": {"default": {"path": str(program)}}})
    assert not left.exists()
    assert [group for group in groups if group.exists()] == []


def test_a_lost_pause_process_makes_the_pod_not_ready(make_node: MakeNode) -> None:
    node = make_node()
    pod = node.run_pod("pod", namespaces=pb.NamespaceOption(network=pb.NODE))
    pid = int((node.directory / "s/containers" / pod / "init.pid").read_text())
    node.kill()
    os.kill(pid, signal.SIGKILL)
    node.start()
    assert node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.state == pb.SANDBOX_NOTREADY


def test_c_d5_after_a_reboot_everything_is_told_and_cleaned(make_node: MakeNode) -> None:
    node = make_node(bridge="rtboot")
    pod = node.run_pod("pod")
    container = node.run(pod, "sleep 100")
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0), timeout=TIMEOUT_S)
    running = node.run(pod, "sleep 100", "second")
    node.stop()
    reboot(node, [running])
    node.start()
    status = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    assert status.state == pb.SANDBOX_NOTREADY
    lost = node.status(running)
    assert (lost.state, lost.exit_code, lost.reason) == (pb.CONTAINER_EXITED, 255, "Unknown")
    assert node.status(container).exit_code == 137
    node.remove_all()
    assert_clean(node)


def reboot(node: Daemon, running: list[str]) -> None:
    """What a reboot does: processes and STATE are gone, the boot ID is another one; records stay."""
    for container in running:
        for name in ("init.pid", "conmon.pid"):
            os.kill(int((node.directory / "s/containers" / container / name).read_text()), signal.SIGKILL)
    time.sleep(0.3)
    points = [os.fsdecode(mount.point) for mount in procfs.mounts()]
    for point in sorted((p for p in points if p.startswith(f"{node.directory}/s/")), key=len, reverse=True):
        kernel.umount(point)
    for directory in Path("/sys/fs/cgroup").glob(f"*{node.cgroup_parent}/*/*"):
        if directory.is_dir():
            directory.rmdir()
    shutil.rmtree(node.directory / "s")
    database = MetaDB(node.directory / "db")

    def forget(txn: WriteTxn) -> None:
        for table in ("sandboxes", "containers"):
            for key, record in list(txn.items(table)):
                txn.put(table, key, {**record, "boot_id": "another"})

    database.write(forget)
    database.close()
