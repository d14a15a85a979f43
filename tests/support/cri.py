"""CRI requests as the kubelet makes them, and waiting for what they bring about."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import grpc

from imgsvc.api import cri_pb2
from imgsvc.api.cri_pb2_grpc import ImageServiceStub, RuntimeServiceStub
from tests.support.daemon import RPC_TIMEOUT, Daemon

_LOG_LINE = re.compile(r"(\S+) (stdout|stderr) ([FP](?::[A-Z:]+)?) (.*)", re.DOTALL)
WAIT: Final = 90.0  # [seconds]


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a CRI log file."""

    time: datetime
    stream: str
    tag: str
    text: str


def read_log(path: Path) -> list[LogLine]:
    """Parse a container's log. Raises: AssertionError for a line that is not in CRI's format."""
    lines = []
    for raw in path.read_text().splitlines():
        match = _LOG_LINE.fullmatch(raw)
        assert match, f"not a CRI log line: {raw!r}"
        lines.append(LogLine(datetime.fromisoformat(match[1]), match[2], match[3], match[4]))
    return lines


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Code and text with which the daemon refuses a call. Raises: AssertionError when it does not."""
    try:
        call()
    except grpc.RpcError as refused:
        return refused.code(), refused.details() or ""
    raise AssertionError("not refused")


def pod_config(daemon: Daemon, name: str = "pod") -> cri_pb2.PodSandboxConfig:
    """A pod with a network of its own, logs below the daemon's directory, control groups below the daemon's parent group."""
    return cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(name=name, uid=f"uid-of-{name}", namespace="tests"),
        hostname=name,
        log_directory=str(daemon.directory / "logs" / name),
        labels={"app": name},
        annotations={"note": "kept as it is"},
        linux=cri_pb2.LinuxPodSandboxConfig(cgroup_parent=daemon.cgroup_parent),
    )


def container_config(image: str, command: Sequence[str], name: str = "main", args: Iterable[str] = ()) -> cri_pb2.ContainerConfig:
    """A container without anything special."""
    return cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=name),
        image=cri_pb2.ImageSpec(image=image),
        command=command,
        args=args,
        log_path=f"{name}.log",
        labels={"container": name},
        linux=cri_pb2.LinuxContainerConfig(),
    )


def pull(images: ImageServiceStub, name: str) -> str:
    """PullImage; returns the image ref."""
    spec = cri_pb2.ImageSpec(image=name)
    return images.PullImage(cri_pb2.PullImageRequest(image=spec), timeout=RPC_TIMEOUT).image_ref


def image_status(images: ImageServiceStub, name: str) -> cri_pb2.Image | None:
    """ImageStatus; None when the image is not there."""
    response = images.ImageStatus(cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=name)), timeout=RPC_TIMEOUT)
    return response.image if response.HasField("image") else None


def run_pod(runtime: RuntimeServiceStub, config: cri_pb2.PodSandboxConfig) -> str:
    """RunPodSandbox; returns the sandbox ID."""
    return runtime.RunPodSandbox(cri_pb2.RunPodSandboxRequest(config=config), timeout=RPC_TIMEOUT).pod_sandbox_id


def pod_status(runtime: RuntimeServiceStub, sandbox: str) -> cri_pb2.PodSandboxStatus:
    """PodSandboxStatus."""
    return runtime.PodSandboxStatus(cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox), timeout=RPC_TIMEOUT).status


def create(runtime: RuntimeServiceStub, sandbox: str, config: cri_pb2.ContainerConfig, pod: cri_pb2.PodSandboxConfig) -> str:
    """CreateContainer; returns the container ID."""
    request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox, config=config, sandbox_config=pod)
    return runtime.CreateContainer(request, timeout=RPC_TIMEOUT).container_id


def start(runtime: RuntimeServiceStub, container: str) -> None:
    """StartContainer."""
    runtime.StartContainer(cri_pb2.StartContainerRequest(container_id=container), timeout=RPC_TIMEOUT)


def status(runtime: RuntimeServiceStub, container: str) -> cri_pb2.ContainerStatus:
    """ContainerStatus."""
    return runtime.ContainerStatus(cri_pb2.ContainerStatusRequest(container_id=container), timeout=RPC_TIMEOUT).status


def wait_for_exit(runtime: RuntimeServiceStub, container: str, seconds: float = WAIT) -> cri_pb2.ContainerStatus:
    """Poll until the container has exited. Raises: AssertionError when it does not."""
    deadline = time.monotonic() + seconds
    while (seen := status(runtime, container)).state != cri_pb2.CONTAINER_EXITED:
        assert time.monotonic() < deadline, f"still {cri_pb2.ContainerState.Name(seen.state)} after {seconds:g} s"
        time.sleep(0.05)
    return seen


def stop(runtime: RuntimeServiceStub, container: str, timeout: int = 0) -> None:
    """StopContainer. timeout [seconds] before SIGKILL."""
    runtime.StopContainer(cri_pb2.StopContainerRequest(container_id=container, timeout=timeout), timeout=RPC_TIMEOUT)


def remove(runtime: RuntimeServiceStub, container: str) -> None:
    """RemoveContainer."""
    runtime.RemoveContainer(cri_pb2.RemoveContainerRequest(container_id=container), timeout=RPC_TIMEOUT)


def stop_pod(runtime: RuntimeServiceStub, sandbox: str) -> None:
    """StopPodSandbox."""
    runtime.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=RPC_TIMEOUT)


def remove_pod(runtime: RuntimeServiceStub, sandbox: str) -> None:
    """RemovePodSandbox."""
    runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=RPC_TIMEOUT)
