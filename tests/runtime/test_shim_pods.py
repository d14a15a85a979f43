"""Pods that a shim makes itself, by the sandbox API; podshim.py is the shim."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2

from imgsvc.api import cgroups_v1_pb2, cgroups_v2_pb2
from imgsvc.api import cri_pb2 as pb
from imgsvc.runtime.handlers.shim.figures import usage_of
from tests.runtime.harness import Daemon, assert_clean, wait_for
from tests.runtime.podshim import CPU_US, MEMORY
from tests.runtime.test_life import MakeNode

root = pytest.mark.root
ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_shim_node(make_node: MakeNode, directory: Path) -> Callable[..., Daemon]:
    """A daemon whose handler starts podshim.py. plain: without a sandbox API."""

    def make(*, plain: bool = False, bridge: str = "") -> Daemon:
        program = directory / "podshim"
        variable = "PODSHIM_PLAIN=1 " if plain else ""
        program.write_text(f'#!/bin/sh\n{variable}PYTHONPATH={ROOT} exec {sys.executable} -m tests.runtime.podshim "$@"\n')
        program.chmod(0o755)
        fields = {"type": "io.containerd.podshim.v1", "path": str(program), "sandboxer": "shim", "pod_annotations": ["test.podshim/*"]}
        return make_node({"handlers": {"default": fields}}, bridge=bridge)

    return make


def calls(node: Daemon) -> list[dict[str, Any]]:
    """What the shims were asked, in order."""
    path = node.directory / "s/shim.journal"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def methods(node: Daemon) -> list[str]:
    return [call["method"] for call in calls(node)]


def verbose(node: Daemon, pod: str) -> Any:
    info = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info["info"]
    return json.loads(info)


def ready(node: Daemon, pod: str) -> bool:
    return node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.state == pb.SANDBOX_READY


def features(node: Daemon) -> tuple[bool, bool]:
    """Recursive read-only mounts and user namespaces, as the handler's shim says."""
    found = next(h for h in node.cri.Status(pb.StatusRequest()).runtime_handlers if h.name == "default").features
    return found.recursive_read_only_mounts, found.user_namespaces


@root
def test_a_pod_that_its_shim_makes(make_shim_node: Callable[..., Daemon]) -> None:
    node = make_shim_node(bridge="rtpods")
    assert features(node) == (True, True)
    pod = node.run_pod("pod", annotations={"test.podshim/x": "y", "io.kata/secret": "no"})
    wait_for(lambda: methods(node) == ["CreateSandbox", "Platform", "StartSandbox", "PingSandbox", "WaitSandbox"])
    create = calls(node)[0]
    assert create["netns_path"] == str(node.directory / f"s/sandboxes/{pod}/ns/net")
    assert create["annotations"]["test.podshim/x"] == "y"
    assert create["annotations"]["io.kubernetes.cri.sandbox-id"] == pod
    assert "io.kata/secret" not in create["annotations"]
    address = node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.network.ip
    assert any(address in line for line in node.output(pod, "ip -4 -o addr show eth0"))
    shown = verbose(node, pod)
    assert shown["shim"] == {"pid": shown["pid"], "state": "SANDBOX_READY", "info": {"kind": "test"}}
    stats = node.cri.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod)).stats.linux
    assert (stats.memory.usage_bytes.value, stats.cpu.usage_core_nano_seconds.value) == (MEMORY, CPU_US * 1000)
    status = node.wait_exit(node.run(pod, "echo in; exit 7", "second"))
    assert (status.exit_code, node.log(status.log_path)) == (7, ["in"])
    assert "Shutdown" not in methods(node)
    node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    assert methods(node)[-2:] == ["StopSandbox", "ShutdownSandbox"]
    node.remove_all()
    assert_clean(node)


@root
def test_the_daemon_may_die_and_the_pod_stays(make_shim_node: Callable[..., Daemon]) -> None:
    node = make_shim_node()
    pod = node.run_pod("pod")
    short = node.run(pod, "sleep 0.3; exit 4", "short")
    node.run(pod, "sleep 100", "long")
    node.kill()
    node.start()
    assert node.wait_exit(short).exit_code == 4
    assert ready(node, pod)
    assert node.output(pod, "echo again") == ["again"]
    os.killpg(verbose(node, pod)["pid"], signal.SIGKILL)
    wait_for(lambda: not ready(node, pod))
    with pytest.raises(grpc.RpcError) as caught:
        node.create(pod, node.container("true"))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    node.remove_all()
    assert_clean(node)


