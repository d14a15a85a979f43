"""Pods that a shim makes itself, by the sandbox API (`containerd.runtime.sandbox.v1.Sandbox`): a virtual machine, say.

One shim per pod: its bundle is that of the pod, its containers are tasks of the same shim, and there is no pause
container. A bundle of such a pod, and of each container in it, has a file `sandbox` with the pod's ID.

Source: containerd api/runtime/sandbox/v1/sandbox.proto; its sandbox controller "shim" for the order of the calls.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from google.protobuf import any_pb2, empty_pb2

from imgsvc.api import cri_pb2, task_v2_pb2
from imgsvc.api import sandbox_pb2 as api
from imgsvc.base.concurrency import Undo, in_thread, time_limit, to_the_end
from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, ImgsvcError, NotFound, Unavailable, Unimplemented, printable
from imgsvc.runtime.codec import fill_proto
from imgsvc.runtime.handlers.shim.bootstrap import Endpoint, Launcher, saved_endpoint
from imgsvc.runtime.handlers.shim.connections import Connections
from imgsvc.runtime.handlers.shim.figures import usage_of
from imgsvc.runtime.handlers.shim.stuck import kill_listener
from imgsvc.runtime.interfaces import NewPod, PodRuntime
from imgsvc.runtime.numbers.usage import Usage

log = logging.getLogger(__name__)

R = TypeVar("R")

_CONFIG_TYPE: Final = "runtime.v1.PodSandboxConfig"
_MARK: Final = "sandbox"
_PING_S: Final = 10.0
_STOP_S: Final = 10  # what a pod's machine has for its end, after its containers have ended
_EXIT_S: Final = 5.0  # from the shim's last answer to its end


class ShimPods:
    """The sandbox API of one handler's shims. Satisfies PodRuntime."""

    def __init__(self, launcher: Launcher, connections: Connections, bundles: Path) -> None:
        self._launcher = launcher
        self._connections = connections
        self._bundles = bundles

    async def run_pod(self, pod: NewPod) -> int:
        """See PodRuntime."""
        bundle = self._bundles / pod.sandbox_id
        _make_bundle(bundle, pod)
        async with Undo() as undo:
            undo.push(f"ending the shim of pod sandbox {pod.sandbox_id}", self.end_pod, pod.sandbox_id)
            # To its end also when the caller leaves: before, it has no address to be ended by.
            endpoint = await to_the_end(self._launcher.start(pod.sandbox_id, bundle))
            request = api.CreateSandboxRequest(
                sandbox_id=pod.sandbox_id, bundle_path=str(bundle), netns_path=pod.netns, annotations=pod.annotations
            )
            config = fill_proto(cri_pb2.PodSandboxConfig(), pod.config)
            request.options.CopyFrom(any_pb2.Any(type_url=_CONFIG_TYPE, value=config.SerializeToString()))
            await self._connections.sandbox(endpoint, "CreateSandbox", request, api.CreateSandboxResponse)
            await self._require_linux(endpoint, pod.sandbox_id)
            started = api.StartSandboxRequest(sandbox_id=pod.sandbox_id)
            return (await self._connections.sandbox(endpoint, "StartSandbox", started, api.StartSandboxResponse)).pid

    async def _require_linux(self, endpoint: Endpoint, sandbox_id: str) -> None:
        with contextlib.suppress(Unimplemented):
            answer = await self._connections.sandbox(endpoint, "Platform", api.PlatformRequest(sandbox_id=sandbox_id), api.PlatformResponse)
            if answer.platform.os not in ("", "linux"):
                raise FailedPrecondition(f"the shim's pods run {printable(answer.platform.os, 40)}, not Linux")

    async def wait_pod(self, sandbox_id: str) -> None:
        """See PodRuntime."""
        try:
            await self._ask(sandbox_id, "PingSandbox", api.PingRequest(sandbox_id=sandbox_id), api.PingResponse, timeout_s=_PING_S)
        except Unimplemented:
            pass
        except DeadlineExceeded:
            log.error("the shim of pod sandbox %s does not answer", sandbox_id)
            return
        except (NotFound, Unavailable):
            return
        request = api.WaitSandboxRequest(sandbox_id=sandbox_id)
        while (endpoint := saved_endpoint(self._bundles / sandbox_id)) is not None:
            try:
                client = await self._connections.client(endpoint)  # refused when the shim is dead
            except Unavailable:
                return
            try:
                await self._connections.sandbox(endpoint, "WaitSandbox", request, api.WaitSandboxResponse, timeout_s=None)
            except Unavailable:
                continue
            except Unimplemented:
                await client.closed.wait()
                continue
            except NotFound:
                pass
            return

    async def end_pod(self, sandbox_id: str) -> None:
        """See PodRuntime."""
        bundle = self._bundles / sandbox_id
        endpoint = saved_endpoint(bundle)
        if endpoint is None:
            return
        try:
            client = await self._connections.client(endpoint)
            await self._stop(endpoint, sandbox_id)
            await self._shut_down(endpoint, sandbox_id)
            async with time_limit(_EXIT_S):
                await client.closed.wait()
        except (Unavailable, DeadlineExceeded, TimeoutError) as error:
            if not isinstance(error, Unavailable):
                log.error("the shim of pod sandbox %s did not end, and is killed", sandbox_id)
                await in_thread(kill_listener, endpoint.address)
            with contextlib.suppress(FailedPrecondition):
                await self._launcher.delete(sandbox_id, bundle)
            Path(endpoint.address.removeprefix("unix://")).unlink(missing_ok=True)
        (bundle / "bootstrap.json").unlink(missing_ok=True)

    async def _stop(self, endpoint: Endpoint, sandbox_id: str) -> None:
        request = api.StopSandboxRequest(sandbox_id=sandbox_id, timeout_secs=_STOP_S)
        try:
            await self._connections.sandbox(endpoint, "StopSandbox", request, api.StopSandboxResponse, timeout_s=2.0 * _STOP_S)
        except (NotFound, Unimplemented):
            pass
        except (FailedPrecondition, DeadlineExceeded) as error:
            log.warning("pod sandbox %s is shut down without having stopped: %s", sandbox_id, error)

    async def _shut_down(self, endpoint: Endpoint, sandbox_id: str) -> None:
        """Ask the shim to end. A connection that breaks meanwhile is an end, too."""
        request = api.ShutdownSandboxRequest(sandbox_id=sandbox_id)
        try:
            await self._connections.sandbox(endpoint, "ShutdownSandbox", request, api.ShutdownSandboxResponse, timeout_s=2.0 * _STOP_S)
        except Unimplemented:
            shutdown = task_v2_pb2.ShutdownRequest(id=sandbox_id, now=True)
            await self._connections.task(endpoint, "Shutdown", shutdown, empty_pb2.Empty, timeout_s=2.0 * _STOP_S)
        except NotFound:
            pass

    async def pod_info(self, sandbox_id: str) -> Mapping[str, Any]:
        """See PodRuntime."""
        request = api.SandboxStatusRequest(sandbox_id=sandbox_id, verbose=True)
        try:
            status = await self._ask(sandbox_id, "SandboxStatus", request, api.SandboxStatusResponse)
        except ImgsvcError as error:
            return {"problem": str(error)}
        return {"pid": status.pid, "state": status.state, "info": dict(status.info)}

    async def pod_usage(self, sandbox_id: str) -> Usage | None:
        """See PodRuntime."""
        try:
            answer = await self._ask(
                sandbox_id, "SandboxMetrics", api.SandboxMetricsRequest(sandbox_id=sandbox_id), api.SandboxMetricsResponse
            )
        except ImgsvcError:
            return None
        return usage_of(answer.metrics.data)

    async def _ask(self, sandbox_id: str, method: str, request: Any, answer: type[R], *, timeout_s: float | None = 10.0) -> R:
        endpoint = saved_endpoint(self._bundles / sandbox_id)
        if endpoint is None:
            raise NotFound(f"no shim serves pod sandbox {sandbox_id}")
        return await self._connections.sandbox(endpoint, method, request, answer, timeout_s=timeout_s)


def _make_bundle(bundle: Path, pod: NewPod) -> None:
    """config.json has annotations alone: a shim that wants to know at its start what it is for reads them."""
    (bundle / "rootfs").mkdir(mode=0o711, parents=True)
    (bundle / _MARK).write_text(pod.sandbox_id)
    (bundle / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "annotations": dict(pod.annotations)}))


def join_pod(bundle: Path, pod_bundle: Path) -> Endpoint | None:
    """Let a container's bundle belong to a pod that its shim made, and say where that shim is; None for other pods."""
    if not made_by_shim(pod_bundle):
        return None
    endpoint = saved_endpoint(pod_bundle)
    if endpoint is None:
        raise FailedPrecondition(f"the shim of pod sandbox {pod_bundle.name} is gone")
    (bundle / _MARK).write_text(pod_bundle.name)
    return endpoint


def made_by_shim(bundle: Path) -> bool:
    """Whether a bundle is that of a pod made by its shim, or of a container in one."""
    return (bundle / _MARK).exists()


def as_pod_runtime(pods: ShimPods) -> PodRuntime:
    """Typed as its Protocol, for mypy."""
    return pods
