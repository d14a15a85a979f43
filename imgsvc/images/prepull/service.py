"""Keeps the stored images in step with the wanted ones, for as long as the daemon runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import Threads, stop_tasks, time_limit
from imgsvc.base.errors import ImgsvcError
from imgsvc.base.failpoints import afailpoint
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import Platform
from imgsvc.images.prepull.plan import Plan, Wanted, load_plan
from imgsvc.images.prepull.throttle import Throttle, ThrottledRegistry
from imgsvc.images.pull import Pulled, PullRequest
from imgsvc.images.records import ImageStore
from imgsvc.registry.interfaces import Registry

log = logging.getLogger(__name__)

TABLE: Final = "prepull"
POLL_S: Final = 5.0  # between two looks at the files and the clock
FIRST_RETRY_S: Final = 30.0  # after the first failure; doubled with every further one
LAST_RETRY_S: Final = 1800.0
MAX_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known of a wanted image; kept across restarts. Times [s since the epoch], 0: never."""

    tried_at: float = 0.0
    succeeded_at: float = 0.0
    failures: int = 0
    error: str = ""
    image_id: str = ""


def next_try(wanted: Wanted, memory: Memory, *, present: bool) -> float | None:
    """When an image is to be pulled (again) [s since the epoch]; None: not any more. Pure."""
    if memory.failures:
        return memory.tried_at + min(FIRST_RETRY_S * 2.0 ** min(memory.failures - 1, 20), LAST_RETRY_S)
    if not present or not memory.succeeded_at:
        return 0.0
    return memory.succeeded_at + wanted.every if wanted.every else None


@dataclass(slots=True)
class _Loaded:
    """A file as it was read last. stamp: of the file then; error: how it is broken; plan: the last good one, None when there was none."""

    stamp: tuple[int, int, int]
    plan: Plan | None
    error: str
    throttle: Throttle | None


@dataclass(frozen=True, slots=True)
class PullPath:
    """How one image is pulled. pull: as Puller.pull. registry: what a throttled pull reads from. snapshotter: what it unpacks into."""

    pull: Callable[[PullRequest], Awaitable[Pulled]]
    registry: Registry
    snapshotter: str


