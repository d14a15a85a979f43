"""The runtime side of the daemon: from configuration to a CRI RuntimeService, or to one that says why there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgsvc import __version__
from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.base.metadb.database import MetaDB
from imgsvc.config import Config
from imgsvc.runtime.interfaces import Images
from imgsvc.runtime.node import RuntimeNode
from imgsvc.runtime.service import API_VERSION, RUNTIME_NAME, RuntimeService
from imgsvc.runtime.settings import CNISettings, HandlerSettings, NriSettings, RuntimeSettings, StreamSettings
from imgsvc.runtime.streaming.server import StreamServer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pods:
    """service: what the socket serves. container_ids: everybody who has a root file system. streams: None when off."""

    service: cri_pb2_grpc.RuntimeServiceServicer
    container_ids: Callable[[], Iterable[str]]
    streams: StreamServer | None


async def start_pods(
    settings: Config,
    state: Path,
    root: Path,
    db: MetaDB,
    images: Images,
    notes: Callable[[], Sequence[str]],
    describe: Callable[[], Mapping[str, Any]],
    stack: AsyncExitStack,
) -> Pods:
    """Start the runtime and recover its pods; `stack` gets what ends it. Without root or when switched off: images only.

    notes: what is not well with the configuration, for Status.  describe: more for Status(verbose).
    """
    reason = _off(settings)
    if reason:
        log.warning("the runtime service is off: %s", reason)
        return Pods(RuntimeOff(reason), lambda: (), None)  # type: ignore[abstract]  # what is missing answers UNIMPLEMENTED
    streams = StreamServer(StreamSettings(**asdict(settings.stream)))
    await streams.start()
    stack.push_async_callback(streams.close)
    node = await RuntimeNode.start(runtime_settings(settings, state, root), db, images)
    stack.push_async_callback(node.close)
    return Pods(RuntimeService(node, streams, notes, describe), node.root_keys, streams)


def _off(settings: Config) -> str:
    if not settings.runtime.enabled:
        return "runtime.enabled is false"
    return "it needs root; images are served all the same" if os.geteuid() else ""


def runtime_settings(settings: Config, state: Path, root: Path) -> RuntimeSettings:
    """[runtime], [runtime.runtimes], [cni] and [nri] as the runtime takes them."""
    runtime = asdict(settings.runtime)
    handlers = {}
    for name, handler in runtime.pop("runtimes").items():
        handler.pop("monitor")
        handlers[name] = HandlerSettings(name=name, **handler)
    for ours in ("enabled", "cgroup_driver"):
        runtime.pop(ours)
    cni = asdict(settings.cni)
    cni["cache_dir"] = cni["cache_dir"] or str(root / "cni")
    return RuntimeSettings(
        state_dir=state,
        root_dir=root,
        handlers=handlers,
        cni=CNISettings(**cni),
        nri=NriSettings(**asdict(settings.nri)),
        image_filesystem=str(root),
        cgroup_driver=cgroup_driver(settings.runtime.cgroup_driver),
        drain_exec_sync_io_timeout_s=runtime.pop("drain_exec_sync_io_timeout"),
        **runtime,
    )


def cgroup_driver(configured: str) -> str:
    """The driver that "auto" stands for is systemd where it runs the machine and cgroup v2 is mounted, as the kubelet's own detection has it."""
    if configured != "auto":
        return configured
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return "systemd" if unified and Path("/run/systemd/system").is_dir() else "cgroupfs"


class RuntimeOff(cri_pb2_grpc.RuntimeServiceServicer):
    """Serves Version and a truthful Status where there is no runtime; everything else is UNIMPLEMENTED."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def Version(self, request: cri_pb2.VersionRequest, context: Any) -> cri_pb2.VersionResponse:
        """Who we are; CRI clients ask before anything else."""
        return cri_pb2.VersionResponse(
            version="0.1.0", runtime_name=RUNTIME_NAME, runtime_version=__version__, runtime_api_version=API_VERSION
        )

    async def Status(self, request: cri_pb2.StatusRequest, context: Any) -> cri_pb2.StatusResponse:
        """Not ready, and why."""
        conditions = [
            cri_pb2.RuntimeCondition(type=kind, status=False, reason="RuntimeOff", message=self._reason)
            for kind in ("RuntimeReady", "NetworkReady")
        ]
        return cri_pb2.StatusResponse(status=cri_pb2.RuntimeStatus(conditions=conditions))
