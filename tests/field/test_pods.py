"""Pods and containers: cancelled calls, failing watchers, failing undo."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.base import procfs
from imgsvc.base.metadb.database import MetaDB
from imgsvc.runtime import host
from imgsvc.runtime.numbers.metrics import Metrics
from imgsvc.runtime.numbers.stats import Stats
from imgsvc.runtime.paths import Paths
from imgsvc.runtime.processes.exits import alive, start_time
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord
from imgsvc.runtime.settings import RuntimeSettings
from tests.runtime.harness import TIMEOUT_S, Daemon, assert_clean, wait_for

pytestmark = [pytest.mark.root, pytest.mark.compat]

MakeNode = Callable[..., Daemon]

# Says no to ADD, and to DEL for as long as the file `stuck` is there.
REFUSING_PLUGIN = """#!/bin/sh
[ "$CNI_COMMAND" = DEL ] && [ ! -e {directory}/stuck ] && exit 0
[ "$CNI_COMMAND" = ADD ] || [ "$CNI_COMMAND" = DEL ] || exit 0
echo '{{"cniVersion": "1.0.0", "code": 100, "msg": "the reason of '$CNI_COMMAND'"}}'
exit 1
"""

# A DEL that lasts until the file `go` is there.
SLOW_PLUGIN = """#!/bin/sh
[ "$CNI_COMMAND" = DEL ] && until [ -e {directory}/go ]; do sleep 0.1; done
[ "$CNI_COMMAND" = ADD ] && echo '{{"cniVersion": "1.0.0", "ips": []}}'
exit 0
"""


def test_R1_a_cancelled_run_of_a_pod_leaves_nothing(make_node: MakeNode) -> None:
    node = make_node(bridge="imgsvcR1", failpoint="sandbox.namespaces=delay:3; sandbox.network=delay:3")

    def run(number: int) -> grpc.StatusCode:
        request = pb.RunPodSandboxRequest(config=node.pod(f"pod{number}"))
        return node.cri.RunPodSandbox.future(request, timeout=0.005 + number * 0.004).code()

    with ThreadPoolExecutor(8) as pool:
        codes = set(pool.map(run, range(100)))
    assert grpc.StatusCode.DEADLINE_EXCEEDED in codes
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
    node.remove_all()
    assert_clean(node)


def test_R1_a_cancelled_start_of_a_container_leaves_nothing_running(make_node: MakeNode) -> None:
    node = make_node(failpoint="container.started=delay:60000*1")
    container = node.create(node.run_pod(), node.container("sleep 100"))
    with pytest.raises(grpc.RpcError):
        node.cri.StartContainer(pb.StartContainerRequest(container_id=container), timeout=2)
    assert node.wait_exit(container).reason == "StartError"
    node.remove_all()
    assert_clean(node)


def test_R5_a_failed_attachment_is_told_with_its_own_cause(make_node: MakeNode, directory: Path) -> None:
    (directory / "bin").mkdir()
    plugin = directory / "bin/refusing"
    plugin.write_text(REFUSING_PLUGIN.format(directory=directory))
    plugin.chmod(0o755)
    (directory / "cni.d").mkdir()
    network = {"cniVersion": "1.0.0", "name": "refusing", "plugins": [{"type": "refusing"}]}
    (directory / "cni.d/10.conflist").write_text(json.dumps(network))
    (directory / "stuck").touch()
    node = make_node({"cni": {"bin_dirs": [str(directory / "bin")]}})
    options = pb.NamespaceOption(network=pb.NamespaceMode.POD)
    with pytest.raises(grpc.RpcError) as caught:
        node.run_pod(namespaces=options)
    assert "the reason of ADD" in str(caught.value.details())
    assert "the reason of DEL" in (node.directory / "log").read_text()
    # What is left of it is seen, and goes when the plugin lets it.
    (left,) = node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert left.state == pb.PodSandboxState.SANDBOX_NOTREADY
    (directory / "stuck").unlink()
    node.remove_all()
    assert_clean(node)
    with pytest.raises(grpc.RpcError):
        node.run_pod(namespaces=options)
    assert_clean(node)
    assert not node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items


def test_R2_a_watcher_that_fails_goes_on(make_node: MakeNode) -> None:
    node = make_node(failpoint="watch.container=error:EMFILE*6; watch.pod=error:EMFILE*2")
    shared = pb.NamespaceOption(network=pb.NamespaceMode.NODE)  # a PID namespace that a process holds
    pod = node.run_pod(namespaces=shared)
    stubborn = node.run(pod, "trap '' TERM; echo ready; while true; do sleep 1; done", "stubborn")
    brief = node.run(pod, "exit 3", "brief")
    node.wait_line(stubborn, "ready")
    node.cri.StopContainer(pb.StopContainerRequest(container_id=stubborn, timeout=1), timeout=TIMEOUT_S)
    assert node.status(stubborn).exit_code == 137  # it was still there after its second, and was killed
    assert node.wait_exit(brief).exit_code == 3
    info = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info["info"]
    os.kill(json.loads(info)["pid"], signal.SIGKILL)
    wait_for(lambda: node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.state == pb.SANDBOX_NOTREADY)
    assert "waiting for the end of container" in (node.directory / "log").read_text()


def test_R2_no_free_descriptor_does_not_mean_that_a_process_is_gone() -> None:
    sleeper = subprocess.Popen(["sleep", "100"])
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        started = start_time(sleeper.pid)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                alive(sleeper.pid, started)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert alive(sleeper.pid, started)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not alive(sleeper.pid, started)


class LoopRecords(Records):
    """Records that refuse threads."""

    _owner = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("sandboxes", "containers", "containers_of"):
            assert threading.get_ident() == object.__getattribute__(self, "_owner")
        return super().__getattribute__(name)


def test_R9_statistics_are_read_from_what_the_loop_handed_over(tmp_path: Path) -> None:
    async def scenario(database: MetaDB) -> None:
        records = LoopRecords(database)
        records._owner = threading.get_ident()
        images = SimpleNamespace(root_usage=lambda _: asyncio.sleep(0, (1, 1)))
        core: Any = SimpleNamespace(
            records=records,
            host=host.look(),
            paths=Paths(tmp_path, tmp_path),
            images=images,
            handlers={},
            find_runtime=lambda _: None,
            settings=RuntimeSettings(tmp_path, tmp_path, {}),
        )
        records.put_sandbox(pod := SandboxRecord("pod", started_at=1, holder="namespaces"))
        records.put_container(ContainerRecord("container", "pod", started_at=1, pid=os.getpid()))
        stats = Stats(core)
        (told,) = await stats.sandboxes([pod])
        assert [c.attributes.id for c in told.linux.containers] == ["container"]
        (metrics,) = await Metrics(core, stats).sandboxes([pod])
        assert [c.container_id for c in metrics.container_metrics] == ["container"]

    database = MetaDB(tmp_path / "db")
    asyncio.run(scenario(database))
    database.close()


@pytest.mark.parametrize(
    "handlers", [{"default": {"path": "runc"}}, {"default": {"path": "runc"}, "special": {"path": "false"}}], ids=["gone", "broken"]
)
def test_R8_pods_of_a_handler_that_has_left_the_configuration_can_be_removed(make_node: MakeNode, handlers: dict[str, Any]) -> None:
    node = make_node({"handlers": {"default": {"path": "runc"}, "special": {"path": "runc"}}})
    shared = pb.NamespaceOption(network=pb.NamespaceMode.NODE)
    request = pb.RunPodSandboxRequest(config=node.pod(namespaces=shared), runtime_handler="special")
    pod = node.cri.RunPodSandbox(request, timeout=TIMEOUT_S).pod_sandbox_id
    container = node.run(pod, "trap 'exit 4' TERM; echo ready; while true; do sleep 0.1; done")
    node.wait_line(container, "ready")
    node.kill()
    node.extra["handlers"] = handlers
    node.start()
    assert node.exec(container, "echo", "still here").stdout == b"still here\n"
    with pytest.raises(grpc.RpcError):
        node.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=node.pod("new"), runtime_handler="special"), timeout=TIMEOUT_S)
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=30), timeout=TIMEOUT_S)
    assert node.status(container).exit_code == 4
    node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    node.remove_all()
    assert_clean(node)


def test_K8_looking_at_what_is_not_there_is_no_warning(make_node: MakeNode) -> None:
    node = make_node()
    looks: list[Callable[[], object]] = [
        lambda: node.cri.PodSandboxStats(pb.PodSandboxStatsRequest()),
        lambda: node.cri.ContainerStatus(pb.ContainerStatusRequest(container_id="gone")),
    ]
    for look in looks:
        with pytest.raises(grpc.RpcError) as caught:
            look()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError):
        node.cri.StartContainer(pb.StartContainerRequest(container_id="gone"))
    told = (node.directory / "log").read_text()
    assert "PodSandboxStats" not in told
    assert "ContainerStatus" not in told
    assert "StartContainer: NOT_FOUND" in told


def test_K7_a_listener_hears_what_happened_before_it_listened(make_node: MakeNode) -> None:
    node = make_node(failpoint="container.root=delay:500@2")
    pod = node.run_pod()
    first = node.create(pod, node.container("exit 0", "first"))
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(node.create, pod, node.container("exit 0", "second"))
        wait_for(lambda: len(list((node.directory / "s/containers").iterdir())) == 2)
        node.start_container(first)
        second = making.result()
    node.wait_exit(first)

    def hear(number: int) -> list[pb.ContainerEventResponse]:
        stream = node.cri.GetContainerEvents(pb.GetEventsRequest(), timeout=TIMEOUT_S)
        heard = list(itertools.islice(stream, number))
        stream.cancel()  # type: ignore[no-untyped-call]
        return heard

    heard = hear(6)
    types = {
        identifier: [int(e.container_event_type) for e in heard if e.container_id == identifier] for identifier in (pod, first, second)
    }
    assert types == {pod: [0, 1], first: [0, 1, 2], second: [0]}
    # The container that was being made then was not yet one of the pod's.
    started = next(e for e in heard if e.container_id == first and e.container_event_type == pb.CONTAINER_STARTED_EVENT)
    assert [status.id for status in started.containers_statuses] == [first]
    node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=first), timeout=TIMEOUT_S)
    assert [(e.container_id, e.container_event_type) for e in hear(1)] == [(first, pb.CONTAINER_DELETED_EVENT)]


def test_S12_lost_pods_are_cleaned_up_beside_serving(make_node: MakeNode, directory: Path) -> None:
    (directory / "bin").mkdir()
    plugin = directory / "bin/slow"
    plugin.write_text(SLOW_PLUGIN.format(directory=directory))
    plugin.chmod(0o755)
    (directory / "cni.d").mkdir()
    network = {"cniVersion": "1.0.0", "name": "slow", "plugins": [{"type": "slow"}]}
    (directory / "cni.d/10.conflist").write_text(json.dumps(network))
    node = make_node({"cni": {"bin_dirs": [str(directory / "bin")]}})
    pod = node.run_pod(namespaces=pb.NamespaceOption())  # a PID namespace that a process holds
    info = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info["info"]
    node.kill()
    os.kill(json.loads(info)["pid"], signal.SIGKILL)
    node.start()  # although the network does not let go of the pod
    (lost,) = node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert lost.state == pb.PodSandboxState.SANDBOX_NOTREADY
    (directory / "go").touch()
    wait_for(lambda: not node.leftovers())
    node.remove_all()
    assert_clean(node)


def test_S12_a_container_whose_state_was_wiped_can_be_stopped(make_node: MakeNode) -> None:
    node = make_node()
    pod = node.run_pod()
    container = node.run(pod, "sleep 1000")
    info = node.cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container, verbose=True)).info["info"]
    pid = json.loads(info)["pid"]
    node.kill()
    state = os.fsencode(node.directory / "s")
    for point in [m.point for m in procfs.mounts() if procfs.is_within(m.point, state)]:
        subprocess.run(["umount", "-l", point], check=True)
    shutil.rmtree(node.directory / "s")
    node.start()
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1), timeout=TIMEOUT_S)
    assert not start_time(pid)
    node.remove_all()
    assert_clean(node)


def test_R8_pods_of_a_runtime_that_was_uninstalled_can_be_removed(make_node: MakeNode, directory: Path) -> None:
    program = directory / "runc"
    shutil.copy(shutil.which("runc") or "runc", program)
    node = make_node({"handlers": {"default": {"path": str(program)}}})
    container = node.run(node.run_pod(namespaces=pb.NamespaceOption(network=pb.NamespaceMode.NODE)), "sleep 1000")
    node.kill()
    program.unlink()
    node.extra["handlers"] = {"default": {"path": "runc"}}
    node.start()
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=30), timeout=TIMEOUT_S)
    assert node.status(container).exit_code == 137
    node.remove_all()
    assert_clean(node)
