"""What a restarted daemon does with what it finds.

Records tell what may exist. Half-made sandboxes and containers are rolled back; containers that ran are watched again,
and if they ended meanwhile their stored exit code is taken; commands run in them for a caller are ended, because nothing
reads them any more; an undo that failed before is tried again. After a reboot, or when STATE was wiped,
nothing in STATE exists any more: containers are finished with an unknown code, pods are not ready, networks are detached
(an address manager on disk would keep their addresses for ever).

The daemon serves before pods that are lost are stopped: what detaches them may take its time, or hang.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final

from imgsvc.base.concurrency import all_of, in_thread
from imgsvc.base.errors import ImgsvcError
from imgsvc.runtime.containers import Containers
from imgsvc.runtime.core import Core
from imgsvc.runtime.handlers.oci.exec import end_interrupted
from imgsvc.runtime.holder.choice import holder_of
from imgsvc.runtime.holder.namespaces import pinned
from imgsvc.runtime.interfaces import Exit
from imgsvc.runtime.model import NamespaceMode
from imgsvc.runtime.processes.exits import UNKNOWN_EXIT, now_ns
from imgsvc.runtime.records import ContainerRecord, SandboxRecord, durable
from imgsvc.runtime.rootfs import remove_bundle
from imgsvc.runtime.sandboxes import Sandboxes

log = logging.getLogger(__name__)

_STOPS_AT_ONCE: Final = 4


async def recover(core: Core, sandboxes: Sandboxes, containers: Containers) -> list[str]:
    """Bring records and node into agreement. Failures are logged and tried again at the next start.

    Returns the pods that are lost and still to be stopped, for stop_lost().
    """
    lost: list[str] = []
    for container in list(core.records.containers.values()):
        await _tolerate(_container(core, containers, container), f"container {container.id}")
    for sandbox in list(core.records.sandboxes.values()):
        await _tolerate(_sandbox(core, sandboxes, sandbox, lost), f"pod sandbox {sandbox.id}")
    await in_thread(_sweep_directories, core, core.records.sandboxes.keys() | core.records.containers.keys())
    attached = {s.id for s in core.records.sandboxes.values() if s.network}
    await _tolerate(core.network.collect(attached), "the network")
    return lost


async def stop_lost(sandboxes: Sandboxes, lost: Sequence[str]) -> None:
    """Stop pods that recover() found lost, some beside one another."""
    places = asyncio.Semaphore(_STOPS_AT_ONCE)

    async def stop(sandbox_id: str) -> None:
        async with places:
            await _tolerate(sandboxes.stop(sandbox_id), f"pod sandbox {sandbox_id}")

    await all_of(*(stop(sandbox_id) for sandbox_id in lost))


async def _tolerate(step: object, what: str) -> None:
    try:
        await step  # type: ignore[misc]
    except (ImgsvcError, OSError) as error:
        log.error("recovering %s: %s", what, error)


async def _container(core: Core, containers: Containers, record: ContainerRecord) -> None:
    if not record.made_at or record.sandbox_id not in core.records.sandboxes:
        log.warning("container %s was half-made when the daemon died; it is removed", record.id)
        await containers.discard(record)
    elif record.finished_at or (record.start_error and record.boot_id == core.boot_id):
        return
    elif record.boot_id != core.boot_id:
        await containers.finish(record.id, Exit(UNKNOWN_EXIT, now_ns(), known=False))
    else:
        containers.watch(record)


async def _sandbox(core: Core, sandboxes: Sandboxes, record: SandboxRecord, lost: list[str]) -> None:
    if not record.started_at:
        log.warning("pod sandbox %s was half-made when the daemon died; it is removed", record.id)
        await sandboxes.roll_back(record)
        return
    if not record.stopped_at and (
        record.boot_id != core.boot_id or not _pins_there(core, record) or holder_of(core, record).has_ended(record)
    ):
        log.warning("pod sandbox %s did not survive; it is not ready any more", record.id)
        lost.append(record.id)
        await durable(core.records.put_sandbox(replace(record, stopped_at=now_ns())))
    elif not record.stopped_at:
        sandboxes.watch(record)
    elif record.network:
        lost.append(record.id)


def _pins_there(core: Core, record: SandboxRecord) -> bool:
    pins = core.paths.pins(record.id)
    options = record.config.namespaces
    wanted = ["net"] if options.network != NamespaceMode.NODE else []
    wanted += ["ipc"] if options.ipc != NamespaceMode.NODE else []
    return all(pinned(pins, kind) for kind in wanted)


def _sweep_directories(core: Core, known: AbstractSet[str]) -> None:
    """Directories that no record names: left by a removal that was interrupted after its last step. known: IDs of all records."""
    for parent in (core.paths.state / "sandboxes", core.paths.bundles, core.paths.root / "volumes"):
        for directory in list(parent.iterdir()):
            if directory.name not in known:
                log.warning("removing %s, which belongs to nothing", directory)
                remove_bundle(directory)
    for bundle in list(core.paths.bundles.iterdir()):
        end_interrupted(bundle, bundle.name)
    for left in list(core.paths.exits.iterdir()) + list(core.paths.sockets.iterdir()):
        if left.name not in known:
            left.unlink(missing_ok=True)
