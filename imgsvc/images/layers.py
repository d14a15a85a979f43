"""Layers from blob to committed snapshot: side by side, each by one shared task (flight) that every pull that needs it joins.

A layer's stages: its blob grows (blobs.Blobs) while an unpack worker follows it; the worker's verdict; *settled*, when it
is fitted to its parents and its files are as they will be; on disk; *committed* on its parent. Stages overlap between
layers as far as they can: unpacking needs no parent (where the snapshotter can do without), settling needs settled
parents, committing needs committed ones, and one sync serves all layers that wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

from imgsvc.base.concurrency import Coalesced, Shared, SingleFlight, Threads, all_of, both, stop_tasks, to_the_end, trickles
from imgsvc.base.errors import Aborted, DataLoss, FailedPrecondition, ImgsvcError, InvalidArgument, ResourceExhausted
from imgsvc.base.failpoints import afailpoint
from imgsvc.base.oci import Descriptor, Digest
from imgsvc.decrypt.interfaces import ChainRun, Decryptor, LayerKey
from imgsvc.images.downloads import Blobs, Feed, GrowingBlob
from imgsvc.registry.interfaces import BlobSource, Fetcher
from imgsvc.snapshot.interfaces import (
    Applied,
    Key,
    LayerInput,
    Mount,
    Name,
    Snapshotter,
    StreamSnapshotter,
    Unpacker,
    UnpackJob,
    Usage,
)

log = logging.getLogger(__name__)

LAYER_STATES: Final = ("waiting", "downloading", "unpacking", "done", "exists")
MAX_BEGINNINGS: Final = 2  # layers that are being opened at a time: the first ones' bytes are to come before all are open
MAX_CHAINS: Final = 6  # layers in stream processors at a time: a process each at least, whether its bytes have come or not
_STREAM: Final = "application/vnd.oci.image.layer.v1.tar"


class PullReporter(Protocol):
    """Told how a pull goes; must not block. Sizes [bytes]."""

    def resolved(self, digest: Digest, endpoint: str) -> None:
        """The digest that the reference resolved to."""

    def layer(self, digest: Digest, size: int, downloaded: int, state: str) -> None:
        """A layer moved on; state is one of LAYER_STATES."""

    def unpacked(self, digest: Digest, count: int) -> None:
        """That many of a layer's stored bytes are unpacked."""


class NullReporter:
    """A reporter that ignores everything."""

    def resolved(self, digest: Digest, endpoint: str) -> None:
        """Ignored."""

    def layer(self, digest: Digest, size: int, downloaded: int, state: str) -> None:
        """Ignored."""

    def unpacked(self, digest: Digest, count: int) -> None:
        """Ignored."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The layers of one image, and what bringing them takes. All sequences: one entry per layer, base first.

    names: of the snapshots, see layer_names. keys: None for plain layers. label: the image, for errors.
    sources and timings are filled while the layers come: who served a blob, by digest; seconds by phase, added up;
    positions of the layers that this pull unpacked from their own blobs. on_unpacked: called with each one's snapshot and blob.
    """

    label: str
    fetcher: Fetcher
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[Digest, ...]
    names: tuple[Name, ...]
    keys: tuple[LayerKey | None, ...]
    snapshotter: Snapshotter
    reporter: PullReporter
    sources: dict[str, BlobSource] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    unpacked: set[int] = field(default_factory=set)
    on_unpacked: Callable[[Name, Digest], None] = lambda name, blob: None

    def report(self, layer: Descriptor, downloaded: int, state: str) -> None:
        """Tell the reporter."""
        self.reporter.layer(layer.digest, layer.size, downloaded, state)

    def spent(self, phase: str, seconds: float) -> None:
        """Add to a phase's time."""
        self.timings[phase] = self.timings.get(phase, 0.0) + seconds


def layer_names(diff_ids: Sequence[Digest], secrets: Sequence[tuple[Digest, str] | None]) -> list[Name]:
    """The snapshot names of a stack of layers, base first.

    Plain layers are named by chain ID. From the first encrypted layer on, the name also covers the ciphertext's digest
    and the fingerprint of the unwrapped key: a plain descriptor can never reuse a decrypted layer, and an encrypted one
    only with the same blob and the same key.

    Args: secrets: None for a plain layer, else (blob digest, key fingerprint).
    """
    names: list[Name] = []
    sealed = False
    for diff_id, secret in zip(diff_ids, secrets, strict=True):
        parts = [names[-1], diff_id] if names else [diff_id]
        if secret is not None:
            sealed = True
            parts += [*secret]
        if len(parts) == 1:
            names.append(Name(diff_id))
            continue
        digest = Digest.of(" ".join(parts).encode())
        names.append(Name(f"sealed-{digest}" if sealed else digest))
    return names


