"""Handlers of containerd shims, and what is no handler."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf import empty_pb2

from imgsvc.api import cri_pb2 as pb
from imgsvc.api import events_pb2, ttrpc_events_pb2
from imgsvc.base import procfs
from imgsvc.runtime.ttrpc import Client
from tests.runtime.harness import Daemon, assert_clean, wait_for
from tests.runtime.podshim import CPU_US, MEMORY

pytestmark = [pytest.mark.root, pytest.mark.compat]

MakeNode = Callable[..., Daemon]
ROOT: Final = Path(__file__).parents[2]

# Debian's, which reads its options from standard input; that of containerd 2.3 or later, where a variable names one.
SHIMS: Final = ["containerd-shim-runc-v2", *filter(None, [os.environ.get("IMGSVC_TEST_SHIM_RUNC_V2")])]


def shim_node(make_node: MakeNode, program: str, **extra: Any) -> Daemon:
    """A daemon whose handler starts this shim of runc."""
    path = shutil.which(program)
    assert path, f"{program} is not installed"
    return make_node({"handlers": {"default": {"type": "io.containerd.runc.v2", "path": path}}, **extra})


def podshim_node(make_node: MakeNode, directory: Path, variables: str = "", **arguments: Any) -> Daemon:
    """A daemon whose handler starts podshim.py without its sandbox API, as gVisor's shim has none."""
    program = directory / "podshim"
    program.write_text(f'#!/bin/sh\nPODSHIM_PLAIN=1 {variables} PYTHONPATH={ROOT} exec {sys.executable} -m tests.runtime.podshim "$@"\n')
    program.chmod(0o755)
    return make_node({"handlers": {"default": {"type": "io.containerd.podshim.v1", "path": str(program)}}}, **arguments)


@contextlib.contextmanager
def stopped(pods: list[str]) -> Iterator[None]:
    """The shims of these pods are stopped; those that are still there go on at the end."""
    found = [p for p in procfs_pids() if any(pod in command(p) for pod in pods) and "containerd-shim" in command(p)]
    assert found
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def procfs_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def pid_of(node: Daemon, container: str) -> int:
    status = node.cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container, verbose=True))
    return int(json.loads(status.info["info"])["pid"])


def ended(pid: int) -> bool:
    found = procfs.process(pid)
    return found is None or found.ended


def test_R3_a_shim_that_wants_its_parameters_on_standard_input_starts(make_node: MakeNode, directory: Path) -> None:
    node = podshim_node(make_node, directory, "PODSHIM_PARAMETERS=1")
    pod = node.run_pod()
    assert node.output(pod, "echo in") == ["in"]
    node.remove_all()
    assert_clean(node)


@pytest.mark.parametrize("program", SHIMS)
def test_R3_shims_of_every_generation_start(make_node: MakeNode, program: str) -> None:
    node = shim_node(make_node, program)
    assert node.output(node.run_pod(), "echo in") == ["in"]
    node.remove_all()
    assert_clean(node)


def test_R3_an_oci_binary_that_works_only_as_a_shim_is_a_handler_that_is_off(make_node: MakeNode, directory: Path) -> None:
    handlers = {"default": {"path": "runc"}}
    for name in ("runsc", "containerd-shim-kata-v2", "neither"):
        program = directory / name
        program.write_text("no program at all")
        program.chmod(0o755)
        handlers[name] = {"path": str(program)}
    node = make_node({"handlers": handlers})
    for name, reason in (
        ("runsc", '"io.containerd.runsc.v1"'),
        ("containerd-shim-kata-v2", '"io.containerd.kata.v2"'),
        ("neither", "format"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            node.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=node.pod(), runtime_handler=name))
        assert reason in (caught.value.details() or "")


@pytest.mark.parametrize("program", SHIMS)
def test_R4_what_a_stopped_shim_serves_can_be_stopped_and_removed(make_node: MakeNode, program: str) -> None:
    node = shim_node(make_node, program)
    pod = node.run_pod()
    running = node.run(pod, "trap 'exit 3' TERM; while :; do sleep 0.1; done", "running")
    ending = node.run(pod, "trap 'exit 7' USR1; echo on; while :; do sleep 0.1; done", "ending")
    node.wait_line(ending, "on")
    init = pid_of(node, ending)
    other = node.run_pod("other", namespaces=pb.NamespaceOption(network=pb.NODE, pid=pb.POD))
    with stopped([pod, running, ending, other]):
        os.kill(init, signal.SIGUSR1)
        wait_for(lambda: ended(init))
        begin = time.monotonic()
        removal = node.cri.RemovePodSandbox.future(pb.RemovePodSandboxRequest(pod_sandbox_id=other), timeout=100)
        node.cri.StopContainer(pb.StopContainerRequest(container_id=running, timeout=2), timeout=100)
        removal.result()
        assert time.monotonic() - begin < 60
        assert node.wait_exit(running).exit_code == 137
        assert node.wait_exit(ending).exit_code == 7
    node.remove_all()
    assert_clean(node)


