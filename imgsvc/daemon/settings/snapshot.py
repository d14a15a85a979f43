"""[images] as the snapshot drivers and the unpacker take it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import FailedPrecondition
from imgsvc.base.metadb.database import MetaDB
from imgsvc.config import Config, Loaded
from imgsvc.snapshot import detect, native, overlay
from imgsvc.snapshot.erofs import driver as erofs
from imgsvc.snapshot.erofs.build import OpenLayer
from imgsvc.snapshot.interfaces import Limits, ScrubbableSnapshotter
from imgsvc.snapshot.unpack.unpacker import WorkerUnpacker

log = logging.getLogger(__name__)

UNPACKER_KEYS: Final = ("images.max_concurrent_unpacks", "images.limits")
_TRANSFORM: Final = "imgsvc.decrypt.aesctr:open_transform"  # what an unpack worker decrypts with


@dataclass(frozen=True, slots=True)
class Drivers:
    """by_name: the drivers this node can use, the default one first. described: what to say of them in Status."""

    by_name: dict[str, ScrubbableSnapshotter]
    described: dict[str, Any]


def open_unpacker(settings: Config, queued: Callable[[float], None]) -> WorkerUnpacker:
    """Build it; no worker runs yet. queued: called with the time [s] that a layer waited for a worker."""
    return WorkerUnpacker(
        max_concurrent=settings.images.max_concurrent_unpacks,
        limits=_limits(settings),
        transform=_TRANSFORM,
        queued=queued,
    )


def reconfigure(unpacker: WorkerUnpacker, loaded: Loaded) -> Callable[[], None]:
    """What puts other settings in force."""
    return lambda: unpacker.configure(loaded.config.images.max_concurrent_unpacks, _limits(loaded.config))


def _limits(settings: Config) -> Limits:
    limits = settings.images.limits
    return Limits(limits.unpacked_bytes, limits.entries, limits.ratio)


async def open_drivers(
    settings: Config, root: Path, db: MetaDB, threads: Threads, unpacker: WorkerUnpacker, stack: AsyncExitStack
) -> Drivers:
    """Open every driver this node can use and clean up after each. Raises: FailedPrecondition when the configured one cannot work."""
    detected = await threads.run(detect.detect, root / overlay.NAME)
    wanted = _wanted(settings, detected)
    log.info("snapshotter %s: %s", wanted, detected.reason)
    drivers: dict[str, ScrubbableSnapshotter] = {}
    described: dict[str, Any] = {"snapshotter": wanted, "detected": detected.reason, native.NAME: {"idmapped": detected.idmapped}}
    if detected.options is not None:
        options = replace(detected.options, **asdict(settings.images.overlayfs))
        drivers[overlay.NAME] = overlay.OverlaySnapshotter(root / overlay.NAME, db, options)
        described[overlay.NAME] = asdict(options)
        if not detected.without_erofs:
            drivers[erofs.NAME] = erofs.ErofsSnapshotter(root / erofs.NAME, db, options, build=_build_by(unpacker))
        described[erofs.NAME] = detected.without_erofs or "usable"
    drivers[native.NAME] = native.NativeSnapshotter(root / native.NAME, db, idmapped=detected.idmapped)
    for driver in drivers.values():
        stack.callback(driver.close)
        if count := await threads.run(driver.cleanup):
            log.warning("snapshotter %s: %d unfinished snapshots cleaned up", driver.name, count)
    return Drivers({wanted: drivers.pop(wanted), **drivers}, described)


def _wanted(settings: Config, detected: detect.Detected) -> str:
    """The default driver's name. Raises: FailedPrecondition when the configured one cannot work here."""
    wanted = detected.driver if settings.images.snapshotter == "auto" else settings.images.snapshotter
    if wanted == overlay.NAME and detected.options is None:
        raise FailedPrecondition(detected.reason, where="images.snapshotter", hint='use "native", or another file system for root')
    if wanted == erofs.NAME and detected.without_erofs:
        raise FailedPrecondition(f"this kernel cannot do it: {detected.without_erofs}", where="images.snapshotter", hint='use "overlayfs"')
    return wanted


def _build_by(unpacker: WorkerUnpacker) -> erofs.Build:
    """Images are made by workers, as layers are; the drivers that ask for them run on threads."""
    loop = asyncio.get_running_loop()

    def build(layers: Sequence[OpenLayer], output: int) -> None:
        pairs = [(layer.tar, layer.index) for layer in layers]
        asyncio.run_coroutine_threadsafe(unpacker.merge(pairs, output), loop).result()

    return build
