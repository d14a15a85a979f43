"""`before` leaves a pod with a running and an ended container; `after` says what became of them. C-D5."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from imgsvc.api import cri_pb2 as pb
from tests.support import cri
from tests.support.disk import Disk
from tests.vm.inside.node import RPC_TIMEOUT, Node
from tests.vm.names import BUSYBOX

STORE = Path("/var/lib/imgsvc")


def before(node: Node) -> None:
    """Two pods, one per OCI runtime."""
    for handler in ("crun", "runc"):
        pod = node.pod_config(f"boot{handler}")
        sandbox = node.run_pod(pod, handler)
        node.run(sandbox, pod, "exec sleep 6000", "runs")
        assert cri.wait_for_exit(node.runtime, node.run(sandbox, pod, "exit 3", "ended")).exit_code == 3


def after(node: Node) -> None:
    """Pods not ready, containers ended; all can be removed, and then nothing of them is left."""
    pods = node.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=RPC_TIMEOUT).items
    assert {(p.metadata.name, p.state) for p in pods} == {(f"boot{h}", pb.SANDBOX_NOTREADY) for h in ("crun", "runc")}, pods
    containers = node.runtime.ListContainers(pb.ListContainersRequest(), timeout=RPC_TIMEOUT).containers
    seen = [(name, cri.status(node.runtime, found)) for name, found in sorted((c.metadata.name, c.id) for c in containers)]
    assert {status.state for _, status in seen} == {pb.CONTAINER_EXITED}, seen
    codes = [(name, status.exit_code) for name, status in seen]
    assert codes[:2] == [("ended", 3)] * 2, codes
    # Lost with the reboot; or seen, when systemd ended the container before the daemon.
    assert set(codes[2:]) <= {("runs", 255), ("runs", 137), ("runs", 143)}, codes
    node.remove_all_pods()
    leases = list(Path("/var/lib/cni/networks/pods").glob("*.*.*.*"))
    assert leases == [], leases
    subprocess.run(["imgsvc", "gc"], check=True, timeout=60)
    left = [key for key, record in Disk(STORE).snapshots().items() if not key.startswith("sha256:")]
    assert left == [], left
    # and the node works
    pod = node.pod_config("again")
    sandbox = node.run_pod(pod)
    assert node.output(sandbox, pod, "echo again") == ["again"]
    assert cri.image_status(node.images, BUSYBOX)
    node.remove_all_pods()


if __name__ == "__main__":
    connected = Node()
    if cri.image_status(connected.images, BUSYBOX) is None:
        cri.pull(connected.images, BUSYBOX)
    {"before": before, "after": after}[sys.argv[1]](connected)
