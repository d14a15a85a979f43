"""The runtime as one object: built from settings, started, closed. The edge makes one; service.py talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from imgsvc.base.concurrency import KeyedLock, in_thread, stop_tasks
from imgsvc.base.fsutil import boot_id, private_dir
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.removal import discard
from imgsvc.runtime import host
from imgsvc.runtime.codec import to_json
from imgsvc.runtime.containers import Containers
from imgsvc.runtime.core import Core
from imgsvc.runtime.events import Events
from imgsvc.runtime.handlers.known import start_earlier, start_handlers, start_later
from imgsvc.runtime.handlers.oci.monitor import MonitorPaths
from imgsvc.runtime.holder.choice import holder_of
from imgsvc.runtime.interfaces import Images
from imgsvc.runtime.model import NamespaceMode
from imgsvc.runtime.network.plugin import PodNetwork
from imgsvc.runtime.nri.service import Nri
from imgsvc.runtime.numbers.metrics import Metrics
from imgsvc.runtime.numbers.stats import Stats
from imgsvc.runtime.paths import Paths
from imgsvc.runtime.processes.exits import now_ns
from imgsvc.runtime.processes.reaper import Reaper
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord
from imgsvc.runtime.recovery import recover, stop_lost
from imgsvc.runtime.sandboxes import Sandboxes
from imgsvc.runtime.settings import RuntimeSettings
from imgsvc.runtime.spec.apparmor import load_default
from imgsvc.runtime.spec.planner import volume_key
from imgsvc.runtime.state import require_ready

log = logging.getLogger(__name__)


class RuntimeNode:
    """Use start(); the constructor is for it."""

    def __init__(self, core: Core, reaper: Reaper) -> None:
        self.core = core
        self.containers = Containers(core)
        self.sandboxes = Sandboxes(core, self.containers)
        self.stats = Stats(core)
        self.metrics = Metrics(core, self.stats)
        self._reaper = reaper
        self.tasks: list[asyncio.Task[None]] = []  # what a start leaves for later

    @classmethod
    async def start(cls, settings: RuntimeSettings, database: MetaDB, images: Images) -> RuntimeNode:
        """Make directories, test the handlers, read the records, recover. Call it once, as root, on the serving loop.

        Raises: FailedPrecondition (records of a newer version), OSError.
        """
        reaper = Reaper()
        reaper.start()
        paths = Paths(settings.state_dir, settings.root_dir)
        await in_thread(_make_directories, paths)
        records = Records(database)
        records.load()
        records.catch_up(paths.state / "sandboxes", paths.bundles)
        places = MonitorPaths(paths.bundles, paths.exits, paths.sockets)
        working, broken = await start_handlers(settings, places, reaper)
        runtimes = await start_earlier({r.runtime for r in records.sandboxes.values()}, working, settings, places, reaper)
        facts = host.look(hugetlb=not settings.disable_hugetlb_controller)
        if settings.enable_selinux and not facts.selinux:
            log.warning("enable_selinux is true, but this kernel runs no SELinux; pods get no labels")
        if not settings.disable_apparmor:
            facts = replace(facts, apparmor_profile=await load_default(facts))
        boot = boot_id()
        core = Core(
            settings=settings,
            paths=paths,
            records=records,
            images=images,
            handlers=working,
            broken_handlers=broken,
            runtimes=runtimes,
            network=PodNetwork(settings.cni),
            host=facts,
            boot_id=boot,
            events=Events(records),
            locks=KeyedLock(),
            stopping=set(),
            nri=Nri(settings, records, paths, facts, boot),
        )
        node = cls(core, reaper)
        lost = await recover(core, node.sandboxes, node.containers)
        await core.nri.start(node.containers)
        node.tasks.append(asyncio.create_task(stop_lost(node.sandboxes, lost), name="stop-lost"))
        if broken:
            later = start_later(working, broken, runtimes, settings, places, reaper)
            node.tasks.append(asyncio.create_task(later, name="handlers"))
        return node

    async def close(self) -> None:
        """Stop watching. Pods keep running."""
        await stop_tasks(*self.tasks)
        await self.core.nri.close()
        await self.sandboxes.close()
        await self.containers.close()
        for runtime in set(self.core.runtimes.values()):
            await runtime.close()
        await self._reaper.stop()

    def root_keys(self) -> list[str]:
        """Every key under which the image side keeps something for us: containers, and their image volumes."""
        keys = []
        for record in self.core.records.containers.values():
            keys.append(record.id)
            keys += [volume_key(record.id, n) for n, mount in enumerate(record.config.mounts) if mount.image]
        return keys

    def now(self) -> int:
        """Nanoseconds since the epoch."""
        return now_ns()

    async def update_pod_cidr(self, pod_cidr: str) -> None:
        """See NetworkPlugin."""
        await in_thread(self.core.network.update_pod_cidr, pod_cidr)

    def pod_netns(self, sandbox_id: str) -> Path | None:
        """The pinned network namespace of a ready pod; None for the host's. Raises: NotFound, FailedPrecondition."""
        record = self.core.records.sandbox(sandbox_id)
        require_ready(record, self.core.boot_id)
        if record.config.namespaces.network == NamespaceMode.NODE:
            return None
        return self.core.paths.pins(record.id) / "net"

    def describe(self) -> dict[str, Any]:
        """For Status(verbose)."""
        core = self.core
        return {
            "config": {
                "stateDir": str(core.paths.state),
                "rootDir": str(core.paths.root),
                "cgroupDriver": core.settings.cgroup_driver,
                "defaultRuntimeName": core.settings.default_runtime_name,
            },
            "host": {
                "unifiedCgroups": core.host.unified,
                "controllers": sorted(core.host.controllers),
                "apparmor": core.host.apparmor,
                "selinux": core.host.selinux,
                "seccomp": core.host.seccomp,
            },
            "handlers": {name: {"warnings": list(h.features.warnings)} for name, h in core.handlers.items()}
            | {k: {"problem": v} for k, v in core.broken_handlers.items()},
            "cni": dict(core.network.describe()),
            "storage": dict(core.images.describe()),
            "nri": core.nri.describe(),
        }

    async def describe_sandbox(self, record: SandboxRecord) -> dict[str, str]:
        """For PodSandboxStatus(verbose)."""
        pins = self.core.paths.pins(record.id)
        linux = record.config.linux
        info: dict[str, Any] = {
            "pid": record.holder_pid,
            "handler": record.handler,
            "namespaces": str(pins),
            "cgroupParent": linux.cgroup_parent,
            "cgroupOwned": bool(record.owned_cgroup),
            "overhead": to_json(linux.overhead) if linux.overhead else None,
            "resources": to_json(linux.resources) if linux.resources else None,
        }
        info |= await holder_of(self.core, record).info(record)
        return {"info": json.dumps(info)}

    def describe_container(self, record: ContainerRecord) -> dict[str, str]:
        """For ContainerStatus(verbose). The specification is included whole, because the caller owns the pod."""
        info: dict[str, Any] = {"pid": record.pid, "sandboxID": record.sandbox_id, "handler": record.handler, "cgroup": record.cgroup}
        with contextlib.suppress(OSError, ValueError):
            info["runtimeSpec"] = json.loads((self.core.paths.bundle(record.id) / "config.json").read_bytes())
        return {"info": json.dumps(info)}


def _make_directories(paths: Paths) -> None:
    # 0711: a process in a user namespace must be able to walk to its root file system.
    for directory in (paths.state, paths.state / "sandboxes", paths.bundles):
        private_dir(directory, 0o711)
    for directory in (paths.exits, paths.sockets, paths.root / "volumes"):
        private_dir(directory)
    discard(paths.root / "checkpoints")  # half-made ones of a daemon that was killed
