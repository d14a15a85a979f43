"""The main job, end to end: pull an image through a mirror, run a pod with it, see it end, leave nothing behind."""

from __future__ import annotations

import json
import os
import time
from ipaddress import IPv4Address
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2
from tests.e2e.conftest import BUSYBOX
from tests.support import cri
from tests.support.daemon import RPC_TIMEOUT, Daemon

pytestmark = pytest.mark.root

SCRIPT = "echo to stdout; echo to stderr >&2; ip -4 addr show dev eth0; readlink /proc/self/ns/net; hostname; exit 3"


def snapshots(daemon: Daemon) -> set[str]:
    # What is in the trash is removed already, and deleted in the background.
    return {str(p) for p in (daemon.root / "snapshots").glob("*/*/*") if p.parent.name != "trash"}


def test_pull_run_see_it_exit_and_leave_nothing(daemon: Daemon, busybox: str) -> None:
    runtime, images = daemon.runtime(), daemon.images()
    assert cri.pull(images, "busybox") == busybox
    image = cri.image_status(images, BUSYBOX)
    assert image
    assert (image.id, list(image.repo_tags)) == (busybox, [BUSYBOX])
    before = snapshots(daemon)
    assert daemon.leftovers() == []

    pod = cri.pod_config(daemon)
    sandbox = cri.run_pod(runtime, pod)
    seen = cri.pod_status(runtime, sandbox)
    assert seen.state == cri_pb2.SANDBOX_READY
    assert daemon.network
    assert IPv4Address(seen.network.ip) in daemon.network.subnet
    assert (seen.metadata, seen.labels, seen.annotations) == (pod.metadata, pod.labels, pod.annotations)

    began = time.time_ns()
    config = cri.container_config(BUSYBOX, ["sh", "-c", SCRIPT])
    container = cri.create(runtime, sandbox, config, pod)
    assert cri.status(runtime, container).state == cri_pb2.CONTAINER_CREATED
    cri.start(runtime, container)
    ended = cri.wait_for_exit(runtime, container)
    assert ended.exit_code == 3
    assert began < ended.created_at <= ended.started_at <= ended.finished_at <= time.time_ns()
    assert ended.reason == "Error"
    assert (ended.image_id, ended.image.image) == (busybox, BUSYBOX)
    assert (ended.metadata, ended.labels) == (config.metadata, config.labels)

    log = cri.read_log(Path(ended.log_path))
    assert [line.text for line in log if line.stream == "stderr"] == ["to stderr"]
    out = [line.text for line in log if line.stream == "stdout"]
    assert out[0] == "to stdout"
    assert out[-1] == "pod"
    assert any(f"inet {seen.network.ip}/" in line for line in out), out
    assert f"net:[{os.stat('/proc/self/ns/net').st_ino}]" not in out
    assert all(line.tag == "F" and line.time.utcoffset() is not None for line in log)

    cri.stop(runtime, container)
    cri.remove(runtime, container)
    assert snapshots(daemon) == before
    cri.stop_pod(runtime, sandbox)
    assert cri.pod_status(runtime, sandbox).state == cri_pb2.SANDBOX_NOTREADY
    cri.remove_pod(runtime, sandbox)
    assert daemon.leftovers() == []
    assert cri.refusal(lambda: cri.pod_status(runtime, sandbox))[0] == grpc.StatusCode.NOT_FOUND


def test_what_the_node_can_do_is_told(daemon: Daemon) -> None:
    runtime = daemon.runtime()
    version = runtime.Version(cri_pb2.VersionRequest(), timeout=RPC_TIMEOUT)
    assert (version.runtime_name, version.runtime_api_version) == ("imgsvc", "v1")
    status = runtime.Status(cri_pb2.StatusRequest(verbose=True), timeout=RPC_TIMEOUT)
    assert {(c.type, c.status) for c in status.status.conditions} == {
        (kind, True) for kind in ("RuntimeReady", "NetworkReady", "ConfigurationHasNoWarnings")
    }
    info = {name: json.loads(value) for name, value in status.info.items()}
    assert info["configuration"]["images.sync"] == {"value": "full", "origin": "default"}
    assert (info["warnings"], info["store"]["lastEnd"], info["store"]["recovered"]) == ([], "clean", [])
    assert 0 < info["store"]["metadataBytes"] < info["store"]["metadataLimit"]
    config = runtime.RuntimeConfig(cri_pb2.RuntimeConfigRequest(), timeout=RPC_TIMEOUT)
    assert config.linux.cgroup_driver == cri_pb2.CGROUPFS
    update = cri_pb2.RuntimeConfig(network_config=cri_pb2.NetworkConfig(pod_cidr="10.1.0.0/24"))
    runtime.UpdateRuntimeConfig(cri_pb2.UpdateRuntimeConfigRequest(runtime_config=update), timeout=RPC_TIMEOUT)


