"""The service in the machine, asked as the kubelet asks it: systemd slices as parents, logs below /var/log/pods."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc

from imgsvc.api import cri_pb2 as pb
from imgsvc.api.cri_pb2_grpc import ImageServiceStub, RuntimeServiceStub
from tests.support import cri
from tests.vm.names import BUSYBOX

ADDRESS: Final = "unix:///run/imgsvc/imgsvc.sock"
CGROUPS: Final = Path("/sys/fs/cgroup")
RPC_TIMEOUT: Final = 120.0  # [seconds]
MIB: Final = 1024**2


class Node:
    """Stubs, and what tests do with them."""

    def __init__(self) -> None:
        self._channel = grpc.insecure_channel(ADDRESS, options=[("grpc.use_local_subchannel_pool", 1)])
        self.runtime = RuntimeServiceStub(self._channel)
        self.images = ImageServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def pod_config(self, name: str, **security: Any) -> pb.PodSandboxConfig:
        """A pod on the pod network, in a slice as the kubelet's systemd driver names it. security: of its security context."""
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="tests"),
            hostname=name,
            log_directory=f"/var/log/pods/{name}",
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=f"/kubepods.slice/kubepods-pod{name}.slice", security_context=pb.LinuxSandboxSecurityContext(**security)
            ),
        )

    def run_pod(self, config: pb.PodSandboxConfig, handler: str = "") -> str:
        """RunPodSandbox; the ID."""
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return self.runtime.RunPodSandbox(request, timeout=RPC_TIMEOUT).pod_sandbox_id

    def create(self, sandbox: str, pod: pb.PodSandboxConfig, script: str, name: str = "main", **linux: Any) -> str:
        """A container that runs a shell script. linux: of its Linux configuration."""
        config = cri.container_config(BUSYBOX, ["sh", "-c", script], name)
        config.linux.CopyFrom(pb.LinuxContainerConfig(**linux))
        return cri.create(self.runtime, sandbox, config, pod)

    def run(self, sandbox: str, pod: pb.PodSandboxConfig, script: str, name: str = "main", **linux: Any) -> str:
        """A started container."""
        container = self.create(sandbox, pod, script, name, **linux)
        cri.start(self.runtime, container)
        return container

    def output(self, sandbox: str, pod: pb.PodSandboxConfig, script: str, name: str = "main", **linux: Any) -> list[str]:
        """Run a script to its end; the lines it printed."""
        return self.lines(self.run(sandbox, pod, script, name, **linux))

    def lines(self, container: str) -> list[str]:
        """What a container prints until it ends."""
        return [line.text for line in cri.read_log(Path(cri.wait_for_exit(self.runtime, container).log_path))]

    def remove_all_pods(self) -> None:
        """Stop and remove every pod."""
        for sandbox in self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=RPC_TIMEOUT).items:
            cri.stop_pod(self.runtime, sandbox.id)
            cri.remove_pod(self.runtime, sandbox.id)


def scope(name: str, container: str) -> Path:
    """The control group of a container in the pod `name`."""
    return CGROUPS / "kubepods.slice" / f"kubepods-pod{name}.slice" / f"imgsvc-{container}.scope"


def processes(group: Path) -> list[str]:
    """Process IDs in a control group and below: crun puts its containers into a child of the scope."""
    return [pid for file in group.rglob("cgroup.procs") for pid in file.read_text().split()]


def systemctl(*arguments: str) -> None:
    """Raises: CalledProcessError."""
    subprocess.run(["systemctl", *arguments], check=True, timeout=RPC_TIMEOUT)


def shown(unit: str) -> Mapping[str, str]:
    """Properties of a unit."""
    text = subprocess.run(["systemctl", "show", unit], capture_output=True, text=True, check=True, timeout=30).stdout
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def journal() -> list[str]:
    """The service's lines since boot."""
    command = ["journalctl", "-b", "-u", "imgsvc", "-o", "cat"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()


def wait_for_file(path: Path, seconds: float = 30.0) -> None:
    """Raises: AssertionError when it does not appear."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
