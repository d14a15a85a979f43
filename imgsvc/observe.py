"""What is measured and told of the daemon's work: one Observer fills the metrics page and the event bus.

Labels are outcomes and gRPC codes, phases of a pull, the configured endpoints (the first MAX_ENDPOINTS), methods of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from imgsvc.errors import ImgsvcError
from imgsvc.events import EventBus
from imgsvc.images import Image, ImageStore
from imgsvc.metrics import MIB_PER_SECOND, Bounded, Counter, Gauge, Histogram, Page
from imgsvc.oci import MIB
from imgsvc.pull import Pulled, PullObserver, PullRequest

MAX_ENDPOINTS: Final = 32  # different mirrors and registries that are told apart
_SLOWEST_COUNTED: Final = 1 * MIB  # [bytes] a pull must have moved for its speed to mean anything


class Observer:
    """Implements pull.PullObserver; `rpc`, `served` and `image` are handed to those who report the rest."""

    def __init__(self, page: Page, bus: EventBus) -> None:
        self._bus = bus
        self._running = 0
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
        running = Gauge("imgsvc_pulls_running", "Pulls in progress.", (), lambda: {(): self._running})
        page.add(self._pulls, self._seconds, self._phases, self._speed, self._bytes, self._asked)
        page.add(self._refused, self._served, self._rpc, running)

    def started(self, request: PullRequest) -> None:
        """See PullObserver."""
        self._running += 1
        self._bus.publish("pull-started", str(request.reference), platform=str(request.platform))

    def finished(self, request: PullRequest, outcome: Pulled | BaseException, seconds: float) -> None:
        """See PullObserver."""
        self._running -= 1
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

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """For the interceptor. method: one of those that the socket serves."""
        self._rpc.observe(seconds, method, code)


def as_observer(observer: Observer) -> PullObserver:
    """Lets mypy prove that the contract is met."""
    return observer


def store_gauges(
    images: ImageStore, image_fs: Callable[[], tuple[str, int, int]], container_fs: Callable[[], tuple[str, int, int]]
) -> list[Gauge]:
    """Number of images and disk use. The functions: as image_service.Usage."""

    def used() -> Mapping[tuple[str, ...], float]:
        return {("images",): image_fs()[1], ("containers",): container_fs()[1]}

    return [
        Gauge("imgsvc_images", "Images on this node.", (), lambda: {(): len(images.all())}),
        Gauge("imgsvc_store_bytes", "Disk use of images and of containers' writable layers.", ("of",), used),
    ]