def test_lists_and_filters(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pods = {name: cri.pod_config(pod_daemon, name) for name in ("one", "two")}
    sandboxes = {name: cri.run_pod(runtime, config) for name, config in pods.items()}
    containers = {}
    for name, config in pods.items():
        containers[name] = cri.create(runtime, sandboxes[name], cri.container_config(BUSYBOX, ["sleep", "600"], name), config)
    cri.start(runtime, containers["one"])

    def listed(**wanted: object) -> set[str]:
        request = cri_pb2.ListContainersRequest(filter=cri_pb2.ContainerFilter(**wanted))  # type: ignore[arg-type]
        return {c.id for c in runtime.ListContainers(request, timeout=RPC_TIMEOUT).containers}

    def listed_pods(**wanted: object) -> set[str]:
        request = cri_pb2.ListPodSandboxRequest(filter=cri_pb2.PodSandboxFilter(**wanted))  # type: ignore[arg-type]
        return {p.id for p in runtime.ListPodSandbox(request, timeout=RPC_TIMEOUT).items}

    assert listed() == set(containers.values())
    assert listed(pod_sandbox_id=sandboxes["one"]) == {containers["one"]}
    assert listed(id=containers["two"]) == {containers["two"]}
    assert listed(id=containers["two"][:12]) == {containers["two"]}
    assert listed(label_selector={"container": "two"}) == {containers["two"]}
    assert listed(label_selector={"container": "two", "other": "x"}) == set()
    assert listed(state=cri_pb2.ContainerStateValue(state=cri_pb2.CONTAINER_RUNNING)) == {containers["one"]}
    assert listed(id="0" * 64) == set()
    assert listed_pods() == set(sandboxes.values())
    assert listed_pods(label_selector={"app": "two"}) == {sandboxes["two"]}
    cri.stop_pod(runtime, sandboxes["one"])
    assert listed_pods(state=cri_pb2.PodSandboxStateValue(state=cri_pb2.SANDBOX_READY)) == {sandboxes["two"]}
    assert cri.status(runtime, containers["one"]).state == cri_pb2.CONTAINER_EXITED


def test_a_graceful_stop_lets_the_container_finish(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)
    polite = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done"
    deaf = "trap '' TERM; echo up; while :; do sleep 0.1; done"
    made = {
        name: cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sh", "-c", script], name), pod)
        for name, script in (("polite", polite), ("deaf", deaf))
    }
    for container in made.values():
        cri.start(runtime, container)
        wait_for_line(Path(cri.status(runtime, container).log_path), "up")
    cri.stop(runtime, made["polite"], timeout=20)
    assert cri.status(runtime, made["polite"]).exit_code == 7
    assert [line.text for line in cri.read_log(Path(cri.status(runtime, made["polite"]).log_path))] == ["up", "bye"]
    began = time.monotonic()
    cri.stop(runtime, made["deaf"], timeout=1)
    assert 1 <= time.monotonic() - began < 60
    assert cri.status(runtime, made["deaf"]).exit_code == 137


def wait_for_line(path: Path, text: str) -> None:
    deadline = time.monotonic() + cri.WAIT
    while not (path.exists() and text in [line.text for line in cri.read_log(path)]):
        assert time.monotonic() < deadline, f"no line {text!r} in {path}"
        time.sleep(0.05)


def test_removing_a_pod_takes_its_running_containers_along(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)
    running, created = (
        cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sleep", "600"], name), pod) for name in ("running", "created")
    )
    cri.start(runtime, running)
    cri.remove_pod(runtime, sandbox)
    assert pod_daemon.leftovers() == []
    assert cri.refusal(lambda: cri.status(runtime, running))[0] == grpc.StatusCode.NOT_FOUND
    assert cri.refusal(lambda: cri.status(runtime, created))[0] == grpc.StatusCode.NOT_FOUND


def test_pods_reach_one_another_and_have_their_own_loopback(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    server, client = cri.pod_config(pod_daemon, "server"), cri.pod_config(pod_daemon, "client")
    server_pod, client_pod = cri.run_pod(runtime, server), cri.run_pod(runtime, client)
    address = cri.pod_status(runtime, server_pod).network.ip
    serve = "echo listening; echo hello | nc -l -p 8080"
    listening = cri.create(runtime, server_pod, cri.container_config(BUSYBOX, ["sh", "-c", serve], "server"), server)
    cri.start(runtime, listening)
    wait_for_line(Path(cri.status(runtime, listening).log_path), "listening")
    ask = f"nc -w 5 127.0.0.1 8080 || echo nobody on loopback; nc -w 5 {address} 8080 </dev/null"
    asking = cri.create(runtime, client_pod, cri.container_config(BUSYBOX, ["sh", "-c", ask], "client"), client)
    cri.start(runtime, asking)
    log = cri.read_log(Path(cri.wait_for_exit(runtime, asking).log_path))
    assert [line.text for line in log if line.stream == "stdout"] == ["nobody on loopback", "hello"]