@root
@pytest.mark.parametrize("restart", [False, True])
def test_a_shim_that_dies_takes_its_pod_along(make_shim_node: Callable[..., Daemon], *, restart: bool) -> None:
    node = make_shim_node()
    pod = node.run_pod("pod")
    container = node.run(pod, "sleep 100")
    (server,) = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _serves(p, node)]
    if restart:
        node.kill()
    os.kill(server, signal.SIGKILL)
    if restart:
        node.start()
    wait_for(lambda: not ready(node, pod))
    assert node.wait_exit(container).exit_code == 137
    node.remove_all()
    assert "delete" in methods(node)
    assert_clean(node)


def _serves(process: Path, node: Daemon) -> bool:
    try:
        words = (process / "cmdline").read_text().split("\0")
    except OSError:
        return False
    return "serve" in words and str(node.directory / "s") in words


@root
@pytest.mark.parametrize(
    "annotations",
    [{"test.podshim/fail": "CreateSandbox"}, {"test.podshim/fail": "StartSandbox"}, {"test.podshim/os": "windows"}],
    ids=["create", "start", "platform"],
)
def test_nothing_stays_of_a_pod_that_the_shim_refuses(make_shim_node: Callable[..., Daemon], annotations: dict[str, str]) -> None:
    node = make_shim_node(bridge="rtpodf")
    with pytest.raises(grpc.RpcError) as caught:
        node.run_pod("pod", annotations=annotations)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "fails, as asked" in (caught.value.details() or "") or "windows" in (caught.value.details() or "")
    assert_clean(node)


@root
def test_a_pod_is_shut_down_even_if_it_does_not_stop(make_shim_node: Callable[..., Daemon]) -> None:
    node = make_shim_node()
    node.run_pod("pod", annotations={"test.podshim/fail": "StopSandbox"})
    node.remove_all()
    assert methods(node)[-1] == "ShutdownSandbox"
    assert_clean(node)


@root
def test_a_shim_without_a_sandbox_api_gets_a_sandbox_container(make_shim_node: Callable[..., Daemon]) -> None:
    node = make_shim_node(plain=True)
    assert features(node) == (False, False)
    pod = node.run_pod("pod")
    assert node.output(pod, "echo plain") == ["plain"]
    assert [(call["id"] == pod) for call in calls(node) if call["method"] == "Create"] == [True, False]
    assert "shim" not in verbose(node, pod)
    node.remove_all()
    assert_clean(node)


@root
def test_an_oci_runtime_is_no_sandboxer(make_node: MakeNode) -> None:
    node = make_node({"handlers": {"default": {"path": "runc"}, "wrong": {"path": "runc", "sandboxer": "shim"}}})
    with pytest.raises(grpc.RpcError) as caught:
        node.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=node.pod(), runtime_handler="wrong"))
    assert "needs a shim" in (caught.value.details() or "")


@root
def test_a_pod_without_its_pause_process_is_not_ready(make_node: MakeNode) -> None:
    node = make_node()
    shared = pb.NamespaceOption(network=pb.NODE)
    pod = node.run_pod("pod", namespaces=shared)
    container = node.run(pod, "sleep 100", security=pb.LinuxContainerSecurityContext(namespace_options=shared))
    os.kill(verbose(node, pod)["pid"], signal.SIGKILL)
    wait_for(lambda: not ready(node, pod))
    assert node.wait_exit(container).exit_code == 137
    node.remove_all()
    assert_clean(node)


def test_the_numbers_of_a_shim() -> None:
    v1 = cgroups_v1_pb2.Metrics()
    v1.memory.usage.usage, v1.memory.usage.limit, v1.memory.total_inactive_file, v1.memory.total_pg_fault = 100, 1 << 62, 30, 5
    v1.cpu.usage.total = 7
    look = usage_of(any_pb2.Any(type_url="io.containerd.cgroups.v1.Metrics", value=v1.SerializeToString()))
    assert look
    assert (look.cpu, look.working_set, look.limit, look.line("total_pgfault")) == (7, 70, 0, 5)
    v2 = cgroups_v2_pb2.Metrics()
    v2.memory.usage, v2.memory.anon, v2.memory.usage_limit, v2.pids.current, v2.cpu.usage_usec = 100, 40, 500, 3, 2
    look = usage_of(any_pb2.Any(type_url="type.test/io.containerd.cgroups.v2.Metrics", value=v2.SerializeToString()))
    assert look
    assert (look.cpu, look.rss, look.available, look.pids) == (2000, 40, 400, 3)
    assert usage_of(any_pb2.Any(type_url="io.containerd.cgroups.v2.Metrics", value=b"\xff")) is None
    assert usage_of(any_pb2.Any(type_url="io.other", value=v2.SerializeToString())) is None
