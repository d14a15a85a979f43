"""NRI with plugins that speak the real protocol: what they are told, what they change, and what they cannot hold up."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.api import nri_pb2 as nri
from imgsvc.base.errors import FailedPrecondition
from tests.runtime.harness import TIMEOUT_S, Daemon, assert_clean, running
from tests.runtime.nriplugin import ScriptedPlugin, adjusted

pytestmark = pytest.mark.root

REQUEST_S: Final = 1.0
SLEEP: Final = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
ROOT: Final = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def node() -> Iterator[Daemon]:
    """A daemon to which plugins can connect, and that starts those of its directory's plugins/."""
    directory = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    directory.chmod(0o755)
    settings = {
        "socket_path": str(socket_of(directory)),
        "plugin_path": str(directory / "plugins"),
        "plugin_config_path": str(directory / "config"),
        "plugin_request_timeout": REQUEST_S,
    }
    daemon = {"handlers": {"default": {"path": "runc"}}, "nri": settings}
    with running(directory, daemon) as made:
        yield made
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_pods(node: Daemon) -> Iterator[None]:
    yield
    node.remove_all()
    assert_clean(node)


def socket_of(directory: Path) -> Path:
    return directory / "nri.sock"


def plugin_on(node: Daemon, name: str = "test", index: str = "10", **more: Any) -> ScriptedPlugin:
    return ScriptedPlugin(socket_of(node.directory), name, index, **more)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return str(caught.value.details())


def plugins_of(node: Daemon) -> list[str]:
    info = node.cri.Status(pb.StatusRequest(verbose=True), timeout=TIMEOUT_S).info["nri"]
    return [plugin["name"] for plugin in json.loads(info)["plugins"]]


def stop_and_remove(node: Daemon, pod: str) -> None:
    node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=TIMEOUT_S)


def shares(container: str, value: int, *, tolerant: bool = False) -> nri.ContainerUpdate:
    resources = nri.LinuxResources(cpu=nri.LinuxCPU(shares=nri.OptionalUInt64(value=value)))
    return nri.ContainerUpdate(container_id=container, linux=nri.LinuxContainerUpdate(resources=resources), ignore_failure=tolerant)


def test_every_event_comes_once_and_in_order(node: Daemon) -> None:
    with plugin_on(node) as plugin:
        assert plugins_of(node) == ["10-test"]
        pod = node.run_pod(labels={"l": "1"}, annotations={"a": "2"})
        container = node.run(pod, SLEEP, labels={"c": "3"})
        resources = pb.LinuxContainerResources(cpu_shares=512)
        node.cri.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=resources), timeout=TIMEOUT_S)
        node.cri.UpdatePodSandboxResources(pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=resources), timeout=TIMEOUT_S)
        stop_and_remove(node, pod)
        assert plugin.of(container) == [
            "CreateContainer",
            "ValidateContainerAdjustment",
            "PostCreateContainer",
            "StartContainer",
            "PostStartContainer",
            "UpdateContainer",
            "PostUpdateContainer",
            "StopContainer",
            "RemoveContainer",
        ]
        assert plugin.of(pod) == ["RunPodSandbox", "UpdatePodSandbox", "PostUpdatePodSandbox", "StopPodSandbox", "RemovePodSandbox"]
        told = plugin.last("RunPodSandbox").pod
        assert (told.name, told.namespace, told.uid, dict(told.labels), dict(told.annotations)) == (
            "pod",
            "tests",
            "uid-pod",
            {"l": "1"},
            {"a": "2"},
        )
        created = plugin.last("CreateContainer").container
        assert (created.name, created.pod_sandbox_id, created.labels["c"]) == ("main", pod, "3")
        assert created.args[0] == "sh"
        started = plugin.last("PostStartContainer").container
        assert started.state == nri.CONTAINER_RUNNING
        assert started.pid
        assert started.linux.cgroups_path
        assert plugin.last("UpdateContainer").linux_resources.cpu.shares.value == 512
        assert plugin.last("UpdatePodSandbox").linux_resources.cpu.shares.value == 512
        assert plugin.last("StopContainer").container.state == nri.CONTAINER_STOPPED


