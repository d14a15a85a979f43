"""The systemd driver on cgroup version 2, with both OCI runtimes: where containers live, and that limits hold."""

from __future__ import annotations

import pytest

from imgsvc.api import cri_pb2 as pb
from tests.support import cri
from tests.vm.inside.node import MIB, Node, processes, scope, shown

LIMIT = 48 * MIB


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_containers_are_scopes_in_the_slice_of_their_pod_with_its_limits(node: Node, handler: str) -> None:
    pod = node.pod_config(f"scope{handler}")
    sandbox = node.run_pod(pod, handler)
    resources = pb.LinuxContainerResources(
        memory_limit_in_bytes=LIMIT, memory_swap_limit_in_bytes=LIMIT, cpu_period=100_000, cpu_quota=50_000, unified={"pids.max": "8"}
    )
    container = node.run(sandbox, pod, "exec sleep 600", resources=resources)
    group = scope(f"scope{handler}", container)
    assert processes(group)
    assert shown(group.name)["ActiveState"] == "active"
    group = group / "container" if handler == "crun" else group  # where crun keeps limits, so that the scope stays its owner's
    assert (group / "memory.max").read_text() == f"{LIMIT}\n"
    assert (group / "cpu.max").read_text() == "50000 100000\n"
    assert (group / "pids.max").read_text() == "8\n"
    stats = node.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container), timeout=30).stats
    assert 0 < stats.memory.usage_bytes.value < LIMIT
    assert LIMIT // 2 < stats.memory.available_bytes.value < LIMIT
    assert stats.cpu.usage_core_nano_seconds.value > 0
    cri.stop(node.runtime, container)
    cri.remove(node.runtime, container)
    assert not group.exists()


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_memory_and_process_limits_are_enforced(node: Node, handler: str) -> None:
    pod = node.pod_config(f"limits{handler}")
    sandbox = node.run_pod(pod, handler)
    memory = pb.LinuxContainerResources(memory_limit_in_bytes=LIMIT, memory_swap_limit_in_bytes=LIMIT)
    container = node.run(sandbox, pod, "exec dd if=/dev/zero of=/dev/null bs=200M count=1", "memory", resources=memory)
    seen = cri.wait_for_exit(node.runtime, container)
    assert (seen.exit_code, seen.reason) == (137, "OOMKilled")

    few = pb.LinuxContainerResources(unified={"pids.max": "8"})
    script = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 2 & done; echo never"
    container = node.run(sandbox, pod, f"({script}) 2>&1; true", "processes", resources=few)
    lines = node.lines(container)
    assert any("fork" in line for line in lines), lines
    assert "never" not in lines
