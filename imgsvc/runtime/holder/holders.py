"""What holds a pod beyond its pinned namespaces, where something does.

* A shared PID namespace, or a shim that builds its pod from a sandbox container: a pause process.
* A handler with `sandboxer = "shim"`: the pod that its shim makes. A shim that makes none gets a pause process, if it needs one.

The others are held by nothing. When what holds a pod ends, the pod is not ready any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import Unimplemented
from imgsvc.base.failpoints import afailpoint
from imgsvc.runtime.core import Core
from imgsvc.runtime.holder.namespaces import pinned
from imgsvc.runtime.holder.pause import write_pause
from imgsvc.runtime.interfaces import NewPod, PodRuntime
from imgsvc.runtime.model import NamespaceMode
from imgsvc.runtime.numbers import cgroups
from imgsvc.runtime.processes.exits import alive, persistently, process_gone, start_time
from imgsvc.runtime.records import SandboxRecord
from imgsvc.runtime.rootfs import remove_bundle
from imgsvc.runtime.spec.build import DEFAULT_PATH, OCI_VERSION, oom_score, sandbox_annotations
from imgsvc.runtime.spec.seccomp import default_profile

log = logging.getLogger(__name__)

_PAUSE_OOM_SCORE: Final = -998  # the last of the pod to be killed
_PAUSE_USER: Final = 65535

Lost = Callable[[str], Awaitable[None]]


class Holders:
    """Starts, watches and ends them. lost: called with a sandbox's ID when what held it has ended by itself."""

    def __init__(self, core: Core, lost: Lost) -> None:
        self._core = core
        self._lost = lost
        self._watchers: dict[str, asyncio.Task[None]] = {}

    async def start(self, record: SandboxRecord) -> SandboxRecord:
        """The record with what holds the pod from now on. Raises: FailedPrecondition; end() is owed then, too."""
        core = self._core
        if pods := self._pods(record):
            try:
                pid = await pods.run_pod(self._new_pod(record))
                return replace(record, pause_pid=pid, pause_start=start_time(pid) if pid else 0)
            except Unimplemented:
                log.warning('the shims of runtime handler "%s" make no pods; its pods are made of namespaces', record.handler)
                await self.end(record)
                record = replace(record, sandboxer="")
        if record.config.namespaces.pid == NamespaceMode.POD or core.runtime_of(record).features.needs_pause:
            pid = await self._start_pause(record)
            return replace(record, pause_pid=pid, pause_start=start_time(pid))
        return record

    def _new_pod(self, record: SandboxRecord) -> NewPod:
        pins = self._core.paths.pins(record.id)
        return NewPod(
            sandbox_id=record.id,
            config=record.config,
            netns=str(pins / "net") if pinned(pins, "net") else "",
            annotations=self._annotations(record),
        )

    def _annotations(self, record: SandboxRecord) -> dict[str, str]:
        return sandbox_annotations(record.id, record.config, self._core.handler_settings(record.handler).pod_annotations)

    async def end(self, record: SandboxRecord) -> None:
        """End whatever holds a pod, whole or half-made. Idempotent. Raises: ImgsvcError when it does not go."""
        self._unwatch(record.id)
        bundle = self._core.paths.bundle(record.id)
        if pods := self._pods(record):
            await pods.end_pod(record.id)
        elif alive(record.pause_pid, record.pause_start):
            os.kill(record.pause_pid, signal.SIGKILL)
            await process_gone(record.pause_pid, record.pause_start)
        if bundle.exists():
            if not self._pods(record) and (runtime := self._core.find_runtime(record)):
                await runtime.delete(record.id)
            await in_thread(remove_bundle, bundle)

    def _pods(self, record: SandboxRecord) -> PodRuntime | None:
        """What makes, or has made, the pod, when its shim does."""
        runtime = self._core.find_runtime(record)
        return runtime.pods if runtime and record.sandboxer else None

    def watch(self, record: SandboxRecord) -> None:
        """From now on, tell when what holds a ready pod has ended; also for a pod of an earlier daemon."""
        if record.sandboxer or record.pause_pid:
            self._watchers[record.id] = asyncio.create_task(self._watch(record), name=f"hold-{record.id[:12]}")

    async def _watch(self, record: SandboxRecord) -> None:
        await persistently(
            f"what holds pod sandbox {record.id}",
            lambda: self._wait(record),
            lambda: bool(record.pause_pid) and not alive(record.pause_pid, record.pause_start),
        )
        self._watchers.pop(record.id, None)
        await self._lost(record.id)

    async def _wait(self, record: SandboxRecord) -> None:
        await afailpoint("watch.pod")
        if pods := self._pods(record):
            await pods.wait_pod(record.id)
        else:
            await process_gone(record.pause_pid, record.pause_start)

    def _unwatch(self, sandbox_id: str) -> None:
        if watcher := self._watchers.pop(sandbox_id, None):
            watcher.cancel()

    async def close(self) -> None:
        """Stop watching; the pods stay."""
        watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher.cancel()
        if watchers:
            await asyncio.wait(watchers)

    async def _start_pause(self, record: SandboxRecord) -> int:
        core = self._core
        bundle = core.paths.bundle(record.id)
        await in_thread(self._write_pause_bundle, record, bundle)
        return await core.runtime_of(record).start_pause(record.id, bundle)

    def _write_pause_bundle(self, record: SandboxRecord, bundle: Path) -> None:
        write_pause(bundle / "rootfs")
        if record.config.namespaces.user:
            owner = record.config.namespaces.user.uids[0].host_id
            os.chown(bundle / "rootfs", owner, owner)
        (bundle / "config.json").write_text(json.dumps(self._pause_spec(record)))

    def _pause_spec(self, record: SandboxRecord) -> dict[str, Any]:
        core, config = self._core, record.config
        systemd = core.settings.cgroup_driver == "systemd"
        pins = core.paths.pins(record.id)
        joined = {"network": "net", "uts": "uts", "ipc": "ipc", "user": "user"}
        namespaces = [{"type": "pid"}, {"type": "mount"}]
        namespaces += [{"type": kind, "path": str(pins / name)} for kind, name in joined.items() if pinned(pins, name)]
        linux: dict[str, Any] = {
            "namespaces": namespaces,
            "cgroupsPath": cgroups.runtime_path(config.linux.cgroup_parent, record.id, record.id, systemd=systemd),
        }
        label = {} if config.linux.security_context.privileged or not record.selinux else {"selinuxLabel": record.selinux}
        if core.host.seccomp:
            linux["seccomp"] = default_profile(frozenset())
        if user := config.namespaces.user:
            for name, mappings in (("uidMappings", user.uids), ("gidMappings", user.gids)):
                linux[name] = [{"containerID": m.container_id, "hostID": m.host_id, "size": m.length} for m in mappings]
        nobody = _PAUSE_USER if not config.namespaces.user else min(_PAUSE_USER, config.namespaces.user.uids[0].length - 1)
        # Of the pod's namespace already; a kernel of the pod's own has its name from its first container.
        named = {"hostname": config.hostname} if config.hostname and pinned(pins, "uts") else {}
        return {
            "ociVersion": OCI_VERSION,
            **named,
            "process": {
                "args": ["/pause"],
                "env": [DEFAULT_PATH],  # some runtimes refuse a process without
                "cwd": "/",
                "user": {"uid": nobody, "gid": nobody},
                "noNewPrivileges": True,
                "oomScoreAdj": oom_score(_PAUSE_OOM_SCORE, core.host, restrict=False),
                **label,
            },
            "root": {"path": "rootfs", "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "mode=755", "size=64k"]},
            ],
            "annotations": self._annotations(record),
            "linux": linux,
        }