def test_a_container_that_ends_by_itself_is_told_of(node: Daemon) -> None:
    with plugin_on(node) as plugin:
        pod = node.run_pod()
        container = node.run(pod, "exit 3")
        plugin.wait_for(container, "StopContainer")
        assert plugin.last("StopContainer").container.exit_code == 3
        stop_and_remove(node, pod)
        assert plugin.of(container).count("StopContainer") == 1


def test_adjustments_of_several_plugins_reach_the_container(node: Daemon) -> None:
    """The second sees what the first has changed, and a validator who set what."""
    (node.directory / "source").mkdir()
    (node.directory / "source/file").write_text("mounted\n")
    mount = nri.Mount(destination="/data", type="bind", source=str(node.directory / "source"), options=["bind", "ro"])

    def first(request: nri.CreateContainerRequest) -> nri.CreateContainerResponse:
        return adjusted(
            env=[nri.KeyValue(key="ONE", value="1")],
            mounts=[mount],
            rlimits=[nri.POSIXRlimit(type="RLIMIT_NOFILE", hard=77, soft=66)],
            linux=nri.LinuxContainerAdjustment(
                oom_score_adj=nri.OptionalInt(value=500),
                devices=[nri.LinuxDevice(path="/dev/mine", type="c", major=1, minor=3)],
                resources=nri.LinuxResources(cpu=nri.LinuxCPU(shares=nri.OptionalUInt64(value=333))),
            ),
        )

    def second(request: nri.CreateContainerRequest) -> nri.CreateContainerResponse:
        assert "ONE=1" in request.container.env
        return adjusted(
            args=["sh", "-c", "echo $ONE; cat /data/file; ulimit -n; cat /proc/self/oom_score_adj; test -c /dev/mine && echo dev"]
        )

    rejecting = threading.Event()

    def validate(request: nri.ValidateContainerAdjustmentRequest) -> nri.ValidateContainerAdjustmentResponse:
        owners = request.owners.owners[request.container.id]
        assert owners.compound[nri.FIELD_ENV].owners["ONE"] == "10-first"
        assert owners.simple[nri.FIELD_ARGS] == "20-second"
        assert [f"{p.index}-{p.name}" for p in request.plugins] == ["10-first", "20-second", "30-validator"]
        assert request.adjust.args
        assert "ONE=1" not in request.container.env
        return nri.ValidateContainerAdjustmentResponse(reject=rejecting.is_set(), reason="not today")

    validator = plugin_on(node, "validator", "30", ValidateContainerAdjustment=validate)
    with validator, plugin_on(node, "second", "20", CreateContainer=second), plugin_on(node, "first", "10", CreateContainer=first):
        assert plugins_of(node) == ["10-first", "20-second", "30-validator"]
        pod = node.run_pod()
        container = node.run(pod, "echo not this")
        status = node.wait_exit(container)
        assert node.log(status.log_path) == ["1", "mounted", "66", "500", "dev"]
        assert status.resources.linux.cpu_shares == 333
        rejecting.set()
        assert "30-validator rejects what others change: not today" in refused(lambda: node.run(pod, "exit 0", "other"))
        stop_and_remove(node, pod)


def test_two_that_set_one_thing_are_named_and_nothing_stays(node: Daemon) -> None:
    def set_it(request: nri.CreateContainerRequest) -> nri.CreateContainerResponse:
        return adjusted(annotations={"k": "v"})

    with plugin_on(node, "a", "10", CreateContainer=set_it), plugin_on(node, "b", "20", CreateContainer=set_it) as second:
        pod = node.run_pod()
        message = refused(lambda: node.run(pod, "exit 0"))
        assert 'NRI plugins 10-a and 20-b both set annotations "k"' in message
        second.scripts.clear()
        node.wait_exit(node.run(pod, "exit 0"))
        stop_and_remove(node, pod)


