"""A bandwidth limit around a registry: everything is passed on, downloads at most so fast."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from imgsvc.base.oci import Descriptor
from imgsvc.base.reference import Reference
from imgsvc.registry.interfaces import BlobSink, BlobSource, Credential, Fetcher, Registry, Repository, Resolved

_BURST_S: Final = 1.0  # how much may come at once after a pause, as time at full speed


class Throttle:
    """A budget of bytes per second that several downloads share."""

    def __init__(
        self, rate: int, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()

    async def spend(self, count: int) -> None:
        """Wait until `count` bytes more are within the budget. The sender is held back by not being read."""
        now = self._clock()
        self._free_at = max(self._free_at, now - _BURST_S) + count / self._rate
        if self._free_at > now:
            await self._sleep(self._free_at - now)


class ThrottledRegistry:
    """See Registry."""

    def __init__(self, registry: Registry, throttle: Throttle) -> None:
        self._registry = registry
        self._throttle = throttle

    async def resolve(self, reference: Reference, credential: Credential | None = None) -> Resolved:
        """See Registry."""
        return await self._registry.resolve(reference, credential)

    def fetcher(self, reference: Reference, credential: Credential | None = None) -> Fetcher:
        """See Registry."""
        return _Fetcher(self._registry.fetcher(reference, credential), self._throttle)

    def repository(self, reference: Reference, credential: Credential | None = None) -> Repository:
        """See Registry."""
        return self._registry.repository(reference, credential)

    async def close(self) -> None:
        """The registry is not ours to close."""


def as_registry(throttled: ThrottledRegistry) -> Registry:
    """Lets mypy prove that the contract is met."""
    return throttled


class _Fetcher:
    def __init__(self, fetcher: Fetcher, throttle: Throttle) -> None:
        self._fetcher = fetcher
        self._throttle = throttle

    @property
    def took_credentials(self) -> bool:
        return self._fetcher.took_credentials

    async def document(self, descriptor: Descriptor, *, limit: int) -> bytes:
        return await self._fetcher.document(descriptor, limit=limit)

    async def download(self, descriptor: Descriptor, sink: BlobSink) -> BlobSource:
        return await self._fetcher.download(descriptor, _Sink(sink, self._throttle))

    async def rejected(self, descriptor: Descriptor, source: BlobSource) -> bool:
        return await self._fetcher.rejected(descriptor, source)


class _Sink:
    def __init__(self, sink: BlobSink, throttle: Throttle) -> None:
        self._sink = sink
        self._throttle = throttle

    def missing(self) -> list[tuple[int, int]]:
        return self._sink.missing()

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        await self._sink.write_at(offset, data)
        await self._throttle.spend(len(data))
