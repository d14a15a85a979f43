"""The same pods through every kind of handler: conmon + runc, conmon + crun, a containerd shim."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from tests.runtime.harness import TIMEOUT_S, Daemon, assert_clean, wait_for
from tests.runtime.test_life import MakeNode

pytestmark = pytest.mark.root

KINDS = {
    "runc": ({"path": "runc"}, "runc"),
    "crun": ({"path": "crun"}, "crun"),
    "shim": ({"type": "io.containerd.runc.v2"}, "containerd-shim-runc-v2"),
}


@pytest.fixture(params=list(KINDS))
def handler(request: pytest.FixtureRequest, make_node: MakeNode) -> Daemon:
    settings, program = KINDS[request.param]
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    hybrid = Path("/sys/fs/cgroup/unified").is_dir()
    cgroups = "v1" if hybrid and request.param == "crun" else ""
    return make_node({"handlers": {"default": settings}}, bridge=f"rt{request.param}", cgroups=cgroups)


def test_cgroup_version_2(make_node: MakeNode) -> None:
    if not Path("/sys/fs/cgroup/unified").is_dir():
        pytest.skip("this node has one cgroup version only, which all other tests use")
    node = make_node(bridge="rtv2", cgroups="v2")
    pod = node.run_pod("pod")
    container = node.run(pod, "i=0; while :; do i=$((i+1)); done")
    used = pb.ContainerStatsRequest(container_id=container)
    wait_for(lambda: node.cri.ContainerStats(used).stats.cpu.usage_core_nano_seconds.value > 10**8)
    assert node.output(pod, "grep ^0:: /proc/self/cgroup; mkdir /sys/fs/cgroup/x 2>/dev/null || echo refused") == ["0::/", "refused"]
    directory = Path("/sys/fs/cgroup/unified") / node.cgroup_parent[1:] / "pod" / container
    assert str(int((directory / "cgroup.procs").read_text().split()[0])).isdigit()
    node.remove_all()
    assert not directory.exists()
    assert_clean(node)


def test_a_container_may_divide_its_cgroup_where_the_handler_lets_it(make_node: MakeNode) -> None:
    if not Path("/sys/fs/cgroup/unified").is_dir():
        pytest.skip("needs a cgroup version 2 mount of the test's own")
    node = make_node({"handlers": {"default": {"path": "runc", "cgroup_writable": True}}}, bridge="rtcgw", cgroups="v2")
    pod = node.run_pod("pod")
    assert node.output(pod, "mkdir /sys/fs/cgroup/x && cat /sys/fs/cgroup/x/cgroup.type; rmdir /sys/fs/cgroup/x") == ["domain"]


def test_a_pod_from_its_beginning_to_its_end(handler: Daemon) -> None:
    node = handler
    pod = node.run_pod("pod")
    container = node.run(pod, "echo out; echo err >&2; printf 'no newline'; exit 3")
    status = node.wait_exit(container)
    assert (status.exit_code, status.reason) == (3, "Error")
    assert sorted(node.log(status.log_path)) == ["err", "no newline", "out"]
    long = node.run(pod, "trap 'exit 8' TERM; while :; do echo tick; sleep 0.05; done", "long")
    answer = node.exec(long, "sh", "-c", "echo a; echo b >&2; exit 5")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"a\n", b"b\n", 5)
    with pytest.raises(grpc.RpcError) as caught:
        node.exec(long, "sleep", "50", timeout=1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: b"sleep 50" not in node.exec(long, "ps").stdout)
    path = Path(node.status(long).log_path)
    path.rename(f"{path}.1")
    node.cri.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=long))
    wait_for(lambda: path.exists() and len(path.read_bytes()) > 0)
    update = pb.LinuxContainerResources(cpu_shares=333)
    node.cri.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=long, linux=update))
    node.cri.StopContainer(pb.StopContainerRequest(container_id=long, timeout=10), timeout=TIMEOUT_S)
    assert node.status(long).exit_code == 8
    node.remove_all()
    assert_clean(node)


def joined(*paths: Path | str) -> list[str]:
    """The lines of a log in several files, with their parts put together as the kubelet does."""
    lines, parts = [], ""
    for path in paths:
        for raw in Path(path).read_text().splitlines():
            _, _, tag, text = raw.split(" ", 3)
            assert len(text) <= 16384
            parts += text
            if tag == "F":
                lines.append(parts)
                parts = ""
    return lines + ([parts] if parts else [])


def test_long_lines_are_put_together_from_their_parts(handler: Daemon) -> None:
    node = handler
    script = "head -c 40960 /dev/zero | tr '\\0' x; echo; echo after; head -c 16384 /dev/zero | tr '\\0' y; echo; printf tail"
    status = node.wait_exit(node.run(node.run_pod("pod"), script))
    assert joined(status.log_path) == ["x" * 40960, "after", "y" * 16384, "tail"]


def test_no_line_is_lost_when_the_log_is_reopened_under_load(handler: Daemon) -> None:
    node = handler
    script = "n=0; while [ $n -lt 40 ]; do seq $((n*5000+1)) $((n*5000+5000)); n=$((n+1)); sleep 0.1; done"
    container = node.run(node.run_pod("pod"), f"{script}; while [ ! -e /end ]; do sleep 0.1; done")
    path = Path(node.status(container).log_path)
    rotated: list[Path] = []
    for number in range(6):
        time.sleep(0.2)
        rotated.append(path.rename(f"{path}.{number}"))
        node.cri.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container))
    node.exec(container, "touch", "/end")
    node.wait_exit(container, 60)
    assert joined(*rotated, path) == [str(n) for n in range(1, 200_001)]


def test_a_shared_pid_namespace(handler: Daemon) -> None:
    shared = pb.NamespaceOption()
    security = pb.LinuxContainerSecurityContext(namespace_options=shared)
    pod = handler.run_pod("pod", namespaces=shared)
    handler.run(pod, "sleep 100", "first", security=security)
    lines = handler.output(pod, "ps", security=security)
    assert any("/pause" in line for line in lines)
    assert any("sleep 100" in line for line in lines)
    handler.remove_all()
    assert_clean(handler)


def test_c_d6_the_daemon_may_die(handler: Daemon) -> None:
    node = handler
    pod = node.run_pod("pod")
    container = node.run(pod, "i=0; while [ ! -e /end ]; do echo line $i; i=$((i+1)); sleep 0.01; done; exit 6")
    short = node.run(pod, "sleep 0.5; exit 4", "short")
    node.kill()
    time.sleep(1.5)
    node.start()
    assert node.wait_exit(short).exit_code == 4
    assert node.status(container).state == pb.CONTAINER_RUNNING
    node.exec(container, "touch", "/end")
    status = node.wait_exit(container)
    assert status.exit_code == 6
    lines = node.log(status.log_path)
    assert lines == [f"line {n}" for n in range(len(lines))]
    assert len(lines) > 50
    node.remove_all()
    assert_clean(node)


def test_c_c15_no_abstract_sockets_of_ours(handler: Daemon) -> None:
    before = abstract_sockets()
    pod = handler.run_pod("pod")
    handler.run(pod, "sleep 100", stdin=True)
    assert abstract_sockets() - before == set()


def abstract_sockets() -> set[str]:
    names = (line.split()[7:] for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {name[0] for name in names if name and name[0].startswith("@")}


def test_memory_limits_are_enforced(handler: Daemon) -> None:
    pod = handler.run_pod("pod")
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=32 << 20)
    status = handler.wait_exit(handler.run(pod, "tail /dev/zero", resources=resources), 30)
    assert status.exit_code == 137
    assert status.reason == "OOMKilled"


def test_a_user_namespace(handler: Daemon) -> None:
    mapping = [pb.IDMapping(host_id=300000, container_id=0, length=65536)]
    user = pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping)
    options = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=user)
    pod = handler.run_pod("pod", namespaces=options)
    security = pb.LinuxContainerSecurityContext(namespace_options=options)
    script = "cat /proc/self/uid_map; stat -c %u /bin/busybox; touch /new && stat -c %u /new"
    lines = handler.output(pod, script, security=security)
    assert [line.split() for line in lines] == [["0", "300000", "65536"], ["0"], ["0"]]


def test_a_user_namespace_in_the_hosts_network(handler: Daemon) -> None:
    mapping = [pb.IDMapping(host_id=300000, container_id=0, length=65536)]
    options = pb.NamespaceOption(
        network=pb.NODE, pid=pb.CONTAINER, userns_options=pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping)
    )
    pod = handler.run_pod("pod", namespaces=options)
    security = pb.LinuxContainerSecurityContext(namespace_options=options)
    lines = handler.output(pod, "cat /proc/self/uid_map; readlink /proc/self/ns/net; ls /sys/class/net", security=security)
    assert lines[0].split() == ["0", "300000", "65536"]
    assert lines[1] == os.readlink("/proc/self/ns/net")
    assert "lo" in lines
    assert handler.cri.Status(pb.StatusRequest()).features.user_namespaces_host_network


def test_a_program_that_is_missing_is_named(handler: Daemon) -> None:
    pod = handler.run_pod("pod")
    with pytest.raises(grpc.RpcError) as caught:
        handler.start_container(handler.create(pod, handler.container("", command=["/no/such/program"])))
    assert "/no/such/program" in (caught.value.details() or "")


def test_a_shim_that_died_is_buried(make_node: MakeNode) -> None:
    if not shutil.which("containerd-shim-runc-v2"):
        pytest.skip("no shim")
    node = make_node({"handlers": {"default": {"type": "io.containerd.runc.v2"}}})
    pod = node.run_pod("pod")
    container = node.run(pod, "sleep 100")
    parents = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_shim_of(p, node)]
    assert len(parents) == 1
    os.kill(parents[0], signal.SIGKILL)
    status = node.wait_exit(container)
    assert status.exit_code == 137
    node.remove_all()
    assert_clean(node)


def _is_shim_of(process: Path, node: Daemon) -> bool:
    try:
        return "containerd-shim" in (process / "cmdline").read_text() and str(node.directory) in (process / "cmdline").read_text()
    except OSError:
        return False
