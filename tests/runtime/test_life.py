"""Pods and containers on a real node: runc, conmon, namespaces, cgroups, logs."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from tests.runtime.harness import TIMEOUT_S, Daemon, assert_clean, wait_for

pytestmark = pytest.mark.root

MakeNode = Callable[..., Daemon]


def code(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_the_main_line(make_node: MakeNode) -> None:
    node = make_node(bridge="rtlife")
    pod = node.run_pod("one", dns_config=pb.DNSConfig(servers=["10.0.0.10"], searches=["x.y"], options=["ndots:5"]))
    container = node.run(pod, "echo out; echo err >&2; hostname; cat /etc/resolv.conf; ip -4 -o addr show eth0; exit 3")
    status = node.wait_exit(container)
    assert (status.exit_code, status.reason) == (3, "Error")
    assert 0 < status.created_at <= status.started_at <= status.finished_at
    assert status.image.image == "docker.io/library/busybox:latest"
    raw = Path(status.log_path).read_text().splitlines()
    streams = {line.split(" ")[1] for line in raw}
    assert streams == {"stdout", "stderr"}
    assert all(line.split(" ")[2] == "F" for line in raw)
    lines = node.log(status.log_path)
    assert {"out", "err", "one", "search x.y", "nameserver 10.0.0.10", "options ndots:5"} <= set(lines)
    address = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.network.ip
    assert any(address in line for line in lines)
    node.remove_all()
    assert_clean(node)


def test_namespaces_are_shared_or_not_as_asked(node: Daemon) -> None:
    shared = pb.NamespaceOption(network=pb.NODE)
    pod = node.run_pod("shared-pid", namespaces=shared)
    security = pb.LinuxContainerSecurityContext(namespace_options=shared)
    first = node.run(pod, "sleep 100", "first", security=security)
    assert any("sleep 100" in line for line in node.output(pod, "ps", security=security))
    private = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER))
    assert not any("sleep 100" in line for line in node.output(pod, "ps", security=private))
    target = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE, pid=pb.TARGET, target_id=first))
    assert any("sleep 100" in line for line in node.output(pod, "ps", security=target))
    host = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE, pid=pb.NODE))
    assert len(node.output(pod, "ps", security=host)) > 10


def test_stop_is_graceful_then_not(node: Daemon) -> None:
    pod = node.run_pod("stop")
    polite = node.run(pod, "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done", "polite")
    node.wait_line(polite, "ready")
    node.cri.StopContainer(pb.StopContainerRequest(container_id=polite, timeout=20), timeout=TIMEOUT_S)
    assert node.status(polite).exit_code == 7
    deaf = node.run(pod, "trap '' TERM; echo ready; while :; do sleep 0.05; done", "deaf")
    node.wait_line(deaf, "ready")
    before = time.monotonic()
    node.cri.StopContainer(pb.StopContainerRequest(container_id=deaf, timeout=1), timeout=TIMEOUT_S)
    assert 0.9 < time.monotonic() - before < 60
    assert node.status(deaf).exit_code == 137


def test_the_stop_signal_of_the_pod_is_used(node: Daemon) -> None:
    pod = node.run_pod("signal")
    container = node.run(pod, "trap 'exit 9' USR1; echo ready; while :; do sleep 0.05; done", stop_signal=pb.SIGNAL_SIGUSR1)
    node.wait_line(container, "ready")
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=20), timeout=TIMEOUT_S)
    status = node.status(container)
    assert (status.exit_code, status.stop_signal) == (9, pb.SIGNAL_SIGUSR1)


def test_c_c26_stop_and_remove_may_be_repeated(node: Daemon) -> None:
    unknown = "0" * 64
    node.cri.StopContainer(pb.StopContainerRequest(container_id=unknown))
    node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=unknown))
    node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=unknown))
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=unknown))
    assert code(lambda: node.status(unknown)) == grpc.StatusCode.NOT_FOUND
    assert code(lambda: node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=unknown))) == grpc.StatusCode.NOT_FOUND
    assert code(lambda: node.start_container(unknown)) == grpc.StatusCode.NOT_FOUND
    assert code(lambda: node.create(unknown, node.container("x"))) == grpc.StatusCode.NOT_FOUND
    pod = node.run_pod("twice")
    container = node.run(pod, "sleep 100")
    for _ in range(2):
        node.cri.StopContainer(pb.StopContainerRequest(container_id=container))
    for _ in range(2):
        node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
    for _ in range(2):
        node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    status = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    assert status.state == pb.SANDBOX_NOTREADY
    assert code(lambda: node.create(pod, node.container("x"))) == grpc.StatusCode.FAILED_PRECONDITION
    for _ in range(2):
        node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))


def test_c_c26_fifty_at_once(node: Daemon) -> None:
    pod = node.run_pod("fifty")
    container = node.create(pod, node.container("trap 'echo term' TERM; while :; do sleep 0.05; done"))
    with ThreadPoolExecutor(50) as pool:
        starting = pool.submit(node.start_container, container)
        stops = [pool.submit(lambda: node.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1))) for _ in range(25)]
        removes = [pool.submit(lambda: node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container))) for _ in range(24)]
        for stopped in stops:
            stopped.result(TIMEOUT_S)
        for removed in removes:
            removed.result(TIMEOUT_S)
        error = starting.exception(TIMEOUT_S)
        assert error is None or isinstance(error, grpc.RpcError)
    assert code(lambda: node.status(container)) == grpc.StatusCode.NOT_FOUND
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))


def test_names_are_unique_per_attempt(node: Daemon) -> None:
    pod = node.run_pod("name")
    assert code(lambda: node.run_pod("name")) == grpc.StatusCode.ALREADY_EXISTS
    other = node.run_pod("name", attempt=1)
    node.create(pod, node.container("x", "c"))
    assert code(lambda: node.create(pod, node.container("x", "c"))) == grpc.StatusCode.ALREADY_EXISTS
    node.create(pod, node.container("x", "c", attempt=1))
    for gone in (pod, other):
        node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=gone))
    again = node.run_pod("name")
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=again))


def test_a_refused_container_leaves_nothing_and_frees_its_name(node: Daemon) -> None:
    pod = node.run_pod("refused")
    config = node.container("x", "c", devices=[pb.Device(host_path="/dev/no-such-device", container_path="/dev/x")])
    with pytest.raises(grpc.RpcError) as caught:
        node.create(pod, config)
    assert "/dev/no-such-device" in (caught.value.details() or "")
    assert node.cri.ListContainers(pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=pod))).containers == []
    container = node.run(pod, "exit 0", "c")
    node.wait_exit(container)
    missing = node.container("x", "d")
    missing.image.image = "nothing"
    assert code(lambda: node.create(pod, missing)) == grpc.StatusCode.NOT_FOUND


def test_limits_are_set_updated_and_their_breach_is_told(node: Daemon) -> None:
    pod = node.run_pod("limits")
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=32 << 20, cpu_shares=512)
    container = node.run(pod, "sleep 100", "limited", resources=resources)
    cgroup = Path("/sys/fs/cgroup/memory") / node.cgroup_parent[1:] / "limits" / container / "memory.limit_in_bytes"
    if not cgroup.exists():
        pytest.skip("this test reads cgroup version 1")
    assert int(cgroup.read_text()) == 32 << 20
    update = pb.LinuxContainerResources(memory_limit_in_bytes=48 << 20)
    node.cri.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=update))
    assert int(cgroup.read_text()) == 48 << 20
    shown = node.status(container).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_shares) == (48 << 20, 512)
    greedy = node.run(pod, "tail /dev/zero", "greedy", resources=resources)
    status = node.wait_exit(greedy, 30)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def pod_info(node: Daemon, pod: str) -> dict[str, Any]:
    answer = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    found: dict[str, Any] = json.loads(answer.info["info"])
    return found


def resize(node: Daemon, pod: str, **resources: Any) -> None:
    overhead = pb.LinuxContainerResources(memory_limit_in_bytes=8 << 20, cpu_quota=10_000, cpu_period=100_000, cpu_shares=24)
    request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, overhead=overhead, resources=pb.LinuxContainerResources(**resources))
    node.cri.UpdatePodSandboxResources(request)


def test_limits_of_a_pod_are_written_to_a_cgroup_of_ours(node: Daemon) -> None:
    pod = node.run_pod("resized")  # nobody has made its cgroup_parent before: it is ours
    node.run(pod, "sleep 100")
    place = f"{node.cgroup_parent}/resized"

    def limit(controller: str, name: str) -> int:
        return int(Path(f"/sys/fs/cgroup/{controller}{place}/{name}").read_text())

    for factor in (2, 1, 3):  # up and down
        resize(node, pod, memory_limit_in_bytes=factor * (32 << 20), cpu_quota=factor * 20_000, cpu_period=50_000, cpu_shares=factor * 100)
        assert limit("memory", "memory.limit_in_bytes") == factor * (32 << 20) + (8 << 20)
        assert limit("cpu", "cpu.cfs_quota_us") == factor * 20_000 + 5_000
        assert limit("cpu", "cpu.cfs_period_us") == 50_000
        assert limit("cpu", "cpu.shares") == factor * 100 + 24
    info = pod_info(node, pod)
    assert info["cgroupOwned"]
    assert info["resources"]["memory_limit_in_bytes"] == 96 << 20
    assert info["overhead"]["cpu_shares"] == 24
    node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    assert code(lambda: resize(node, pod, cpu_shares=100)) is grpc.StatusCode.FAILED_PRECONDITION
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert not list(Path("/sys/fs/cgroup").glob(f"*{place}"))


def test_limits_of_a_pod_are_noted_only_where_the_cgroup_is_the_kubelets(node: Daemon) -> None:
    place = Path(f"/sys/fs/cgroup/memory{node.cgroup_parent}/kubelets")
    place.mkdir(parents=True)
    before = (place / "memory.limit_in_bytes").read_text()
    pod = node.run_pod("kubelets")
    resize(node, pod, memory_limit_in_bytes=32 << 20)
    assert (place / "memory.limit_in_bytes").read_text() == before
    assert not pod_info(node, pod)["cgroupOwned"]
    assert pod_info(node, pod)["resources"]["memory_limit_in_bytes"] == 32 << 20
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert place.is_dir()
    place.rmdir()


def test_c_c7_exec_sync_is_bounded(node: Daemon) -> None:
    pod = node.run_pod("exec")
    container = node.run(pod, "sleep 100")
    assert node.exec(container, "sh", "-c", "echo a; echo b >&2; exit 5") == pb.ExecSyncResponse(stdout=b"a\n", stderr=b"b\n", exit_code=5)
    flood = node.exec(container, "sh", "-c", "yes | head -c 100000000", timeout=25)
    assert len(flood.stdout) <= 16 << 20
    assert code(lambda: node.exec(container, "sh", "-c", "sleep 71 & sleep 72", timeout=1)) == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: b"sleep 7" not in node.exec(container, "ps").stdout)
    before = time.monotonic()
    node.exec(container, "sh", "-c", "sleep 73 & echo started")
    assert time.monotonic() - before < 60  # somebody keeps the pipe open
    done = node.create(pod, node.container("true", "created"))
    assert code(lambda: node.exec(done, "true")) == grpc.StatusCode.FAILED_PRECONDITION


def test_the_log_is_reopened_after_a_rotation(node: Daemon) -> None:
    pod = node.run_pod("log")
    container = node.run(pod, "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.005; done")
    path = Path(node.status(container).log_path)
    time.sleep(0.5)
    path.rename(f"{path}.1")
    node.cri.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container))
    assert path.exists()
    node.wait_exit(container, 30)
    assert node.log(f"{path}.1") + node.log(str(path)) == [f"line {n}" for n in range(400)]
    path.rename(f"{path}.2")
    assert (
        code(lambda: node.cri.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container)))
        == grpc.StatusCode.FAILED_PRECONDITION
    )
    assert not path.exists()  # C-C26: an error makes no file


def test_c_c24_logs_cannot_leave_their_directory(node: Daemon) -> None:
    pod = node.run_pod("logdir")
    outside = node.directory / "outside"
    outside.mkdir()
    logs = node.directory / "logs/logdir"
    (logs / "link").symlink_to(outside)
    (logs / "file.log").symlink_to(outside / "stolen")
    for path in ("link/x.log", "file.log"):
        config = node.container("x", log_path=path)
        assert code(functools.partial(node.create, pod, config)) == grpc.StatusCode.INVALID_ARGUMENT
    assert list(outside.iterdir()) == []
    os.mkfifo(logs / "fifo.log")
    assert code(lambda: node.create(pod, node.container("x", log_path="fifo.log"))) == grpc.StatusCode.INVALID_ARGUMENT
    container = node.create(pod, node.container("x", log_path="deep/er.log"))
    assert (logs / "deep/er.log").stat().st_mode & 0o777 == 0o640
    node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container))


def test_c_c12_and_c_c18_as_the_container_sees_it(node: Daemon) -> None:
    pod = node.run_pod("sec")
    profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    for add in ([], ["NET_ADMIN"]):
        security = pb.LinuxContainerSecurityContext(seccomp=profile, capabilities=pb.Capability(add_capabilities=add))
        lines = node.output(pod, "grep -E 'CapInh|Seccomp:' /proc/1/status; unshare -m true || echo refused", security=security)
        assert "CapInh:\t0000000000000000" in lines
        assert "Seccomp:\t2" in lines
        assert "refused" in lines
    container = node.run(pod, "sleep 100")
    assert b"CapInh:\t0000000000000000" in node.exec(container, "cat", "/proc/self/status").stdout


def test_c_c17_no_descriptor_reaches_the_container(node: Daemon) -> None:
    pod = node.run_pod("fds")
    container = node.run(pod, "ls -l /proc/1/fd; echo ready; exec sleep 100")
    node.wait_line(container, "ready")
    listed = node.exec(container, "sh", "-c", "ls /proc/1/fd; echo; ls /proc/self/fd").stdout.decode().split()
    assert set(listed) <= {"0", "1", "2", "3"}  # 3 is the directory that ls reads


def test_c_c19_a_user_namespace_changes_the_owner_not_the_cgroup(node: Daemon) -> None:
    mapping = [pb.IDMapping(host_id=300000, container_id=0, length=65536)]
    user = pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping)
    options = pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER, userns_options=user)
    pod = node.run_pod("userns", namespaces=options)
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    security = pb.LinuxContainerSecurityContext(namespace_options=options)
    script = "id -u; cat /proc/self/uid_map; stat -c %u /bin/busybox; touch /new && stat -c %u /new; sleep 100"
    container = node.run(pod, script, security=security, resources=resources)
    status = node.status(container)
    wait_for(lambda: len(node.log(status.log_path)) >= 4)
    assert [line.split() for line in node.log(status.log_path)] == [["0"], ["0", "300000", "65536"], ["0"], ["0"]]
    groups = Path("/sys/fs/cgroup/memory") / node.cgroup_parent[1:] / "userns" / container / "cgroup.procs"
    if groups.exists():
        pids = groups.read_text().split()
        assert pids
        assert {os.stat(f"/proc/{pid}").st_uid for pid in pids} == {300000}


def test_c_c20_sysctls_are_the_pods(make_node: MakeNode) -> None:
    node = make_node(bridge="rtsysctl")
    before = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    wanted = {"net.ipv4.tcp_syncookies": "0", "kernel.shm_rmid_forced": "1"}
    pod = node.run_pod("sysctl", sysctls=wanted)
    lines = node.output(
        pod, "cat /proc/sys/net/ipv4/tcp_syncookies /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start"
    )
    assert lines == ["0", "1", "0"]
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == before
    assert code(lambda: node.run_pod("evil", sysctls={"net.ipv4.no_such": "1"})) == grpc.StatusCode.FAILED_PRECONDITION
    node.remove_all()
    assert_clean(node)


def test_events_tell_the_whole_life_in_order(node: Daemon) -> None:
    seen: list[tuple[str, int]] = []
    stream = node.cri.GetContainerEvents(pb.GetEventsRequest())

    def collect() -> None:
        nonlocal seen
        try:
            for event in stream:  # one by one: the list is looked at meanwhile
                seen += [(event.container_id, event.container_event_type)]
        except grpc.RpcError:
            return

    thread = threading.Thread(target=collect)
    thread.start()
    while not seen:  # nothing says from when on the daemon listens
        node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=node.run_pod("before")))
    pod = node.run_pod("events")
    container = node.run(pod, "exit 0")
    node.wait_exit(container)
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    wait_for(lambda: (pod, 3) in seen)
    stream.cancel()  # type: ignore[no-untyped-call]
    thread.join()
    assert [kind for who, kind in seen if who == container] == [0, 1, 2, 3]
    assert [kind for who, kind in seen if who == pod] == [0, 1, 2, 3]


def test_lists_filter_and_stream_each_item_once(node: Daemon) -> None:
    pods = [node.run_pod(f"list-{n}", labels={"n": str(n % 2)}) for n in range(4)]
    odd = pb.PodSandboxFilter(label_selector={"n": "1"})
    assert {p.id for p in node.cri.ListPodSandbox(pb.ListPodSandboxRequest(filter=odd)).items} == {pods[1], pods[3]}
    streamed = [p.id for m in node.cri.StreamPodSandboxes(pb.StreamPodSandboxesRequest(filter=odd)) for p in m.pod_sandboxes]
    assert sorted(streamed) == sorted([pods[1], pods[3]])
    by_prefix = node.cri.ListPodSandbox(pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id=pods[0][:13]))).items
    assert [p.id for p in by_prefix] == [pods[0]]


def test_statistics(node: Daemon) -> None:
    pod = node.run_pod("stats")
    container = node.run(pod, "dd if=/dev/zero of=/file bs=1k count=64 2>/dev/null; echo written; i=0; while :; do i=$((i+1)); done")
    node.wait_line(container, "written")  # the size of a layer is measured once, and then for a while no more

    def statistics() -> pb.ContainerStats:
        return node.cri.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats

    wait_for(lambda: statistics().cpu.usage_core_nano_seconds.value > 10**8)
    wait_for(lambda: statistics().cpu.usage_nano_cores.value > 10**7)
    stats = statistics()
    assert stats.memory.working_set_bytes.value > 0
    assert stats.writable_layer.used_bytes.value >= 65536
    whole = node.cri.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod)).stats
    assert [c.attributes.id for c in whole.linux.containers] == [container]
    assert whole.linux.process.process_count.value >= 1
    listed = node.cri.ListContainerStats(pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(pod_sandbox_id=pod))).stats
    assert [s.attributes.id for s in listed] == [container]


def test_every_method_of_the_service_is_there(node: Daemon) -> None:
    for method in pb.DESCRIPTOR.services_by_name["RuntimeService"].methods:
        request = getattr(pb, method.input_type.name)()
        call = getattr(node.cri, method.name)
        refused = refusal(functools.partial(ask, call, request, method.server_streaming))
        expected = method.name in ("CheckpointPod", "RestorePod")
        assert (refused is grpc.StatusCode.UNIMPLEMENTED) == expected, (method.name, refused)
        assert refused not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), method.name


def ask(call: Callable[..., Any], request: object, streaming: bool) -> object:
    answer = call(request, timeout=2)
    return next(iter(answer), None) if streaming else answer


def refusal(call: Callable[[], object]) -> grpc.StatusCode | None:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return None


def test_the_exit_code_survives_the_monitor(node: Daemon) -> None:
    pod = node.run_pod("monitor")
    container = node.run(pod, "sleep 1; exit 6")
    monitor = int((node.directory / "s/containers" / container / "conmon.pid").read_text())
    os.kill(monitor, signal.SIGKILL)
    status = node.wait_exit(container)
    assert status.exit_code == 6
