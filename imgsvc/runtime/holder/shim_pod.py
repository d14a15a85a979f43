"""Holds a pod by the shim of a handler with `sandboxer = "shim"`, which makes the pod itself: a virtual machine, say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import Unimplemented
from imgsvc.runtime.core import Core
from imgsvc.runtime.holder.interfaces import Kind
from imgsvc.runtime.holder.namespaces import pinned
from imgsvc.runtime.interfaces import NewPod, PodRuntime
from imgsvc.runtime.numbers.usage import Usage
from imgsvc.runtime.processes.exits import alive, process_gone
from imgsvc.runtime.records import SandboxRecord
from imgsvc.runtime.rootfs import remove_bundle
from imgsvc.runtime.spec.build import sandbox_annotations


class ShimPodHolder:
    """Asks the handler's PodRuntime. Satisfies PodHolder."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def start(self, record: SandboxRecord) -> int:
        """See PodHolder."""
        core, pins = self._core, self._core.paths.pins(record.id)
        pods = self._pods(record)
        if pods is None:
            raise Unimplemented(f'runtime handler "{record.handler}" makes no pods')
        pod = NewPod(
            sandbox_id=record.id,
            config=record.config,
            netns=str(pins / "net") if pinned(pins, "net") else "",
            annotations=sandbox_annotations(record.id, record.config, core.handler_settings(record.handler).pod_annotations),
        )
        return await pods.run_pod(pod)

    def _pods(self, record: SandboxRecord) -> PodRuntime | None:
        """What has made the pod; None when its handler is gone."""
        runtime = self._core.find_runtime(record)
        return runtime.pods if runtime else None

    async def end(self, record: SandboxRecord) -> None:
        """See PodHolder."""
        if pods := self._pods(record):
            await pods.end_pod(record.id)
        bundle = self._core.paths.bundle(record.id)
        if bundle.exists():
            await in_thread(remove_bundle, bundle)

    def has_ended(self, record: SandboxRecord) -> bool:
        """False: the shim has to be asked."""
        return False

    async def wait(self, record: SandboxRecord) -> None:
        """See PodHolder."""
        if pods := self._pods(record):
            await pods.wait_pod(record.id)
        else:
            await process_gone(record.holder_pid, record.holder_start)

    def pid(self, record: SandboxRecord) -> int:
        """The process that the shim named, while it is there."""
        return record.holder_pid if alive(record.holder_pid, record.holder_start) else 0

    async def info(self, record: SandboxRecord) -> Mapping[str, Any]:
        """What the shim says of the pod."""
        pods = self._pods(record)
        return {"sandboxer": "shim", "shim": dict(await pods.pod_info(record.id))} if pods else {}

    async def usage(self, record: SandboxRecord) -> Usage | None:
        """What the shim says: the pod's processes are in a kernel of their own."""
        pods = self._pods(record)
        return await pods.pod_usage(record.id) if pods else None


def _suits(core: Core, record: SandboxRecord) -> bool:
    return core.handler_settings(record.handler).sandboxer == "shim"


KIND = Kind("shim", _suits, ShimPodHolder)
