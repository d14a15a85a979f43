"""Pods per second, listing times and memory of any CRI runtime, over its socket.

    python -m benchmarks.pods --socket unix:///run/imgsvc/imgsvc.sock --image docker.io/library/busybox:latest [--pods 20] [--list 200]

The image must be on the node and have `sleep`. Pods use the host's network, so that no CNI plugin is measured. Prints one
JSON object; times in milliseconds. Compare two runtimes in one go on one machine, or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from imgsvc.api import cri_pb2 as pb
from imgsvc.api.cri_pb2_grpc import RuntimeServiceStub

NODE = pb.NamespaceMode.NODE
OWN = pb.NamespaceMode.CONTAINER


class Client:
    """Makes pods with one container each."""

    def __init__(self, address: str, image: str) -> None:
        self.cri = RuntimeServiceStub(grpc.insecure_channel(address))
        self.pid = server_of(address)
        self.image = image
        self.prefix = f"bench-{os.getpid()}"

    def options(self) -> pb.NamespaceOption:
        """Host network, own PID namespaces."""
        return pb.NamespaceOption(network=NODE, pid=OWN)

    def pod(self, number: int) -> tuple[str, pb.PodSandboxConfig]:
        """A running sandbox."""
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=f"{self.prefix}-{number}", uid=f"{self.prefix}-{number}", namespace="bench"),
            linux=pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=self.options())),
        )
        return self.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=config)).pod_sandbox_id, config

    def container(self, pod: str, config: pb.PodSandboxConfig, name: str = "main") -> str:
        """A started container."""
        security = pb.LinuxContainerSecurityContext(namespace_options=self.options())
        wanted = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=self.image),
            command=["sleep", "100000"],
            linux=pb.LinuxContainerConfig(security_context=security),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=wanted, sandbox_config=config)
        container = self.cri.CreateContainer(request).container_id
        self.cri.StartContainer(pb.StartContainerRequest(container_id=container))
        return container

    def remove(self, pod: str) -> None:
        """Stop and remove a pod."""
        self.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod))
        self.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and the answer."""
    start = time.perf_counter()
    answer = call()
    return (time.perf_counter() - start) * 1e3, answer


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and 95th percentile."""
    ordered = sorted(values)
    return {
        "min": round(ordered[0], 1),
        "p50": round(statistics.median(ordered), 1),
        "p95": round(ordered[int(len(ordered) * 0.95) - 1], 1),
    }


def monitors_pss() -> int:
    """Proportional memory [bytes] of all processes that monitor containers."""
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "comm").read_text().strip() in ("conmon", "containerd-shim"):
                line = next(row for row in (process / "smaps_rollup").read_text().splitlines() if row.startswith("Pss:"))
                total += int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            continue
    return total


def measure(client: Client, pods: int, listed: int) -> dict[str, Any]:
    """All figures."""
    base = monitors_pss()
    boots, containers, whole, made = [], [], [], []
    for number in range(pods):
        boot, (pod, config) = timed(lambda number=number: client.pod(number))  # type: ignore[misc]
        start, _ = timed(lambda pod=pod, config=config: client.container(pod, config))  # type: ignore[misc]
        boots.append(boot)
        containers.append(start)
        whole.append(boot + start)
        made.append(pod)
    memory = monitors_pss() - base
    removals = [timed(lambda pod=pod: client.remove(pod))[0] for pod in made]  # type: ignore[misc]
    return {
        "pod_ms": spread(boots),
        "container_ms": spread(containers),
        "pod_and_container_ms": spread(whole),
        "remove_ms": spread(removals),
        "monitor_bytes_per_pod": memory // pods,
        **(listing(client, listed) if listed else {}),
    }


def listing(client: Client, count: int) -> dict[str, Any]:
    """Times of the calls the kubelet polls with, with `count` containers in 20 pods."""
    made = []
    for number in range(20):
        pod, config = client.pod(10_000 + number)
        made.append(pod)
        for n in range(count // 20):
            client.container(pod, config, f"c{n}")
    calls: dict[str, Callable[[], Any]] = {
        "list_containers_ms": lambda: client.cri.ListContainers(pb.ListContainersRequest()),
        "list_sandboxes_ms": lambda: client.cri.ListPodSandbox(pb.ListPodSandboxRequest()),
        "list_stats_ms": lambda: client.cri.ListContainerStats(pb.ListContainerStatsRequest()),
        "list_pod_metrics_ms": lambda: client.cri.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest()),
        "list_pod_stats_ms": lambda: client.cri.ListPodSandboxStats(pb.ListPodSandboxStatsRequest()),
    }
    for call in calls.values():
        call()
    result = {name: spread([timed(call)[0] for _ in range(30)]) for name, call in calls.items()}
    result["daemon_cpu_per_list_stats_ms"] = {"mean": cpu_per_call(client, calls["list_stats_ms"])}
    for pod in made:
        client.remove(pod)
    return result


def cpu_per_call(client: Client, call: Callable[[], Any], times: int = 50) -> float:
    """Processor time [ms] of the daemon for one call; times 0.1 is its share [%] of a core when polled every 10 s."""
    before = cpu_time(client.pid)
    for _ in range(times):
        call()
    return round((cpu_time(client.pid) - before) * 1e3 / times, 1)


def cpu_time(pid: int) -> float:
    """Processor time [s] of a process so far. Source: proc(5) stat, fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def server_of(address: str) -> int:
    """The process that listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address.removeprefix("unix://"))
        pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", default="unix:///run/imgsvc/imgsvc.sock")
    parser.add_argument("--image", default="docker.io/library/busybox:latest")
    parser.add_argument("--pods", type=int, default=20)
    parser.add_argument("--list", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps(measure(Client(options.socket, options.image), options.pods, options.list), indent=1))


if __name__ == "__main__":
    main()
