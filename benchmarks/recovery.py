"""How long a daemon that was killed takes to serve again, beside its running pods.

    python -m benchmarks.recovery [--pods 120] [--rounds 3]

Makes pods with a bridge network and one container each, kills the daemon with SIGKILL, and starts it again. Prints one JSON
object: seconds from the start of the process to its socket's first answer, to a listing of all pods, and of processor time
until then, which says the same on a busy machine; all that without pods, too. Needs root and what pods need.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from imgsvc.api import cri_pb2 as pb
from imgsvc.api.cri_pb2_grpc import RuntimeServiceStub
from tests.support import cri
from tests.support.daemon import Daemon, new_daemon
from tests.support.images import busybox
from tests.support.registries import real_registry

IMAGE = "docker.io/bench/busybox:latest"
AT_ONCE = 4  # pods that are made side by side


def make_pods(daemon: Daemon, count: int) -> None:
    """Running pods with one container each."""
    runtime = daemon.runtime()

    def one(number: int) -> None:
        config = cri.pod_config(daemon, f"pod-{number}")
        pod = cri.run_pod(runtime, config)
        cri.start(runtime, cri.create(runtime, pod, cri.container_config(IMAGE, ["sleep", "100000"]), config))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, range(count)))


def measure(daemon: Daemon, pods: int) -> dict[str, float]:
    """Kill and start again; seconds until the first answer, until all pods are listed as running, of processor time till then."""
    daemon.kill()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(daemon.start)
        answered = wait_for_answer(daemon, began)
        starting.result()
    ready = pb.PodSandboxFilter(state=pb.PodSandboxStateValue(state=pb.PodSandboxState.SANDBOX_READY))
    running = pb.ContainerFilter(state=pb.ContainerStateValue(state=pb.ContainerState.CONTAINER_RUNNING))
    runtime = daemon.runtime()
    listed = runtime.ListPodSandbox(pb.ListPodSandboxRequest(filter=ready)).items
    containers = runtime.ListContainers(pb.ListContainersRequest(filter=running)).containers
    assert len(listed) == len(containers) == pods, f"{len(listed)} pods and {len(containers)} containers of {pods} are left"
    return {"answer": answered, "listed": time.monotonic() - began, "cpu": cpu(daemon.pid)}


def cpu(pid: int) -> float:
    """Seconds of processor time of a process and of the children it has waited for. Source: proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def wait_for_answer(daemon: Daemon, began: float) -> float:
    """Seconds until Version is answered. A new connection each time: gRPC waits longer and longer with one that was refused."""
    while True:
        with grpc.insecure_channel(daemon.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                RuntimeServiceStub(channel).Version(pb.VersionRequest(), timeout=30)
            except grpc.RpcError:
                time.sleep(0.02)
            else:
                return time.monotonic() - began


def table(rounds: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Each figure with its values in all rounds."""
    return {name: [round(one[name], 2) for one in rounds] for name in rounds[0]}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imgsvc-bench-") as place, real_registry(Path(place)) as registry:
        registry.push(busybox(), "bench/busybox")
        daemon = new_daemon(network=True)
        try:
            daemon.map_host("docker.io", registry.address)
            daemon.start()
            cri.pull(daemon.images(), IMAGE)
            empty = [measure(daemon, 0) for _ in range(arguments.rounds)]
            make_pods(daemon, arguments.pods)
            full = [measure(daemon, arguments.pods) for _ in range(arguments.rounds)]
            print(json.dumps({"pods": arguments.pods, "seconds": table(full), "seconds_without_pods": table(empty)}))
            daemon.remove_all_pods()
        finally:
            daemon.close()


if __name__ == "__main__":
    main()