def test_what_a_plugin_refuses_fails_leaves_nothing_and_can_be_tried_again(node: Daemon) -> None:
    def refuse(request: Any) -> None:
        raise FailedPrecondition("not now")

    with plugin_on(node) as plugin:
        plugin.scripts = {"RunPodSandbox": refuse}
        assert "NRI plugin 10-test refused RunPodSandbox: not now" in refused(node.run_pod)
        assert not node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
        plugin.scripts = {"CreateContainer": refuse}
        pod = node.run_pod()
        assert "NRI plugin 10-test refused CreateContainer: not now" in refused(lambda: node.run(pod, "exit 0"))
        assert not node.cri.ListContainers(pb.ListContainersRequest()).containers
        plugin.scripts = {}
        container = node.create(pod, node.container("exit 0"))
        plugin.scripts = {"StartContainer": refuse}
        assert "not now" in refused(lambda: node.start_container(container))
        status = node.status(container)
        assert (status.state, status.reason) == (pb.CONTAINER_EXITED, "StartError")
        assert plugin.of(container)[-1] == "StopContainer"
        plugin.scripts = dict.fromkeys(("StopPodSandbox", "RemovePodSandbox", "RemoveContainer"), refuse)


def test_a_pod_is_not_shown_while_plugins_are_asked(node: Daemon) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(request: Any) -> None:
        reached.set()
        go_on.wait(30)

    with plugin_on(node, RunPodSandbox=wait) as plugin, ThreadPoolExecutor(1) as pool:
        running_pod = pool.submit(node.run_pod)
        assert reached.wait(30)
        assert not node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
        sandbox = plugin.last("RunPodSandbox").pod.id
        assert "not ready" in refused(lambda: node.create(sandbox, node.container("exit 0")))
        go_on.set()
        assert running_pod.result(30) == sandbox


def test_plugins_change_containers_of_their_own_accord(node: Daemon) -> None:
    pod = node.run_pod()
    first, second = (node.run(pod, SLEEP, name) for name in ("first", "second"))

    def changed(container: str) -> int:
        return int(node.status(container).resources.linux.cpu_shares)

    def on_create(request: nri.CreateContainerRequest) -> nri.CreateContainerResponse:
        return nri.CreateContainerResponse(update=[shares(first, 222), shares("gone", 1, tolerant=True)])

    def on_update(request: nri.UpdateContainerRequest) -> nri.UpdateContainerResponse:
        return nri.UpdateContainerResponse(update=[shares(second, 444), shares(first, 555)])

    def on_synchronize(request: nri.SynchronizeRequest) -> nri.SynchronizeResponse:
        return nri.SynchronizeResponse(update=[shares(second, 111)])

    with plugin_on(node, Synchronize=on_synchronize, CreateContainer=on_create, UpdateContainer=on_update) as plugin:
        failed = plugin.update(shares(first, 333), shares("gone", 5)).failed
        assert [update.container_id for update in failed] == ["gone"]
        assert (changed(first), changed(second)) == (333, 111)
        third = node.run(pod, SLEEP, "third")
        assert changed(first) == 222
        request = pb.UpdateContainerResourcesRequest(container_id=second, linux=pb.LinuxContainerResources(cpu_shares=999, cpu_quota=50000))
        node.cri.UpdateContainerResources(request, timeout=TIMEOUT_S)
        assert (changed(first), changed(second)) == (555, 444)
        assert node.status(second).resources.linux.cpu_quota == 50000
        plugin.update(evict=(nri.ContainerEviction(container_id=third, reason="too loud"),))
        node.wait_exit(third)


