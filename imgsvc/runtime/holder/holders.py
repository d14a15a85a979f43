"""Starts, watches and ends what holds pods. When what holds a pod ends by itself, the pod is not ready any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from imgsvc.base.concurrency import stop_tasks
from imgsvc.base.errors import Unimplemented
from imgsvc.base.failpoints import afailpoint
from imgsvc.runtime.core import Core
from imgsvc.runtime.holder.choice import holder_of, kind_of, suitable
from imgsvc.runtime.processes.exits import alive, persistently, start_time
from imgsvc.runtime.records import SandboxRecord, durable

log = logging.getLogger(__name__)

Lost = Callable[[str], Awaitable[None]]


class Holders:
    """One per daemon. lost: called with a sandbox's ID when what held it has ended by itself."""

    def __init__(self, core: Core, lost: Lost) -> None:
        self._core = core
        self._lost = lost
        self._watchers: dict[str, asyncio.Task[None]] = {}

    async def start(self, record: SandboxRecord) -> SandboxRecord:
        """The record with what holds the pod from now on. Raises: FailedPrecondition; end() is owed then, too."""
        _, *others = suitable(self._core, record)
        for kind in others:
            try:
                return await self._start(record)
            except Unimplemented:
                log.warning('the shims of runtime handler "%s" make no pods; its pods are held by: %s', record.handler, kind.name)
                await self.end(record)
                record = replace(record, holder=kind.name)
                await durable(self._core.records.put_sandbox(record))  # so that a later daemon ends the right thing
        return await self._start(record)

    async def _start(self, record: SandboxRecord) -> SandboxRecord:
        pid = await holder_of(self._core, record).start(record)
        return replace(record, holder_pid=pid, holder_start=start_time(pid) if pid else 0)

    async def end(self, record: SandboxRecord) -> None:
        """End whatever holds a pod, whole or half-made. Idempotent. Raises: ImgsvcError when it does not go."""
        self._unwatch(record.id)
        now = self._core.records.sandboxes.get(record.id, record)  # start() may have given it another holder since
        await holder_of(self._core, replace(record, holder=now.holder)).end(record)

    def watch(self, record: SandboxRecord) -> None:
        """From now on, tell when what holds a ready pod has ended; also for a pod of an earlier daemon."""
        if kind_of(record).can_end:
            self._watchers[record.id] = asyncio.create_task(self._watch(record), name=f"hold-{record.id[:12]}")

    async def _watch(self, record: SandboxRecord) -> None:
        await persistently(
            f"what holds pod sandbox {record.id}",
            lambda: self._wait(record),
            lambda: bool(record.holder_pid) and not alive(record.holder_pid, record.holder_start),
        )
        self._watchers.pop(record.id, None)
        await self._lost(record.id)

    async def _wait(self, record: SandboxRecord) -> None:
        await afailpoint("watch.pod")
        await holder_of(self._core, record).wait(record)

    def _unwatch(self, sandbox_id: str) -> None:
        if watcher := self._watchers.pop(sandbox_id, None):
            watcher.cancel()

    async def close(self) -> None:
        """Stop watching; the pods stay."""
        await stop_tasks(*self._watchers.values())
