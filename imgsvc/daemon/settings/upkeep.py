"""[gc] as the collector takes it."""

from __future__ import annotations

from imgsvc.config import Config
from imgsvc.images.upkeep.collector import Policy


def collector_policy(settings: Config) -> Policy:
    """When to collect, and how many bytes of unpacked layers' blobs to keep."""
    budget = 0 if settings.images.discard_unpacked_layers else settings.gc.blob_cache
    return Policy(settings.gc.startup_delay, settings.gc.schedule_delay, budget, settings.gc.min_free)
