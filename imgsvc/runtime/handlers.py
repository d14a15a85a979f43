"""Builds and starts the configured runtime handlers; one that does not work does not stop the others."""

from __future__ import annotations

import logging

from imgsvc.errors import ImgsvcError, InvalidArgument, printable
from imgsvc.runtime.interfaces import OCIRuntime
from imgsvc.runtime.monitor import MonitorPaths
from imgsvc.runtime.oci_runtime import OCICommand
from imgsvc.runtime.reaper import Reaper
from imgsvc.runtime.settings import HandlerSettings, RuntimeSettings
from imgsvc.runtime.shim.handler import ShimRuntime

log = logging.getLogger(__name__)


async def start_handlers(settings: RuntimeSettings, paths: MonitorPaths, reaper: Reaper) -> tuple[dict[str, OCIRuntime], dict[str, str]]:
    """Working handlers by name, and why the others do not work."""
    working: dict[str, OCIRuntime] = {}
    broken: dict[str, str] = {}
    for name, handler in settings.handlers.items():
        try:
            runtime = build_handler(handler, settings, paths, reaper)
            await runtime.start()
        except ImgsvcError as error:
            log.error("runtime handler %s is not usable: %s", name, error)
            broken[name] = str(error)
        else:
            working[name] = runtime
    return working, broken


def build_handler(handler: HandlerSettings, settings: RuntimeSettings, paths: MonitorPaths, reaper: Reaper) -> OCIRuntime:
    """The implementation for a handler's type. Raises: InvalidArgument."""
    if handler.sandboxer not in ("", "podsandbox", "shim"):
        raise InvalidArgument(f'no sandboxer "{printable(handler.sandboxer, 40)}"', hint="use podsandbox or shim")
    if handler.type == "oci" and handler.sandboxer == "shim":
        raise InvalidArgument('sandboxer = "shim" needs a shim', hint="set the handler's type to io.containerd.NAME.vN")
    if handler.type != "oci":
        return ShimRuntime(handler, settings, paths.bundles)
    return OCICommand(handler, settings, paths, reaper)