class Prepull:
    """One per daemon; `run` is its life."""

    def __init__(
        self,
        directory: Path,
        *,
        root: Path,
        path: PullPath,
        images: ImageStore,
        db: MetaDB,
        threads: Threads,
        clock: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
    ) -> None:
        """directory: of the files; root: where images live, for min_free."""
        self._directory = directory
        self._root = root
        self._path = path
        self._images = images
        self._db = db
        self._threads = threads
        self._clock = clock
        self._poll_s = poll_s
        self._files: dict[str, _Loaded] = {}
        self._memory: dict[str, Memory] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        with db.read() as txn:
            self._memory = {key: Memory(**record) for key, record in txn.items(TABLE)}

    async def run(self) -> None:
        """Until cancelled; a round that fails is logged, and there will be another."""
        try:
            while True:
                try:
                    await self._round()
                except (ImgsvcError, OSError) as error:
                    log.error("looking for images to pre-pull failed, trying again: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with time_limit(self._poll_s):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            await stop_tasks(*self._running.values())

    async def _round(self) -> None:
        if await self._threads.run(self._read_files):
            self._pin()
            await self._forget()
        for loaded in self._files.values():
            if loaded.plan is not None:
                self._start_due(loaded.plan, loaded.throttle)

    def watch(self, directory: Path) -> None:
        """Go by the files of another directory from now on."""
        self._directory = directory
        self._wake.set()

    def now(self) -> None:
        """Try all images at once, whatever failed before or was checked recently; closed windows stay closed."""
        self._memory = {key: replace(memory, failures=0, succeeded_at=0.0) for key, memory in self._memory.items()}
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """What `imgsvc prepull --status` shows, as JSON."""
        files = [
            {
                "file": name,
                "error": loaded.error,
                "images": [self._state(loaded.plan, wanted) for wanted in loaded.plan.images] if loaded.plan else [],
            }
            for name, loaded in sorted(self._files.items())
        ]
        return {"directory": str(self._directory), "files": files}

    def counts(self) -> dict[tuple[str, ...], float]:
        """Images by state, for metrics."""
        found: dict[tuple[str, ...], float] = {(state,): 0.0 for state in ("present", "pulling", "waiting", "failed")}
        for plan in [loaded.plan for loaded in self._files.values() if loaded.plan]:
            for wanted in plan.images:
                found[(self._state(plan, wanted)["state"],)] += 1
        return found

    def _state(self, plan: Plan, wanted: Wanted) -> dict[str, Any]:
        memory = self._memory.get(wanted.key, Memory())
        due = next_try(wanted, memory, present=self._is_here(wanted, memory))
        if wanted.key in self._running:
            state = "pulling"
        elif memory.failures:
            state = "failed"
        else:
            state = "present" if due is None or self._is_here(wanted, memory) else "waiting"
        opens = plan.windows.opens_in(self._local()).total_seconds()
        why = ""
        if state in ("waiting", "failed"):
            why = "its window is closed" if opens else "" if self._has_room(plan) else "less than min_free is free"
        return {
            "reference": str(wanted.reference),
            "platform": str(wanted.platform),
            "pin": wanted.pin,
            "state": state,
            "waitsFor": why,
            "imageID": memory.image_id,
            "lastTry": memory.tried_at,
            "lastSuccess": memory.succeeded_at,
            "failures": memory.failures,
            "error": memory.error,
            "nextTry": None if due is None else max(due, self._clock() + opens),
        }

    def _read_files(self) -> bool:
        """Read what has changed; whether anything has. On a thread."""
        seen: dict[str, _Loaded] = {}
        try:
            names = sorted(name for name in os.listdir(self._directory) if name.endswith(".toml"))[:MAX_FILES]
        except FileNotFoundError:
            names = []
        for name in names:
            path = self._directory / name
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            before = self._files.get(name)
            seen[name] = before if before is not None and before.stamp == stamp else _read(path, stamp, before)
        changed = seen != self._files
        self._files = seen
        return changed

    def _pin(self) -> None:
        """By name, and by ID: of one name's images for several platforms only one has the name."""
        pinned = [wanted for wanted in self._wanted() if wanted.pin]
        ids = [memory.image_id for wanted in pinned if (memory := self._memory.get(wanted.key)) and memory.image_id]
        self._images.pin([*(str(wanted.reference) for wanted in pinned), *ids], owner="prepull")

    async def _forget(self) -> None:
        """Drop what is remembered of images that no file wants any more, unless a file cannot be read."""
        if any(loaded.plan is None for loaded in self._files.values()):
            return
        wanted = {w.key for w in self._wanted()}
        gone = [key for key in self._memory if key not in wanted]
        for key in gone:
            del self._memory[key]
        for key in set(self._running) - wanted:
            self._running[key].cancel()
        if gone:
            await self._db.awrite(lambda txn: [txn.delete(TABLE, key) for key in gone])

    def _wanted(self) -> Iterable[Wanted]:
        return [wanted for loaded in self._files.values() if loaded.plan for wanted in loaded.plan.images]

    def _start_due(self, plan: Plan, throttle: Throttle | None) -> None:
        left = plan.windows.closes_in(self._local())
        if left is None or not self._has_room(plan):
            return
        free = plan.concurrent - sum(1 for wanted in plan.images if wanted.key in self._running)
        for wanted in plan.images:
            if free <= 0:
                return
            memory = self._memory.get(wanted.key, Memory())
            due = next_try(wanted, memory, present=self._is_here(wanted, memory))
            if due is not None and due <= self._clock() and wanted.key not in self._running:
                self._running[wanted.key] = asyncio.ensure_future(self._bring(wanted, left, throttle))
                free -= 1

    async def _bring(self, wanted: Wanted, left: timedelta, throttle: Throttle | None) -> None:
        memory = self._memory.get(wanted.key, Memory())
        window = time_limit(left.total_seconds())
        try:
            async with window:
                credential = await self._threads.run(wanted.credential)
                source = ThrottledRegistry(self._path.registry, throttle) if throttle else None
                request = PullRequest(wanted.reference, credential, wanted.platform, self._path.snapshotter, source=source)
                pulled = await self._path.pull(request)
            await afailpoint("prepull.pulled")
            now = self._clock()
            await self._keep(wanted, Memory(now, now, 0, "", pulled.image.image_id))
        except TimeoutError:
            if not window.expired():
                raise
            log.info("pre-pull of %s goes on in the next window", wanted.reference)
        except Exception as error:  # a task's edge: whatever it was, the other images go on
            if not isinstance(error, ImgsvcError):
                log.exception("pre-pull of %s failed unexpectedly", wanted.reference)
            log.warning("pre-pull of %s failed: %s", wanted.reference, error)
            await self._keep(wanted, replace(memory, tried_at=self._clock(), failures=memory.failures + 1, error=str(error)))
        finally:
            del self._running[wanted.key]
            self._wake.set()

    async def _keep(self, wanted: Wanted, memory: Memory) -> None:
        self._memory[wanted.key] = memory
        if wanted.pin:
            self._pin()
        record = asdict(memory)
        await self._db.awrite(lambda txn: txn.put(TABLE, wanted.key, record))

    def _is_here(self, wanted: Wanted, memory: Memory) -> bool:
        """Whether the image is stored, under its name; for another platform than the node's, another pull may own the name."""
        if wanted.platform == Platform.host():
            found = self._images.named(wanted.reference)
            return found is not None and found.image_id == memory.image_id
        return bool(memory.image_id) and self._images.get(memory.image_id) is not None

    def _has_room(self, plan: Plan) -> bool:
        stats = os.statvfs(self._root)
        return stats.f_bavail * stats.f_frsize >= plan.min_free

    def _local(self) -> datetime:
        return datetime.fromtimestamp(self._clock()).astimezone()


def _read(path: Path, stamp: tuple[int, int, int], before: _Loaded | None) -> _Loaded:
    try:
        plan = load_plan(path)
    except ImgsvcError as error:
        log.error("pre-pull file not used: %s", error)
        return _Loaded(stamp, before.plan if before else None, str(error), before.throttle if before else None)
    return _Loaded(stamp, plan, "", Throttle(plan.bandwidth) if plan.bandwidth else None)
