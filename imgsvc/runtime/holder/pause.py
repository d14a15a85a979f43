"""Holds a pod by a pause process: where the pod shares a PID namespace, or its handler needs a sandbox container."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import in_thread
from imgsvc.runtime.core import Core
from imgsvc.runtime.holder.interfaces import Kind
from imgsvc.runtime.holder.namespaces import pinned
from imgsvc.runtime.holder.pause_program import write_pause
from imgsvc.runtime.model import NamespaceMode
from imgsvc.runtime.numbers import cgroups
from imgsvc.runtime.numbers.usage import Usage
from imgsvc.runtime.processes.exits import alive, process_gone
from imgsvc.runtime.records import SandboxRecord
from imgsvc.runtime.rootfs import remove_bundle
from imgsvc.runtime.spec.build import DEFAULT_PATH, OCI_VERSION, oom_score, sandbox_annotations
from imgsvc.runtime.spec.seccomp import default_profile

_PAUSE_OOM_SCORE: Final = -998  # the last of the pod to be killed
_PAUSE_USER: Final = 65535


class PauseHolder:
    """Makes the pause process by the pod's handler. Satisfies PodHolder."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def start(self, record: SandboxRecord) -> int:
        """See PodHolder."""
        bundle = self._core.paths.bundle(record.id)
        await in_thread(self._write_pause_bundle, record, bundle)
        return await self._core.runtime_of(record).start_pause(record.id, bundle)

    async def end(self, record: SandboxRecord) -> None:
        """See PodHolder."""
        if alive(record.holder_pid, record.holder_start):
            os.kill(record.holder_pid, signal.SIGKILL)
            await process_gone(record.holder_pid, record.holder_start)
        bundle = self._core.paths.bundle(record.id)
        if bundle.exists():
            if runtime := self._core.find_runtime(record):
                await runtime.delete(record.id)
            await in_thread(remove_bundle, bundle)

    def has_ended(self, record: SandboxRecord) -> bool:
        """See PodHolder."""
        return bool(record.holder_pid) and not alive(record.holder_pid, record.holder_start)

    async def wait(self, record: SandboxRecord) -> None:
        """See PodHolder."""
        await process_gone(record.holder_pid, record.holder_start)

    def pid(self, record: SandboxRecord) -> int:
        """The pause process, while it is there."""
        return record.holder_pid if alive(record.holder_pid, record.holder_start) else 0

    async def info(self, record: SandboxRecord) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    async def usage(self, record: SandboxRecord) -> Usage | None:
        """None: the pod's cgroup says it."""
        return None

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
            "annotations": sandbox_annotations(record.id, config, core.handler_settings(record.handler).pod_annotations),
            "linux": linux,
        }


def _suits(core: Core, record: SandboxRecord) -> bool:
    return record.config.namespaces.pid == NamespaceMode.POD or core.runtime_of(record).features.needs_pause


KIND = Kind("pause", _suits, PauseHolder)