@pytest.mark.parametrize("program", SHIMS)
@pytest.mark.parametrize("terminal", [False, True])
def test_R6_what_a_container_writes_last_while_the_daemon_is_away_is_in_its_log(
    make_node: MakeNode, program: str, *, terminal: bool
) -> None:
    node = shim_node(make_node, program)
    pod = node.run_pod()
    script = "echo on; until [ -e /tmp/go ]; do sleep 0.05; done; seq 20000; echo last >&2; exit 4"
    container = node.run(pod, script, tty=terminal, stdin=terminal)
    node.wait_line(container, "on")
    init = pid_of(node, container)
    log_path = Path(node.status(container).log_path)
    node.kill()
    Path(f"/proc/{init}/root/tmp/go").touch()
    wait_for(lambda: ended(init))
    wait_for(lambda: "F last" in log_path.read_text())  # written without a daemon
    node.start()
    assert node.wait_exit(container).exit_code == 4
    assert sorted(node.log(str(log_path))) == sorted(["on", *map(str, range(1, 20001)), "last"])
    node.remove_all()
    assert_clean(node)


def test_R6_a_log_process_that_dies_is_replaced(make_node: MakeNode) -> None:
    node = shim_node(make_node, SHIMS[0])
    container = node.run(node.run_pod(), "trap 'echo again; exit 0' TERM; echo on; while :; do sleep 0.05; done")
    node.wait_line(container, "on")
    found = [pid for pid in procfs_pids() if container in command(pid) and "logprocess" in command(pid)]
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)
    wait_for(lambda: any("logprocess" in command(pid) and container in command(pid) for pid in procfs_pids() if pid not in found))
    log_path = node.status(container).log_path
    os.rename(log_path, f"{log_path}.1")
    node.cri.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container))
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=60))
    assert node.log(log_path) == ["again"]
    node.remove_all()
    assert_clean(node)


def test_R7_a_pod_with_a_kernel_of_its_own_has_its_name_and_its_figures(make_node: MakeNode, directory: Path) -> None:
    node = podshim_node(make_node, directory, bridge="imgsvcR7")
    handler = node.cri.Status(pb.StatusRequest()).runtime_handlers[0]
    assert not handler.features.user_namespaces
    pod = node.run_pod("named")
    pause = json.loads((directory / "s/containers" / pod / "config.json").read_text())
    assert pause["hostname"] == "named"
    container = node.run(pod, "sleep 100")
    stats = node.cri.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
    assert (stats.memory.usage_bytes.value, stats.cpu.usage_core_nano_seconds.value) == (MEMORY, CPU_US * 1000)
    node.remove_all()
    assert_clean(node)


def test_R7_a_shim_can_publish_while_the_daemon_is_away(make_node: MakeNode) -> None:
    node = shim_node(make_node, SHIMS[0])
    container = node.run(node.run_pod(), "sleep 100")
    node.kill()

    async def publish() -> None:
        client = await Client.connect(str(node.directory / "s/shim-default.sock"), "imgsvc")
        for topic, event in (("/tasks/exit", events_pb2.TaskExit()), ("/tasks/oom", events_pb2.TaskOOM(container_id=container))):
            request = ttrpc_events_pb2.ForwardRequest()
            request.envelope.topic = topic
            request.envelope.event.value = event.SerializeToString()
            await client.call("containerd.services.events.ttrpc.v1.Events", "Forward", request, empty_pb2.Empty)
        await client.close()

    asyncio.run(publish())
    node.start()
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container))
    assert node.status(container).reason == "OOMKilled"
    node.remove_all()
    assert_clean(node)


def test_S10_a_pod_whose_shim_program_is_gone_can_be_stopped(make_node: MakeNode, directory: Path) -> None:
    program = directory / "containerd-shim-runc-v2"
    shutil.copy(str(shutil.which(SHIMS[0])), program)
    node = shim_node(make_node, str(program))
    pod = node.run_pod()
    container = node.run(pod, "sleep 100")
    node.kill()
    program.unlink()
    node.start()
    node.cri.StopContainer(pb.StopContainerRequest(container_id=container))
    assert node.status(container).exit_code == 137
    node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert_clean(node)