async def unwrap_layers(decryptor: Decryptor, layers: Sequence[Descriptor]) -> list[LayerKey | None]:
    """Authorisation to use each layer: the key of an encrypted one, unwrapped now; None for a plain one. All concurrently.

    Raises: KeyMissing (of whichever layer is refused first) and what else Decryptor.unwrap raises.
    """

    async def one(layer: Descriptor) -> LayerKey | None:
        return await decryptor.unwrap(layer) if decryptor.encrypted(layer) else None

    return await all_of(*(one(layer) for layer in layers))


def layer_secrets(layers: Sequence[Descriptor], keys: Sequence[LayerKey | None]) -> list[tuple[Digest, str] | None]:
    """What layer_names takes, of layers and their keys."""
    return [(layer.digest, key.fingerprint) if key else None for layer, key in zip(layers, keys, strict=True)]


_Make = Callable[[LayerPlan, int, Key, AsyncExitStack], Awaitable[tuple[Usage | None, Sequence[Mount]]]]


class _Stage:
    """How far a layer is: once `settled`, its files are as they will be, and are mounted so, with all below."""

    def __init__(self) -> None:
        self.settled = asyncio.Event()
        self.mounts: Sequence[Mount] = ()


class Layers:
    """Brings layers in. One per daemon, so that all pulls share flights."""

    def __init__(
        self,
        blobs: Blobs,
        snapshotters: Mapping[str, Snapshotter],
        unpacker: Unpacker,
        decryptor: Decryptor,
        threads: Threads,
        *,
        durable: bool = True,
    ) -> None:
        """durable: put a layer's files on disk before it is committed (images.sync = "full")."""
        self._blobs = blobs
        self._unpacker = unpacker
        self._decryptor = decryptor
        self._threads = threads
        self._flights: SingleFlight[None] = SingleFlight()
        self._beginning = asyncio.Semaphore(MAX_BEGINNINGS)
        self._chains = asyncio.Semaphore(MAX_CHAINS)
        self._stages: Shared[_Stage] = Shared(_Stage)
        self._syncs = {name: _Sync(snapshotter, threads) for name, snapshotter in snapshotters.items()} if durable else {}

    async def ensure_all(self, plan: LayerPlan) -> None:
        """Make all snapshots exist. One whose files were lost below others that are here comes back before anything else.

        Raises: as _ensure.
        """
        here = await self._threads.run(lambda: [plan.snapshotter.stat(name) is not None for name in plan.names])
        for layer, there in zip(plan.layers, here, strict=True):
            if not there:
                plan.report(layer, 0, "waiting")  # all at once, so that a progress display knows the total
        for position in range(len(here)):
            if not here[position] and any(here[position:]):
                await self._ensure(plan, position)
        states = ["exists" if there else "done" for there in here]
        await all_of(*(self._ensure_and_tell(plan, position, state) for position, state in enumerate(states)))
        if isinstance(plan.snapshotter, StreamSnapshotter) and plan.names:
            await self._threads.run(plan.snapshotter.seal, plan.names[-1])

    async def unpack_aside(self, plan: LayerPlan, position: int, key: Key) -> None:
        """Unpack one layer into a new active snapshot `key`, as it was unpacked into plan.names[position]. For comparing.

        Raises: as ensure. The caller removes the snapshot in every case.
        """
        make = self._way(plan.snapshotter)
        async with AsyncExitStack() as jobs:
            await make(plan, position, key, jobs)

    async def read_again(self, snapshotter: StreamSnapshotter, name: Name, diff_id: Digest, key: Key) -> None:
        """Record a committed layer's own stream in a new active snapshot `key`, which the caller removes in every case.

        Raises: DataLoss (the stream has another digest), InvalidArgument (it is no layer), NotFound.
        """
        stream = await self._threads.run(snapshotter.stream, name)
        try:
            size = os.fstat(stream).st_size
            mounts = await self._threads.run(snapshotter.prepare_stream, key)
            job = await self._unpacker.start(LayerInput(_STREAM, diff_id, diff_id, stream, size), mounts, rebase=True)
        finally:
            os.close(stream)
        try:
            job.advance(size)
            await job.finish()
        finally:
            await job.abort()

    async def _ensure(self, plan: LayerPlan, position: int) -> None:
        """Make one layer's snapshot exist, with all below it, joining a flight for it if there is one.

        Raises: PullFailed, DataLoss, InvalidArgument, ResourceExhausted. Nothing of a failed layer stays but its blob.
        """
        await self._flights.run(f"{plan.snapshotter.name}/{plan.names[position]}", lambda: self._make(plan, position))

    async def _ensure_and_tell(self, plan: LayerPlan, position: int, state: str) -> None:
        await self._ensure(plan, position)
        plan.report(plan.layers[position], plan.layers[position].size, state)

    async def _make(self, plan: LayerPlan, position: int) -> None:
        name = plan.names[position]
        parent = plan.names[position - 1] if position else None
        snapshotter = plan.snapshotter
        if await self._threads.run(snapshotter.stat, name) is not None:
            return
        key = Key(f"unpack-{uuid.uuid4().hex}")  # random: a crash leaves at most an unreferenced snapshot
        make = self._way(snapshotter)
        with self._stages.use(f"{snapshotter.name}/{name}") as stage:
            try:
                async with AsyncExitStack() as jobs:
                    usage, stage.mounts = await make(plan, position, key, jobs)
                await afailpoint("layer.settled")
                # From here on the layer above can settle on this one, while this one waits for the disk and for its parent.
                stage.settled.set()
                await both(self._sync(snapshotter, key), self._committed(plan, position - 1))
                await afailpoint("layer.synced")
                await self._threads.run(snapshotter.commit, name, key, parent=parent, usage=usage)
                plan.unpacked.add(position)
                plan.on_unpacked(name, plan.layers[position].digest)
                await afailpoint("layer.committed")
            except BaseException:
                # Also when cancelled. A later flight of the same name must not see this attempt's mounts.
                stage.settled.clear()
                stage.mounts = ()
                await to_the_end(self._discard(snapshotter, key))
                raise

    def _way(self, snapshotter: Snapshotter) -> _Make:
        """How this snapshotter's layers are made."""
        if isinstance(snapshotter, StreamSnapshotter):
            return self._as_stream
        return self._beside if snapshotter.parallel else self._on_parent

    async def _as_stream(self, plan: LayerPlan, position: int, key: Key, jobs: AsyncExitStack) -> tuple[Usage | None, Sequence[Mount]]:
        """Write a layer's tar stream as it is; parents matter when the image is sealed."""
        job, _ = await self._unpack(plan, position, key, None, jobs)
        return await job.settle([]), ()

    async def _sync(self, snapshotter: Snapshotter, key: Key) -> None:
        if self._syncs:
            await self._syncs[snapshotter.name](key)

    async def _discard(self, snapshotter: Snapshotter, key: Key) -> None:
        """Give an unfinished snapshot back. A disk that fails here too is not what the caller needs to hear about."""
        try:
            await self._threads.run(snapshotter.remove, key)
        except ImgsvcError as error:
            log.warning("unfinished snapshot %s stays until the next start: %s", key, error)

    async def _beside(self, plan: LayerPlan, position: int, key: Key, jobs: AsyncExitStack) -> tuple[Usage | None, Sequence[Mount]]:
        """Unpack a layer while its parents are still on their way, then fit it to them. Jobs are ended by `jobs`."""
        # Both at once: the parent's flight needs nothing of this one, so waiting for it cannot deadlock.
        (job, own), below = await both(self._unpack(plan, position, key, None, jobs), self._settled(plan, position - 1))
        await afailpoint("layer.unpacked")
        # Three cases: the parent is settled but not committed, so its mounts come from its stage; it is committed; there is none.
        if below:
            mounts: Sequence[Mount] = plan.snapshotter.stacked(own, below)
        elif position:
            mounts = await self._threads.run(plan.snapshotter.mounts, key, parent=plan.names[position - 1])
        else:
            mounts = own
        try:
            return await job.settle(mounts), mounts
        except Aborted:
            # It came through a pipe and needs its parents while it is unpacked.
            await self._threads.run(plan.snapshotter.remove, key)
            return await self._on_parent(plan, position, key, jobs)

    async def _on_parent(self, plan: LayerPlan, position: int, key: Key, jobs: AsyncExitStack) -> tuple[Usage | None, Sequence[Mount]]:
        """Unpack a layer onto its committed parent."""
        await both(self.bring(plan, plan.layers[position]), self._committed(plan, position - 1))
        job, mounts = await self._unpack(plan, position, key, plan.names[position - 1] if position else None, jobs)
        return await job.settle([]), mounts

    async def _committed(self, plan: LayerPlan, position: int) -> None:
        if position >= 0:
            await self._ensure(plan, position)

    async def _settled(self, plan: LayerPlan, position: int) -> Sequence[Mount]:
        """Until a layer's files are as they will be; how they are mounted, with all below. Nothing, when it is committed already."""
        if position < 0:
            return ()
        with self._stages.use(f"{plan.snapshotter.name}/{plan.names[position]}") as stage:
            layer = asyncio.ensure_future(self._ensure(plan, position))
            try:
                await _first_of(layer, stage.settled.wait())
                if layer.done():
                    layer.result()
            finally:
                await stop_tasks(layer)
            return stage.mounts

    async def bring(self, plan: LayerPlan, layer: Descriptor) -> None:
        """Have a layer's blob in the store, verified; unpacking it or not."""
        began = time.monotonic()
        source = await self._blobs.bring(plan.fetcher, layer, lambda count: plan.report(layer, count, "downloading"))
        _note(plan, layer, source, began)

    async def _fetch(self, plan: LayerPlan, layer: Descriptor) -> None:
        began = time.monotonic()
        source = await self._blobs.fetch(plan.fetcher, layer, lambda count: plan.report(layer, count, "downloading"))
        plan.report(layer, layer.size, "unpacking")
        _note(plan, layer, source, began)

    async def _unpack(
        self, plan: LayerPlan, position: int, key: Key, parent: Name | None, jobs: AsyncExitStack
    ) -> tuple[UnpackJob, Sequence[Mount]]:
        """Unpack one layer into a new active snapshot, from its growing blob if need be. Returns the finished job and the snapshot's mounts.

        A worker or stream processor that fails on bytes that are not verified yet proves nothing against the layer: the
        download is judged first, and the layer is unpacked again from the bytes that are right.
        """
        layer = plan.layers[position]
        with self._blobs.growing.use(layer.digest) as blob:
            try:
                return await self._follow(plan, position, key, parent, jobs)
            except ResourceExhausted:
                # A full disk, or more than a layer may have: what was fetched of it is not worth its space.
                await to_the_end(self._threads.run(self._blobs.drop_partial, layer.digest))
                raise
            except (DataLoss, InvalidArgument, FailedPrecondition):
                if not blob.opened.is_set():
                    raise  # the blob was stored and verified, so the layer itself is bad
                await self.bring(plan, layer)  # raises when the download is to blame; else the bytes are right now
            except _CrowdedOutError as error:
                await error.download  # no unpack worker is held meanwhile
        # Second attempt, from the stored blob, into a new snapshot of the same key.
        await self._threads.run(plan.snapshotter.remove, key)
        return await self._follow(plan, position, key, parent, jobs)

    async def _follow(
        self, plan: LayerPlan, position: int, key: Key, parent: Name | None, jobs: AsyncExitStack
    ) -> tuple[UnpackJob, Sequence[Mount]]:
        """One attempt. `stack` ends what the attempt needs; `jobs`, the caller's, ends what must live until the layer has settled."""
        layer = plan.layers[position]
        async with AsyncExitStack() as stack:
            # Held before the download starts, so that its opening cannot be missed.
            blob = stack.enter_context(self._blobs.growing.use(layer.digest))
            async with self._beginning:
                if isinstance(plan.snapshotter, StreamSnapshotter):
                    mounts = await self._threads.run(plan.snapshotter.prepare_stream, key)
                else:
                    mounts = await self._threads.run(plan.snapshotter.prepare, key, parent)
                await afailpoint("layer.prepared")
                fetch = asyncio.ensure_future(self._fetch(plan, layer))
                stack.push_async_callback(stop_tasks, fetch)
                # Either there is a file to follow, or the blob was stored already, or the download failed: _source tells which.
                await _first_of(fetch, blob.opened.wait())
            if self._decryptor.processed(layer):
                await stack.enter_async_context(self._chains)
            source, feed = await self._source(layer, fetch, blob, stack)
            chain = await self._chain(layer, source, feed, stack)
            rebase = parent is None and plan.snapshotter.parallel
            job = await self._unpacker.start(_layer_input(plan, position, source, chain), mounts, rebase=rebase)
            jobs.push_async_callback(job.abort)
            if fetch.done():
                plan.report(layer, layer.size, "unpacking")
            follower = feed or job
            blob.follow(follower)
            # A stored blob does not grow, and a finished download announced its end before the follower joined.
            if fetch.done():
                follower.advance(layer.size)
            try:
                verdict = job.finish(lambda count: plan.reporter.unpacked(layer.digest, count))
                applied, _ = await both(self._unless_crowded_out(verdict, blob, fetch, layer), _awaited(fetch))
            except _CrowdedOutError as error:
                # It joins the flight before this stack ends `fetch`, so that the download goes on.
                error.download = asyncio.ensure_future(self.bring(plan, layer))
                jobs.push_async_callback(stop_tasks, error.download)
                raise
            except ImgsvcError:
                if chain and _succeeded(fetch):
                    await chain.wait()  # their input was complete, so their own error counts first: it usually names the cause
                raise
            if chain:
                await chain.wait()  # a processor may reject the layer after its last byte: that is the MAC's verdict
            for phase, seconds in applied.timings.items():
                plan.spent(phase, seconds)
            return job, mounts

    async def _unless_crowded_out(
        self, verdict: Coroutine[Any, Any, Applied], blob: GrowingBlob, fetch: asyncio.Future[None], layer: Descriptor
    ) -> Applied:
        """The verdict on a layer. One whose bytes trickle in gives its places up to layers that wait for them.

        Raises: _CrowdedOutError, after which nothing works on the layer.
        """

        def is_wanted() -> bool:
            wants_chain = self._decryptor.processed(layer) and self._chains.locked()
            return not fetch.done() and (self._unpacker.is_wanted() or wants_chain)

        working = asyncio.ensure_future(verdict)
        try:
            await _first_of(working, trickles(lambda: blob.available, is_wanted))
            if not working.done():
                raise _CrowdedOutError
            return working.result()
        finally:
            await stop_tasks(working)

    async def _source(
        self, layer: Descriptor, fetch: asyncio.Future[None], blob: GrowingBlob, stack: AsyncExitStack
    ) -> tuple[int, Feed | None]:
        """What to read: the stored blob, or the growing one; through a pipe for a reader that cannot follow a growing file."""
        if fetch.done():
            fetch.result()
            stored = self._threads.holding(partial(self._blobs.stored_fd, layer.digest), os.close)
            return await stack.enter_async_context(stored), None
        source = blob.duplicate()
        stack.callback(os.close, source)
        if not self._decryptor.processed(layer):
            return source, None
        feed = Feed(source, layer.size)
        stack.callback(feed.close)
        return feed.output, feed

    async def _chain(self, layer: Descriptor, source: int, feed: Feed | None, stack: AsyncExitStack) -> ChainRun | None:
        """The stream processors a layer goes through, running."""
        if not self._decryptor.processed(layer):
            return None
        chain = await self._decryptor.open_chain(layer, source)
        stack.push_async_callback(chain.kill)
        if feed:
            feed.detach()
        return chain


