"""[runtime], [runtime.runtimes], [cni] and [nri] as the runtime takes them."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from imgsvc.config import Config
from imgsvc.runtime.settings import CNISettings, HandlerSettings, NriSettings, RuntimeSettings


def switched_off(settings: Config) -> str:
    """Why there is no runtime; "" when there is one."""
    if not settings.runtime.enabled:
        return "runtime.enabled is false"
    return "it needs root; images are served all the same" if os.geteuid() else ""


def runtime_settings(settings: Config, state: Path, root: Path) -> RuntimeSettings:
    """What a RuntimeNode takes. state, root: the daemon's directories."""
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
    """Resolve "auto": systemd where it runs the machine and cgroup v2 is mounted, as the kubelet itself detects it."""
    if configured != "auto":
        return configured
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return "systemd" if unified and Path("/run/systemd/system").is_dir() else "cgroupfs"
