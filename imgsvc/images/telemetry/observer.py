"""What is measured and told of the daemon's work: one Observer fills the metrics page and the event bus.

Labels are outcomes and gRPC codes, phases of a pull, the configured endpoints (the first MAX_ENDPOINTS), methods of ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter as Count
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import MIB
from imgsvc.images.pull import Pulled, PullObserver, PullRequest
from imgsvc.images.records import Image, ImageStore
from imgsvc.images.telemetry.events import EventBus
from imgsvc.images.telemetry.metrics import MIB_PER_SECOND, Bounded, Counter, Gauge, Histogram, Page
from imgsvc.images.upkeep.collector import CollectionReport
from imgsvc.registry.interfaces import RegistryObserver

log = logging.getLogger(__name__)

MAX_ENDPOINTS: Final = 32  # different mirrors and registries that are told apart
SIZES_AGE: Final = 15.0  # [s] for which measured sizes are good enough; the usual interval of scraping
_SLOWEST_COUNTED: Final = 1 * MIB  # [bytes] a pull must have moved for its speed to mean anything


class Observer:
    """Implements pull.PullObserver and registry.RegistryObserver; `rpc`, `served` and `image` are handed to the callers that report the rest."""

    def __init__(self, page: Page, bus: EventBus) -> None:
        self._bus = bus
        self._running: Count[str] = Count()  # pulls by repository
        self._told: dict[str, set[str]] = {}  # warnings that pulls of a repository were told of, while they run
        self._endpoint = Bounded(MAX_ENDPOINTS)
        self._pulls = Counter("imgsvc_pulls_total", "Pulls that ended, by outcome (ok, cancelled, or the error's code).", ("outcome",))
        self._seconds = Histogram("imgsvc_pull_seconds", "Duration of pulls.", ("outcome",))
        self._phases = Histogram("imgsvc_pull_phase_seconds", "Seconds of successful pulls by phase, layers added up.", ("phase",))
        self._speed = Histogram("imgsvc_pull_speed_mib", "MiB per second that pulls moved over the network.", (), MIB_PER_SECOND)
        self._bytes = Counter("imgsvc_pulled_bytes_total", "Bytes of blobs by the endpoint that served them.", ("endpoint",))
        self._asked = Counter("imgsvc_registry_requests_total", "Requests of successful pulls by phase and class.", ("phase", "class"))
        self._refused = Counter("imgsvc_images_refused_total", "Images that verification refused.")
        self._served = Counter("imgsvc_mirror_bytes_total", "Bytes the mirror endpoint was asked for, by kind.", ("kind",))
        self._rpc = Histogram("imgsvc_rpc_seconds", "Duration of calls on the socket.", ("method", "code"))
        running = Gauge("imgsvc_pulls_running", "Pulls in progress.", (), lambda: {(): self._running.total()})
        page.add(self._pulls, self._seconds, self._phases, self._speed, self._bytes, self._asked)
        page.add(self._refused, self._served, self._rpc, running)
        self._queues = Histogram("imgsvc_queue_seconds", "Time that layers waited for their slot.", ("queue",))
        self._tokens = Histogram("imgsvc_token_fetch_seconds", "Duration of requests for tokens.", ("outcome",))
        self._failures = Counter("imgsvc_registry_failures_total", "Failed requests and bodies.", ("phase", "reason"))
        self._retries = Counter("imgsvc_registry_retries_total", "What followed from failures that can be decided.", ("reason", "then"))
        self._warnings = Counter("imgsvc_registry_warnings_total", "Warnings that registries sent with answers.")
        self._collections = Counter("imgsvc_gc_runs_total", "Collections: ok, incomplete (something stayed), failed.", ("outcome",))
        self._removed = Counter("imgsvc_gc_removed_total", "Things collected.", ("kind",))
        self._stayed = Counter("imgsvc_gc_failed_total", "Things that could not be removed.", ("kind",))
        self._collecting = Histogram("imgsvc_gc_seconds", "Duration of collections by phase (mark, sweep).", ("phase",))
        page.add(self._queues, self._tokens, self._failures, self._retries, self._warnings)
        page.add(self._collections, self._removed, self._stayed, self._collecting)

    def started(self, request: PullRequest) -> None:
        """See PullObserver."""
        self._running[request.reference.name] += 1
        self._bus.publish("pull-started", str(request.reference), platform=str(request.platform))

    def finished(self, request: PullRequest, outcome: Pulled | BaseException, seconds: float) -> None:
        """See PullObserver."""
        self._ended(request.reference.name)
        name = str(request.reference)
        if isinstance(outcome, Pulled):
            self._succeeded(outcome, seconds)
            details = {"imageID": outcome.image.image_id, "seconds": seconds, "bytes": dict(outcome.bytes_from)}
            self._bus.publish("pull-done", name, **details)
            return
        result = "cancelled" if isinstance(outcome, asyncio.CancelledError) else getattr(outcome, "code", "INTERNAL")
        if isinstance(outcome, ImgsvcError) and outcome.reason == "SignatureValidationFailed":
            self._refused.add()
        self._pulls.add(result)
        self._seconds.observe(seconds, result)
        self._bus.publish("pull-failed", name, code=result, error=str(outcome) if isinstance(outcome, ImgsvcError) else "", seconds=seconds)

    def _ended(self, repository: str) -> None:
        self._running[repository] -= 1
        if not self._running[repository]:
            del self._running[repository]
            self._told.pop(repository, None)

    def _succeeded(self, pulled: Pulled, seconds: float) -> None:
        self._pulls.add("ok")
        self._seconds.observe(seconds, "ok")
        for phase, spent in pulled.timings.items():
            self._phases.observe(spent, phase)
        for endpoint, count in pulled.bytes_from.items():
            self._bytes.add(self._endpoint(endpoint), by=count)
        for attempt in pulled.attempts:
            self._asked.add(attempt.phase, f"{attempt.status // 100}xx" if attempt.status else "no answer")
        moved = sum(pulled.bytes_from.values())
        if moved >= _SLOWEST_COUNTED and seconds > 0:
            self._speed.observe(moved / MIB / seconds)

    def image(self, change: str, image: Image) -> None:
        """For ImageStore.watch."""
        names = list(image.repo_tags or image.repo_digests)
        self._bus.publish(f"image-{change}", names[0] if names else image.image_id, imageID=image.image_id, names=names)

    def served(self, kind: str, size: int) -> None:
        """For Mirror."""
        self._served.add(kind, by=size)

    def queued(self, seconds: float) -> None:
        """See RegistryObserver."""
        self._queues.observe(seconds, "download")

    def unpack_queued(self, seconds: float) -> None:
        """For WorkerUnpacker."""
        self._queues.observe(seconds, "unpack")

    def token(self, outcome: str, seconds: float) -> None:
        """See RegistryObserver."""
        self._tokens.observe(seconds, outcome)

    def failed(self, phase: str, failure: str) -> None:
        """See RegistryObserver."""
        self._failures.add(phase, failure)

    def decided(self, failure: str, action: str) -> None:
        """See RegistryObserver."""
        self._retries.add(failure, action)

    def warned(self, namespace: str, repository: str, endpoint: str, text: str) -> None:
        """See RegistryObserver. Pulls of a repository are told once; each of their requests may carry the same warning."""
        name = f"{namespace}/{repository}"
        told = self._told.setdefault(name, set()) if name in self._running else set()
        if text in told:
            return
        told.add(text)
        self._warnings.add()
        log.warning("%s says of %s: %s", endpoint, name, text)
        self._bus.publish("registry-warning", name, endpoint=endpoint, warning=text)

    def collected(self, report: CollectionReport | None) -> None:
        """For Collector; None for a collection that failed as a whole."""
        if report is None:
            self._collections.add("failed")
            return
        self._collections.add("incomplete" if report.sweep.failed else "ok")
        for node in report.sweep.removed:
            self._removed.add(node.kind)
        for node in report.sweep.failed:
            self._stayed.add(node.kind)
        self._collecting.observe(report.mark_s, "mark")
        self._collecting.observe(report.sweep_s, "sweep")

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """For the interceptor. method: one of those that the socket serves."""
        self._rpc.observe(seconds, method, code)


class StoreSizes:
    """Sizes by class as of the last scrape; measured at most every SIZES_AGE."""

    def __init__(self, measure: Callable[[], Awaitable[Mapping[str, int]]], page: Page) -> None:
        self._measure = measure
        self._at = float("-inf")
        self.latest: Mapping[str, int] = {}
        page.before(self._refresh)

    async def _refresh(self) -> None:
        if time.monotonic() - self._at < SIZES_AGE:
            return
        self._at = time.monotonic()
        try:
            self.latest = await self._measure()
        except ImgsvcError as error:
            log.warning("the store's size is not known: %s", error)


def as_observer(observer: Observer) -> tuple[PullObserver, RegistryObserver]:
    """Lets mypy prove that the contracts are met."""
    return observer, observer


def store_gauges(images: ImageStore, db: MetaDB, sizes: StoreSizes) -> list[Gauge]:
    """Number of images, disk use by class, and how full the metadata is."""
    return [
        Gauge("imgsvc_images", "Images on this node.", (), lambda: {(): len(images.all())}),
        Gauge(
            "imgsvc_store_bytes",
            "Disk use by class: blobs (content), unfinished writes (ingest), layers and containers' files (snapshot).",
            ("class",),
            lambda: {(kind,): size for kind, size in sizes.latest.items()},
        ),
        Gauge("imgsvc_metadata_bytes", "Metadata: pages used and the map's limit.", ("of",), lambda: _metadata(db)),
    ]


def _metadata(db: MetaDB) -> Mapping[tuple[str, ...], float]:
    used, limit = db.usage()
    return {("used",): used, ("limit",): limit}
