"""The daemon's life: build everything, serve until a signal, stop cleanly, and take over a changed configuration on the way."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from imgsvc import __version__
from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import FailedPrecondition, ImgsvcError
from imgsvc.config import Loaded
from imgsvc.daemon.background import background
from imgsvc.daemon.build import Services, build
from imgsvc.daemon.listen import listen_grpc
from imgsvc.daemon.systemd import Notifier

log = logging.getLogger(__name__)

STOP_GRACE_S: Final = 5.0  # how long running calls may go on after SIGTERM; systemd waits 90 s
_DESCRIPTORS: Final = 1024  # open files; every default soft limit is at least as high


def run(load: Callable[[], Loaded]) -> int:
    """Serve until SIGTERM or SIGINT. `load` reads the configuration, now and at every SIGHUP. Returns the exit code."""
    _require_descriptors()
    loaded = load()
    if hasattr(asyncio, "PidfdChildWatcher"):
        # Python 3.11 would spend a thread per child; later versions use pidfds by themselves.
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    return asyncio.run(_serve(loaded, load))


def _require_descriptors() -> None:
    """Raise the limit of open files to what a node needs, not further: containers inherit it. Raises: FailedPrecondition."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < _DESCRIPTORS:
        raise FailedPrecondition(
            f"this process may open {hard} files, and needs {_DESCRIPTORS}",
            hint="raise the hard limit: LimitNOFILE= of the unit, ulimit -Hn",
        )
    if resource.RLIM_INFINITY != soft < _DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, hard))


async def _serve(loaded: Loaded, load: Callable[[], Loaded]) -> int:
    began = time.monotonic()
    reloads: list[asyncio.Future[None]] = []  # the loop itself keeps no task alive
    notify = Notifier()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        # What is built now stays. With 10 000 images, looking through it for garbage takes 0.5 s each time, on this loop.
        gc.disable()
        services = await build(loaded, stack)
        gc.freeze()
        gc.enable()
        server = await listen_grpc(loaded.config, services.public, services.add_to, services.telemetry.observer.rpc)
        loop.add_signal_handler(signal.SIGHUP, lambda: reloads.append(asyncio.ensure_future(_reload(services, load))))
        log.info("ready: imgsvc %s on %s after %.2f s", __version__, loaded.config.address, time.monotonic() - began)
        notify("READY=1")
        background(stack, notify.keep_alive(services.is_well))
        await stop.wait()
        notify("STOPPING=1")
        log.info("stopping; containers keep running")
        services.telemetry.bus.close()
        services.public.withdraw()
        await server.stop(STOP_GRACE_S)
    log.info("stopped")
    return 0


async def _reload(services: Services, load: Callable[[], Loaded]) -> None:
    """SIGHUP. A bad file changes nothing; hosts.toml, policy, key and pre-pull files are read as they are needed anyway."""
    try:
        new = await in_thread(load)
        if services.streams is not None:
            await services.streams.reload_certificate()
        services.reloader.reload(new)
        await in_thread(services.preflight.run, services.reloader.loaded)
    except ImgsvcError as error:
        log.error("configuration not reloaded: %s", error)
