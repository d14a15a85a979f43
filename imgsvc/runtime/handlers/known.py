"""Builds and starts the configured runtime handlers; one that does not work does not stop the others."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Final

from imgsvc.base.errors import ImgsvcError, InvalidArgument, from_os_error, printable
from imgsvc.runtime.handlers.oci.handler import OCICommand, sweep_self_tests
from imgsvc.runtime.handlers.oci.monitor import MonitorPaths
from imgsvc.runtime.handlers.shim.handler import ShimRuntime
from imgsvc.runtime.interfaces import OCIRuntime
from imgsvc.runtime.processes.reaper import Reaper
from imgsvc.runtime.settings import HandlerSettings, RuntimeSettings

log = logging.getLogger(__name__)

# Programs with the command line of an OCI runtime that leave their containers' streams and ends to a shim of their own.
_SHIM_TYPES: Final = {"runsc": "io.containerd.runsc.v1", "kata-runtime": "io.containerd.kata.v2"}
_SHIM_PREFIX: Final = "containerd-shim-"
_FIRST_RETRY_S: Final = 1.0
_LAST_RETRY_S: Final = 60.0


async def start_handlers(settings: RuntimeSettings, paths: MonitorPaths, reaper: Reaper) -> tuple[dict[str, OCIRuntime], dict[str, str]]:
    """Working handlers by name, and why the others do not work. They are tested beside one another."""
    working: dict[str, OCIRuntime] = {}
    broken: dict[str, str] = {}
    await sweep_self_tests(settings.state_dir)

    results = await asyncio.gather(*(_start(handler, settings, paths, reaper) for handler in settings.handlers.values()))
    for name, found in zip(settings.handlers, results, strict=True):
        if isinstance(found, ImgsvcError):
            log.error("runtime handler %s is not usable: %s", name, found)
            broken[name] = str(found)
        else:
            working[name] = found
    for warning in sorted({warning for runtime in working.values() for warning in runtime.features.warnings}):
        log.warning("%s", warning)
    return working, broken


async def _start(handler: HandlerSettings, settings: RuntimeSettings, paths: MonitorPaths, reaper: Reaper) -> OCIRuntime | ImgsvcError:
    try:
        runtime = build_handler(handler, settings, paths, reaper)
        await runtime.start()
    except ImgsvcError as error:
        return error
    except OSError as error:  # whatever it is that the configuration names: the others work
        return from_os_error(error, "testing it")
    return runtime


async def start_later(
    working: dict[str, OCIRuntime],
    broken: dict[str, str],
    runtimes: dict[str, OCIRuntime],
    settings: RuntimeSettings,
    paths: MonitorPaths,
    reaper: Reaper,
) -> None:
    """Until every handler works: a full disk or a busy node may have failed a test that passes now. The dictionaries are kept up to date."""
    pause = _FIRST_RETRY_S
    while broken:
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LAST_RETRY_S)
        for name in list(broken):
            found = await _start(settings.handlers[name], settings, paths, reaper)
            if isinstance(found, ImgsvcError):
                broken[name] = str(found)
                continue
            log.info("runtime handler %s is usable now", name)
            working[name] = found
            if isinstance(found, OCICommand) or found.description not in runtimes:  # a shim's holds connections that are in use
                runtimes[found.description] = found
            del broken[name]


async def start_earlier(
    needed: Iterable[str], working: Mapping[str, OCIRuntime], settings: RuntimeSettings, paths: MonitorPaths, reaper: Reaper
) -> dict[str, OCIRuntime]:
    """Everything that pods are or were made with, by its description: what works, and what `needed` names beyond that because the
    configuration, or the program it names, has changed since. Pods of those can be used, stopped and removed, not made.
    """
    runtimes = {runtime.description: runtime for runtime in working.values()}
    for description in sorted(set(needed) - runtimes.keys() - {""}):
        try:
            handler = HandlerSettings.described(description)
            current = working.get(handler.name)
            if handler.type != "oci" and isinstance(current, ShimRuntime):  # shims are found by their sockets, whatever started them
                runtimes[description] = current
                continue
            runtime = build_handler(handler, settings, paths, reaper)
            await runtime.start(test=False)
        except (ImgsvcError, ValueError, TypeError) as error:
            log.error("pods that were made with runtime handler %s cannot be stopped: %s", description, error)
            continue
        runtimes[description] = runtime
        log.warning("pods that an earlier configuration made still use runtime handler %s: %s", handler.name, handler.path or handler.type)
    return runtimes


def build_handler(handler: HandlerSettings, settings: RuntimeSettings, paths: MonitorPaths, reaper: Reaper) -> OCIRuntime:
    """The implementation for a handler's type. Raises: InvalidArgument."""
    if handler.sandboxer not in ("", "podsandbox", "shim"):
        raise InvalidArgument(f'no sandboxer "{printable(handler.sandboxer, 40)}"', hint="use podsandbox or shim")
    if handler.type == "oci" and handler.sandboxer == "shim":
        raise InvalidArgument('sandboxer = "shim" needs a shim', hint="set the handler's type to io.containerd.NAME.vN")
    if handler.type != "oci":
        return ShimRuntime(handler, settings, paths.bundles)
    if name := _shim_type(handler):
        raise InvalidArgument(
            f"{printable(handler.path, 200)} cannot be driven as an OCI runtime", hint=f'set type = "{name}" instead of path'
        )
    return OCICommand(handler, settings, paths, reaper)


def _shim_type(handler: HandlerSettings) -> str:
    """The type by which a program works that is given as an OCI runtime; "" when it is not known to be another."""
    name = os.path.basename(handler.path or str(handler.options.get("BinaryName") or ""))
    if name.startswith(_SHIM_PREFIX):
        return "io.containerd." + name.removeprefix(_SHIM_PREFIX).replace("-", ".")
    return _SHIM_TYPES.get(name, "")
