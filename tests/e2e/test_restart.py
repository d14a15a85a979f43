"""The daemon goes away, the containers do not. C-D6: nothing of them is lost when it comes back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from imgsvc.api import cri_pb2
from tests.e2e.conftest import BUSYBOX
from tests.support import cri
from tests.support.daemon import RPC_TIMEOUT, Daemon

pytestmark = pytest.mark.root

COUNT = "i=0; while [ ! -e /stop ]; do echo $i; i=$((i+1)); sleep 0.02; done; exit 5"


def listed(daemon: Daemon) -> tuple[set[str], set[str]]:
    runtime = daemon.runtime()
    pods = runtime.ListPodSandbox(cri_pb2.ListPodSandboxRequest(), timeout=RPC_TIMEOUT).items
    containers = runtime.ListContainers(cri_pb2.ListContainersRequest(), timeout=RPC_TIMEOUT).containers
    return {p.id for p in pods}, {c.id for c in containers}


def container_process(daemon: Daemon, script: str) -> int:
    """Process ID on the host of the container's shell."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if script.encode() in words and daemon.cgroup_parent in Path(f"/proc/{pid}/cgroup").read_text():
                return pid
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError("the container's process is not there")


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_c_d6_containers_never_notice_and_nothing_is_forgotten(pod_daemon: Daemon, end: str) -> None:
    daemon = pod_daemon
    runtime = daemon.runtime()
    pod = cri.pod_config(daemon)
    sandbox = cri.run_pod(runtime, pod)
    names = ("running", "ends-meanwhile", "ended", "created")
    scripts = {"running": COUNT, "ends-meanwhile": "sleep 1.5; exit 9", "ended": "exit 4", "created": "exit 0"}
    made = {n: cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sh", "-c", scripts[n]], n), pod) for n in names}
    for name in names[:3]:
        cri.start(runtime, made[name])
    ended = cri.wait_for_exit(runtime, made["ended"])
    before, pid, address = listed(daemon), container_process(daemon, COUNT), cri.pod_status(runtime, sandbox).network.ip

    if end == "kill":
        daemon.kill()
    else:
        assert daemon.stop() == 0
    time.sleep(2.5)  # one container ends while nobody watches
    daemon.start()

    runtime = daemon.runtime()
    assert listed(daemon) == before
    assert container_process(daemon, COUNT) == pid
    seen = cri.pod_status(runtime, sandbox)
    assert (seen.state, seen.network.ip, seen.metadata) == (cri_pb2.SANDBOX_READY, address, pod.metadata)
    assert cri.status(runtime, made["ended"]) == ended
    assert cri.status(runtime, made["created"]).state == cri_pb2.CONTAINER_CREATED
    assert cri.wait_for_exit(runtime, made["ends-meanwhile"]).exit_code == 9
    assert cri.status(runtime, made["running"]).state == cri_pb2.CONTAINER_RUNNING

    Path(f"/proc/{pid}/root/stop").touch()
    last = cri.wait_for_exit(runtime, made["running"])
    assert last.exit_code == 5
    numbers = [int(line.text) for line in cri.read_log(Path(last.log_path))]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 50

    cri.start(runtime, made["created"])
    assert cri.wait_for_exit(runtime, made["created"]).exit_code == 0


def test_c_d6_what_was_killed_meanwhile_is_reported_as_killed(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sh", "-c", COUNT]), pod)
    cri.start(runtime, container)
    pid = container_process(pod_daemon, COUNT)
    pod_daemon.kill()
    os.kill(pid, signal.SIGKILL)
    pod_daemon.start()
    assert cri.wait_for_exit(pod_daemon.runtime(), container).exit_code == 137


def test_c_d6_a_pod_can_be_removed_by_the_next_daemon(pod_daemon: Daemon) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    sandbox = cri.run_pod(runtime, pod)
    container = cri.create(runtime, sandbox, cri.container_config(BUSYBOX, ["sleep", "600"]), pod)
    cri.start(runtime, container)
    pod_daemon.kill()
    pod_daemon.start()
    cri.remove_pod(pod_daemon.runtime(), sandbox)
    assert listed(pod_daemon) == (set(), set())
    assert pod_daemon.leftovers() == []


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.3])
def test_c_c27_a_daemon_killed_while_it_makes_a_pod_leaves_nothing_that_lasts(pod_daemon: Daemon, delay: float) -> None:
    runtime = pod_daemon.runtime()
    pod = cri.pod_config(pod_daemon)
    call = runtime.RunPodSandbox.future(cri_pb2.RunPodSandboxRequest(config=pod), timeout=RPC_TIMEOUT)
    time.sleep(delay)
    pod_daemon.kill()
    call.exception()
    pod_daemon.start()
    # Whether the pod exists now is open; it is whole, or removable, and its name can be used again.
    pod_daemon.remove_all_pods()
    assert pod_daemon.leftovers() == []
    sandbox = cri.run_pod(pod_daemon.runtime(), pod)
    assert cri.pod_status(pod_daemon.runtime(), sandbox).state == cri_pb2.SANDBOX_READY