def test_one_that_hangs_or_dies_is_dropped_and_pods_go_on(node: Daemon) -> None:
    hang = threading.Event()

    def wait(request: Any) -> None:
        hang.wait(60)

    dying: list[ScriptedPlugin] = []

    def die(request: Any) -> None:
        dying[0].die()
        hang.wait(60)

    calm = plugin_on(node, "calm", "30")
    with calm, plugin_on(node, "hanging", "10", CreateContainer=wait), plugin_on(node, "dying", "20", RunPodSandbox=die) as mortal:
        dying.append(mortal)
        begun = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            pods = list(pool.map(lambda n: node.run_pod(f"p{n}"), range(8)))
            containers = list(pool.map(lambda pod: node.run(pod, "exit 0"), pods))
        assert time.monotonic() - begun < 30  # eight times a plugin's time-out, and then some, would be more
        assert plugins_of(node) == ["30-calm"]
        for pod, container in zip(pods, containers, strict=True):
            assert node.wait_exit(container).exit_code == 0
            assert calm.of(pod)[0] == "RunPodSandbox"
        hang.set()
    log = (node.directory / "log").read_text()
    assert "NRI plugin 10-hanging is dropped: NRI plugin 10-hanging did not answer CreateContainer within 1 s" in log
    assert "NRI plugin 20-dying is dropped" in log


def test_one_that_joins_hears_of_everything_once(node: Daemon) -> None:
    """Containers that are made while it is told what there is are in that list, or it is asked about them; never both."""
    stop = threading.Event()
    pod = node.run_pod()

    def make(worker: int) -> list[str]:
        made: list[str] = []
        while not stop.is_set():
            made.append(node.create(pod, node.container("exit 0", f"c{worker}-{len(made)}")))
        return made

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(make, n) for n in range(3)]
        time.sleep(0.3)
        with plugin_on(node, Synchronize=lambda request: time.sleep(0.2)) as plugin:
            time.sleep(0.3)
            stop.set()
            made = [container for worker in workers for container in worker.result(60)]
            listed = [c.id for method, request in plugin.asked if method == "Synchronize" for c in request.containers]
            asked = [request.container.id for method, request in plugin.asked if method == "CreateContainer"]
            assert listed
            assert asked
            assert sorted(listed + asked) == sorted(made)
            assert [p.id for method, request in plugin.asked if method == "Synchronize" for p in request.pods] == [pod]


def test_plugins_that_are_installed_are_started_with_their_configuration(node: Daemon) -> None:
    node.stop()
    for name in ("plugins", "config"):
        (node.directory / name).mkdir()
    program = node.directory / "plugins/05-installed"
    program.write_text(f"#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m tests.runtime.nriplugin\n")
    (node.directory / "plugins/not-a-plugin").write_text("#!/bin/sh\n")
    for file in (node.directory / "plugins").iterdir():
        file.chmod(0o755)
    (node.directory / "config/installed.conf").write_text("by name")
    (node.directory / "config/05-installed.conf").write_text("by index and name")
    node.start()
    assert plugins_of(node) == ["05-installed"]
    assert node.output(node.run_pod(), "echo $FROM") == ["installed-by index and name"]
    shutil.rmtree(node.directory / "plugins")
    node.stop()
    node.start()


def test_what_is_no_plugin_is_let_go(node: Daemon) -> None:
    wrong = plugin_on(node, index="1")
    wrong.start()
    assert wrong.ended.wait(30)
    with plugin_on(node, "fine"):
        assert plugins_of(node) == ["10-fine"]
    assert '"1" is not an index of a plugin' in (node.directory / "log").read_text()


def test_plugins_of_before_nri_0_12_hear_by_state_change(node: Daemon) -> None:
    with plugin_on(node) as plugin:
        plugin.unknown = {"RunPodSandbox", "StartContainer"}
        pod = node.run_pod()
        node.run(pod, "exit 0")
        changes = [request.event for method, request in plugin.asked if method == "StateChange"]
        assert changes == [nri.EVENT_RUN_POD_SANDBOX, nri.EVENT_START_CONTAINER]
