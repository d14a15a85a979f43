"""C-C26: calls the kubelet repeats succeed when there is nothing left to do; unknown IDs are NotFound."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from imgsvc.api import cri_pb2
from imgsvc.api.cri_pb2_grpc import RuntimeServiceStub
from tests.e2e.conftest import BUSYBOX
from tests.support import cri
from tests.support.daemon import RPC_TIMEOUT, Daemon

pytestmark = pytest.mark.root

UNKNOWN = "f" * 64


def test_c_c26_stop_and_remove_of_what_is_gone_succeed(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sleep", "600"]), pod)
    cri.start(runtime, container)
    for call, target in ((cri.stop, container), (cri.remove, container), (cri.stop_pod, sandbox), (cri.remove_pod, sandbox)):
        call(runtime, target)
        call(runtime, target)
        call(runtime, UNKNOWN)
    cri.stop(runtime, container)
    cri.stop_pod(runtime, sandbox)


def test_c_c26_remove_forces_a_running_container(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sleep", "600"]), pod)
    cri.start(runtime, container)
    cri.remove(runtime, container)
    assert not runtime.ListContainers(cri_pb2.ListContainersRequest(), timeout=RPC_TIMEOUT).containers


def test_c_c26_many_at_once_do_it_once(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sleep", "600"]), pod)
    cri.start(runtime, container)
    stops = [runtime.StopContainer.future(cri_pb2.StopContainerRequest(container_id=container), timeout=RPC_TIMEOUT) for _ in range(50)]
    removes = [
        runtime.RemovePodSandbox.future(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=RPC_TIMEOUT) for _ in range(50)
    ]
    for stop in stops:
        stop.result()
    for remove in removes:
        remove.result()
    assert pod_daemon.leftovers() == []


def test_c_c26_one_pod_per_name_and_attempt(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    first = cri.run_pod(runtime, pod)
    code, text = cri.refusal(lambda: cri.run_pod(runtime, pod))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert first in text
    again = cri.pod_config(pod_daemon)
    again.metadata.attempt = 1
    assert cri.run_pod(runtime, again) != first


CALLS: dict[str, Callable[[RuntimeServiceStub], object]] = {
    "PodSandboxStatus": lambda r: cri.pod_status(r, UNKNOWN),
    "ContainerStatus": lambda r: cri.status(r, UNKNOWN),
    "StartContainer": lambda r: cri.start(r, UNKNOWN),
    "CreateContainer": lambda r: cri.create(r, UNKNOWN, cri.container_config(BUSYBOX, ["true"]), cri_pb2.PodSandboxConfig()),
}


@pytest.mark.parametrize("name", CALLS)
def test_c_c26_unknown_ids_are_not_found(pod_daemon: Daemon, name: str) -> None:
    code, text = cri.refusal(lambda: CALLS[name](pod_daemon.runtime()))
    assert code == grpc.StatusCode.NOT_FOUND
    assert UNKNOWN in text


def test_what_cannot_work_is_refused_and_rolled_back(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)

    def refused(config: cri_pb2.ContainerConfig) -> grpc.StatusCode:
        return cri.refusal(lambda: cri.create(runtime, sandbox, config, pod))[0]

    assert refused(cri.container_config("docker.io/library/absent:1", ["true"])) == grpc.StatusCode.NOT_FOUND
    assert refused(cri.container_config(BUSYBOX, ["true"], name="")) == grpc.StatusCode.INVALID_ARGUMENT
    missing = cri.container_config(BUSYBOX, ["/no/such/program"], "missing")
    code, text = cri.refusal(lambda: cri.start(runtime, cri.create(runtime, sandbox, missing, pod)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "/no/such/program" in text
    (left,) = runtime.ListContainers(cri_pb2.ListContainersRequest(), timeout=RPC_TIMEOUT).containers  # it failed at its start
    assert (left.metadata.name, left.state) == ("missing", cri_pb2.CONTAINER_EXITED)
    cri.remove_pod(runtime, sandbox)
    assert pod_daemon.leftovers() == []