def _note(plan: LayerPlan, layer: Descriptor, source: BlobSource | None, began: float) -> None:
    if source is not None:
        plan.sources[layer.digest] = source
        plan.spent("download", time.monotonic() - began)


def _layer_input(plan: LayerPlan, position: int, source: int, chain: ChainRun | None) -> LayerInput:
    layer, key = plan.layers[position], plan.keys[position]
    media_type = key.media_type if key else layer.media_type
    return LayerInput(
        media_type=chain.media_type if chain else media_type,
        digest=layer.digest,
        diff_id=plan.diff_ids[position],
        source=chain.output if chain else source,
        size=layer.size,
        secret=key.secret if key and not chain else None,
    )


async def _awaited(task: asyncio.Future[None]) -> None:
    """Wait for a task that goes on when its waiter is cancelled."""
    await asyncio.shield(task)


def _succeeded(task: asyncio.Future[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


async def _first_of(task: asyncio.Future[Any], other: Coroutine[Any, Any, Any]) -> None:
    """Until either is done; the second is dropped then, the first is left alone."""
    waiting = asyncio.ensure_future(other)
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


class _CrowdedOutError(Exception):
    """A layer that trickles gave up its place; it is unpacked when `download` has brought all of it."""

    download: asyncio.Future[None]


class _Sync:
    """Puts finished layers on disk, all that wait at a time in one go."""

    def __init__(self, snapshotter: Snapshotter, threads: Threads) -> None:
        self._snapshotter, self._threads = snapshotter, threads
        self._keys: list[Key] = []
        self._coalesced = Coalesced(self._run)

    async def __call__(self, key: Key) -> None:
        self._keys.append(key)
        await self._coalesced()

    async def _run(self) -> None:
        keys, self._keys = self._keys, []
        await self._threads.run(self._snapshotter.sync, keys)
