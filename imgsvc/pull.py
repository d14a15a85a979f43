"""Pulling: resolve → fetch → decrypt → unpack → publish, each part shared by everybody who needs it at the same time.

The order of a pull, and what makes it safe:

1. resolve asks the registry, always, so that the caller's credentials are really checked (KEP-2535).
2. A lease names everything the pull will need before it looks what is there, so that no collection takes it away.
3. Index, manifest and config are verified and stored. Layers are named by chain ID (see layer_names), so a layer that is
   there under its name is complete and is not fetched again.
4. Each missing layer is one flight: its blob streams into the content store, which checks size and digest, while an
   unpack worker follows the growing file; the worker's diff ID is checked; the layer is committed after its parent.
   A second pull that needs the same layer or blob joins the flight. The last to leave cancels it; bytes stay for resume.
5. Only then the image gets its name, in one transaction. A kill anywhere before leaves no image and no half layer.

Source: needs.md A1, A6, B5; docs/architecture.md ("The life of a pull").
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from imgsvc.concurrency import Coalesced, Shared, SingleFlight, Threads, all_of, both
from imgsvc.content.interfaces import Store, Writer
from imgsvc.content.verify import read_verified
from imgsvc.decrypt.interfaces import ChainRun, Decryptor, LayerKey
from imgsvc.errors import Aborted, DataLoss, Internal, InvalidArgument, NotFound, ResourceExhausted
from imgsvc.failpoints import afailpoint
from imgsvc.images import Image, ImageStore, build_image
from imgsvc.leases import LeaseManager
from imgsvc.oci import (
    MAX_DOCUMENT,
    MAX_INDEX_DEPTH,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_config,
    parse_document,
)
from imgsvc.reference import Reference
from imgsvc.registry.interfaces import Attempt, BlobSource, Credential, Fetcher, Registry
from imgsvc.snapshot.interfaces import Applied, Key, LayerInput, Mount, Name, Snapshotter, Unpacker, UnpackJob, Usage

log = logging.getLogger(__name__)

LAYER_STATES: Final = ("waiting", "downloading", "unpacking", "done", "exists")


class PullReporter(Protocol):
    """Told how a pull goes; must not block. Sizes [bytes]."""

    def resolved(self, digest: Digest, endpoint: str) -> None:
        """The reference stands for this digest."""

    def layer(self, digest: Digest, size: int, downloaded: int, state: str) -> None:
        """A layer moved on; state is one of LAYER_STATES."""


class Silent:
    """The reporter of those who do not watch."""

    def resolved(self, digest: Digest, endpoint: str) -> None:
        """Ignored."""

    def layer(self, digest: Digest, size: int, downloaded: int, state: str) -> None:
        """Ignored."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to pull, for whom, into which snapshotter. reporter: told about progress.

    source: where from, if not from the registries of this node's configuration (an archive).
    """

    reference: Reference
    credential: Credential | None
    platform: Platform
    snapshotter: str
    reporter: PullReporter = field(default_factory=Silent)
    source: Registry | None = None


class Verifier(Protocol):
    """Decides whether an image may be used, by its name and digest; see verification.py."""

    async def verify(self, reference: Reference, target: Descriptor, credential: Credential | None) -> None:
        """Raises: PermissionDenied with the reason SignatureValidationFailed when it may not, or when nobody can tell.

        The verdict is about target.digest, whatever a tag says later. credential: the puller's own, for signatures.
        """


class Trusting:
    """The verifier of a node without [verify]."""

    async def verify(self, reference: Reference, target: Descriptor, credential: Credential | None) -> None:
        """Yes."""


@dataclass(slots=True)
class Pulled:
    """The outcome. timings [seconds] by phase, summed over layers that ran side by side."""

    image: Image
    timings: dict[str, float]


class _Stage:
    """How far a layer is: `key` is its active snapshot once `settled`, when its files are as they will be."""

    def __init__(self) -> None:
        self.key = Key("")
        self.settled = asyncio.Event()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything known of one image before its layers move. names, keys: one per layer, base first."""

    request: PullRequest
    fetcher: Fetcher
    manifest: Manifest
    diff_ids: tuple[Digest, ...]
    names: tuple[Name, ...]
    keys: tuple[LayerKey | None, ...]
    snapshotter: Snapshotter
    sources: dict[str, BlobSource]
    timings: dict[str, float]


def layer_names(diff_ids: Sequence[Digest], secrets: Sequence[tuple[Digest, str] | None]) -> list[Name]:
    """The snapshot names of a stack of layers, base first.

    Plain layers are named by chain ID. From the first encrypted layer on, the name also covers the ciphertext's digest
    and the fingerprint of the unwrapped key: a plain descriptor can never reuse a decrypted layer, and an encrypted one
    only with the same blob and the same key (facts/ocicrypt.md section 9).

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


class GrowingBlob:
    """A blob on its way in: followers learn how many bytes, from the start and without a gap, can be read."""

    def __init__(self) -> None:
        self.available = 0
        self.opened = asyncio.Event()
        self._fd = -1
        self._followers: list[UnpackJob] = []

    def open(self, fd: int, available: int) -> None:
        """The file exists; its descriptor is duplicated here and lives until close(). A retry opens anew."""
        self.close()
        self._followers.clear()
        self._fd = os.dup(fd)
        self.available = available
        self.opened.set()

    def follow(self, job: UnpackJob) -> None:
        """Tell `job` what is there now and whenever there is more."""
        self._followers.append(job)
        job.advance(self.available)

    def grew(self, available: int) -> None:
        """More bytes from the start are readable."""
        if available > self.available:
            self.available = available
            for job in self._followers:
                job.advance(available)

    def duplicate(self) -> int:
        """A descriptor of the file for the caller to close."""
        return os.dup(self._fd)

    def close(self) -> None:
        """No more followers will come."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Sink:
    """A download's way into the content store: one hop to a thread per chunk, then the followers are told."""

    def __init__(self, writer: Writer, blob: GrowingBlob, threads: Threads, request: PullRequest, layer: Descriptor) -> None:
        self._writer, self._blob, self._threads = writer, blob, threads
        self._request, self._layer = request, layer

    def missing(self) -> list[tuple[int, int]]:
        return self._writer.missing()

    async def write_at(self, offset: int, data: bytes) -> None:
        available = await self._threads.run(self._write, offset, data)
        self._blob.grew(available)
        self._request.reporter.layer(self._layer.digest, self._layer.size, available, "downloading")

    def _write(self, offset: int, data: bytes) -> int:
        self._writer.write_at(offset, data)
        return self._writer.status().offset


class Puller:
    """Pulls images. One per daemon."""

    def __init__(
        self,
        *,
        registry: Registry,
        content: Store,
        snapshotters: Mapping[str, Snapshotter],
        unpacker: Unpacker,
        decryptor: Decryptor,
        images: ImageStore,
        leases: LeaseManager,
        threads: Threads,
        verifier: Verifier | None = None,
    ) -> None:
        self._verifier = verifier or Trusting()
        self._registry = registry
        self._content = content
        self._snapshotters = snapshotters
        self._unpacker = unpacker
        self._decryptor = decryptor
        self._images = images
        self._leases = leases
        self._threads = threads
        self._layers: SingleFlight[None] = SingleFlight()
        self._blobs: SingleFlight[BlobSource] = SingleFlight()
        self._documents: SingleFlight[bytes] = SingleFlight()
        self._growing: Shared[GrowingBlob] = Shared(GrowingBlob, GrowingBlob.close)
        self._stages: Shared[_Stage] = Shared(_Stage)
        self._syncs = {name: _Sync(snapshotter, threads) for name, snapshotter in snapshotters.items()}

    async def pull(self, request: PullRequest) -> Pulled:
        """Make the image complete and visible on this node. Cancelling the last caller cancels the work.

        Raises: PullFailed with every attempt; DataLoss, InvalidArgument, PermissionDenied, ResourceExhausted.
        Durability: when this returns, the image survives a power cut (sync = "full").
        """
        began = time.monotonic()
        registry = request.source or self._registry
        resolved = await registry.resolve(request.reference, request.credential)
        request.reporter.resolved(resolved.descriptor.digest, resolved.endpoint)
        timings = {"resolve": time.monotonic() - began}
        await self._verifier.verify(request.reference, resolved.descriptor, request.credential)
        timings["verify"] = time.monotonic() - began - timings["resolve"]
        fetcher = registry.fetcher(request.reference, request.credential)
        await afailpoint("pull.resolved")
        lease = await self._leases.hold([("content", resolved.descriptor.digest)], purpose=f"pull {request.reference}")
        try:
            documents, manifest, config = await self._walk(request, fetcher, resolved.descriptor, resolved.document)
            plan = await self._plan(request, fetcher, manifest, config, timings)
            await self._leases.add(lease, _resources(plan, documents))
            await self._store(documents)
            await afailpoint("pull.documents")
            if manifest.is_artifact or not config.diff_ids:
                await all_of(*(self._fetch(plan, layer) for layer in manifest.layers))
            else:
                await all_of(*(self._layer(plan, position) for position in range(len(plan.names))))
            await afailpoint("pull.layers")
            image = build_image(
                documents[-2][0],
                manifest,
                config,
                plan.names,
                [key is not None for key in plan.keys],
                [descriptor for descriptor, _ in documents],
                {
                    "resolved_by": resolved.endpoint,
                    "credentials": _credentials([*resolved.attempts, *(a for s in plan.sources.values() for a in s.attempts)]),
                    "blobs": {digest: dict(source.by_endpoint) for digest, source in plan.sources.items()},
                },
            )
            reference = request.reference
            shown = await self._images.add(
                image,
                "" if reference.digest else reference.tagged,
                str(reference.with_digest(resolved.descriptor.digest)),
            )
            timings["total"] = time.monotonic() - began
            return Pulled(shown, timings)
        finally:
            await asyncio.shield(self._leases.release(lease))

    async def _walk(
        self, request: PullRequest, fetcher: Fetcher, target: Descriptor, first: bytes | None
    ) -> tuple[list[tuple[Descriptor, bytes]], Manifest, ImageConfig]:
        """Walk from the target to one manifest and its config. Returns every document met, config last, manifest before it."""
        where = str(request.reference)
        met: list[tuple[Descriptor, bytes]] = []
        descriptor = target
        while len(met) <= MAX_INDEX_DEPTH:
            data = first if first is not None and not met else await self._document(fetcher, descriptor)
            met.append((descriptor, data))
            document = parse_document(data, descriptor.media_type, where)
            if isinstance(document, Index):
                descriptor = document.select(request.platform, where)
                continue
            raw = await self._document(fetcher, document.config)
            met.append((document.config, raw))
            config = _no_config(request.platform) if document.is_artifact else parse_config(raw, f"{where}: config")
            if config.diff_ids and len(config.diff_ids) != len(document.layers):
                raise InvalidArgument(f"{len(document.layers)} layers but {len(config.diff_ids)} diff IDs in the config", where=where)
            if document.layers and not config.diff_ids and not document.is_artifact:
                raise InvalidArgument("an image config without diff IDs", where=where)
            return met, document, config
        raise ResourceExhausted(f"indexes nested deeper than {MAX_INDEX_DEPTH}", where=where)

    async def _document(self, fetcher: Fetcher, descriptor: Descriptor) -> bytes:
        if descriptor.data is not None:
            return descriptor.data
        stored = await self._threads.run(_read_small, self._content, descriptor)
        return stored or await self._documents.run(descriptor.digest, lambda: fetcher.document(descriptor, limit=MAX_DOCUMENT))

    async def _store(self, documents: Sequence[tuple[Descriptor, bytes]]) -> None:
        await all_of(*(self._threads.run(_store_small, self._content, d, data) for d, data in documents))

    async def _plan(
        self, request: PullRequest, fetcher: Fetcher, manifest: Manifest, config: ImageConfig, timings: dict[str, float]
    ) -> _Plan:
        snapshotter = self._snapshotters.get(request.snapshotter)
        if snapshotter is None:
            raise NotFound(f'no snapshotter "{request.snapshotter}"', hint=f"this node has {', '.join(self._snapshotters)}")
        keys: list[LayerKey | None] = [
            await self._decryptor.unwrap(layer) if self._decryptor.encrypted(layer) else None for layer in manifest.layers
        ]
        diff_ids = config.diff_ids or tuple(layer.digest for layer in manifest.layers)
        secrets = [(layer.digest, key.fingerprint) if key else None for layer, key in zip(manifest.layers, keys, strict=True)]
        names = tuple(layer_names(diff_ids, secrets))
        return _Plan(request, fetcher, manifest, diff_ids, names, tuple(keys), snapshotter, {}, timings)

    async def _layer(self, plan: _Plan, position: int) -> None:
        """Make one layer's snapshot exist, joining whoever is at it already."""
        layer = plan.manifest.layers[position]
        name = plan.names[position]
        if await self._threads.run(plan.snapshotter.stat, name) is None:
            await self._layers.run(f"{plan.snapshotter.name}/{name}", lambda: self._unpack(plan, position))
            plan.request.reporter.layer(layer.digest, layer.size, layer.size, "done")
        else:
            plan.request.reporter.layer(layer.digest, layer.size, layer.size, "exists")

    async def _unpack(self, plan: _Plan, position: int) -> None:
        """One layer from the registry to a committed snapshot; nothing of it stays when that fails."""
        name = plan.names[position]
        parent = plan.names[position - 1] if position else None
        snapshotter = plan.snapshotter
        if await self._threads.run(snapshotter.stat, name) is not None:
            return
        key = Key(f"unpack-{uuid.uuid4().hex}")
        with self._stages.use(f"{snapshotter.name}/{name}") as stage:
            try:
                usage = await (self._beside if snapshotter.parallel else self._on_parent)(plan, position, key)
                await afailpoint("layer.settled")
                stage.key = key
                stage.settled.set()
                await both(self._syncs[snapshotter.name](key), self._committed(plan, position - 1))
                await afailpoint("layer.synced")
                await self._threads.run(snapshotter.commit, name, key, parent=parent, usage=usage)
                await afailpoint("layer.committed")
            except BaseException:
                await asyncio.shield(self._threads.run(snapshotter.remove, key))
                raise

    async def _beside(self, plan: _Plan, position: int, key: Key) -> Usage | None:
        """Unpack a layer while its parents are still on their way, then fit it to them."""
        job, _ = await both(self._extract(plan, position, key, None), self._settled(plan, position - 1))
        try:
            await afailpoint("layer.unpacked")
            return await self._unpacker.settle(await self._mounts(plan, position, key), job)
        except Aborted:
            # It came through a pipe and needs its parents while it is unpacked.
            await self._threads.run(plan.snapshotter.remove, key)
            return await self._on_parent(plan, position, key)
        except BaseException:
            await asyncio.shield(job.abort())
            raise

    async def _on_parent(self, plan: _Plan, position: int, key: Key) -> Usage | None:
        """Unpack a layer onto its committed parent."""
        await both(self._fetch(plan, plan.manifest.layers[position]), self._committed(plan, position - 1))
        job = await self._extract(plan, position, key, plan.names[position - 1] if position else None)
        return await self._unpacker.settle([], job)

    async def _committed(self, plan: _Plan, position: int) -> None:
        if position >= 0:
            await self._layer(plan, position)

    async def _settled(self, plan: _Plan, position: int) -> None:
        """Until a layer's files are as they will be, committed or not."""
        if position < 0:
            return
        with self._stages.use(f"{plan.snapshotter.name}/{plan.names[position]}") as stage:
            layer = asyncio.ensure_future(self._layer(plan, position))
            try:
                await _first_of(layer, stage.settled.wait())
                if layer.done():
                    layer.result()
            finally:
                layer.cancel()
                await asyncio.wait([layer])

    async def _mounts(self, plan: _Plan, position: int, key: Key) -> list[Mount]:
        """The layer on its parents, of which some may be settled but not committed yet."""
        for _ in plan.names:
            below: list[str] = []
            for name in reversed(plan.names[:position]):
                if await self._threads.run(plan.snapshotter.stat, name) is not None:
                    below.append(name)
                    break
                with self._stages.use(f"{plan.snapshotter.name}/{name}") as stage:
                    below.append(stage.key)
            try:
                return await self._threads.run(plan.snapshotter.mounts, key, below=below)
            except NotFound:
                continue  # a parent was committed between the two looks: its key is gone, its name is there now
        raise Internal("the parents of a layer keep changing", where=str(plan.request.reference))

    async def _extract(self, plan: _Plan, position: int, key: Key, parent: Name | None) -> UnpackJob:
        """Unpack one layer into a new active snapshot while its blob arrives. Returns the finished job."""
        layer = plan.manifest.layers[position]
        mounts = await self._threads.run(plan.snapshotter.prepare, key, parent)
        rebase = parent is None and plan.snapshotter.parallel
        await afailpoint("layer.prepared")
        with self._growing.use(layer.digest) as blob:
            async with AsyncExitStack() as stack:
                fetch = asyncio.ensure_future(self._fetch(plan, layer))
                stack.push_async_callback(_end, fetch)
                if self._decryptor.processed(layer):
                    await fetch
                    source, available, chain = await self._processed(plan, layer, stack)
                else:
                    await _first_of(fetch, blob.opened.wait())
                    source, available, chain = await self._source(layer, fetch, blob), blob.available, None
                    stack.callback(os.close, source)
                job = await self._unpacker.start(_layer_input(plan, position, source, chain), mounts, rebase=rebase)
                try:
                    plan.request.reporter.layer(layer.digest, layer.size, available, "unpacking")
                    blob.follow(job)
                    if fetch.done():
                        job.advance(layer.size)
                    applied, _ = await both(_judged(job.finish(), chain), _awaited(fetch))
                except BaseException:
                    await asyncio.shield(job.abort())
                    raise
                for phase, seconds in applied.timings.items():
                    plan.timings[phase] = plan.timings.get(phase, 0.0) + seconds
                return job

    async def _source(self, layer: Descriptor, fetch: asyncio.Future[None], blob: GrowingBlob) -> int:
        """A descriptor of the stored or of the growing blob; the caller closes it."""
        if not fetch.done():
            return blob.duplicate()
        fetch.result()
        return await self._threads.run(_stored_fd, self._content, layer.digest)

    async def _processed(self, plan: _Plan, layer: Descriptor, stack: AsyncExitStack) -> tuple[int, int, ChainRun]:
        """The output of the configured stream processors for a stored blob."""
        stored = await self._threads.run(_stored_fd, self._content, layer.digest)
        try:
            chain = await self._decryptor.open_chain(layer, stored)
        finally:
            os.close(stored)
        stack.push_async_callback(chain.kill)
        return chain.output, layer.size, chain

    async def _fetch(self, plan: _Plan, layer: Descriptor) -> None:
        """Make one blob be in the content store, joining whoever fetches it already."""
        if await self._threads.run(self._content.info, layer.digest) is None:
            source = await self._blobs.run(layer.digest, lambda: self._download(plan, layer))
            plan.sources[layer.digest] = source

    async def _download(self, plan: _Plan, layer: Descriptor) -> BlobSource:
        began = time.monotonic()
        try:
            try:
                return await self._download_once(plan, layer)
            except _Lied as lied:
                # Who served wrong bytes is not asked for this blob again; somebody else may have the right ones.
                await plan.fetcher.rejected(layer, lied.source)
                log.warning("%s", lied.error)
            try:
                return await self._download_once(plan, layer)
            except _Lied as lied:
                raise lied.error from None
        finally:
            plan.timings["download"] = plan.timings.get("download", 0.0) + time.monotonic() - began

    async def _download_once(self, plan: _Plan, layer: Descriptor) -> BlobSource:
        writer = await self._threads.run(self._content.writer, f"layer-{layer.digest}", total=layer.size, expected=layer.digest)
        with self._growing.use(layer.digest) as blob:
            try:
                blob.open(writer.fileno(), writer.status().offset)
                source = await plan.fetcher.download(layer, _Sink(writer, blob, self._threads, plan.request, layer))
                await afailpoint("layer.downloaded")
                try:
                    await self._threads.run(writer.commit, layer.size, layer.digest)
                except DataLoss as error:
                    raise _Lied(error, source) from error
                blob.grew(layer.size)
            finally:
                await asyncio.shield(self._threads.run(writer.close))
        return source


class _Lied(Exception):
    """The bytes that `source` gave are not the blob."""

    def __init__(self, error: DataLoss, source: BlobSource) -> None:
        super().__init__(str(error))
        self.error = error
        self.source = source


def _layer_input(plan: _Plan, position: int, source: int, chain: ChainRun | None) -> LayerInput:
    layer, key = plan.manifest.layers[position], plan.keys[position]
    media_type = key.media_type if key else layer.media_type
    return LayerInput(
        media_type=chain.media_type if chain else media_type,
        digest=layer.digest,
        diff_id=plan.diff_ids[position],
        source=source,
        size=layer.size,
        secret=key.secret if key and not chain else None,
    )


def _resources(plan: _Plan, documents: Sequence[tuple[Descriptor, bytes]]) -> list[tuple[str, str]]:
    """Everything a pull needs, for its lease: documents, layer blobs, snapshots."""
    content = [d.digest for d, _ in documents] + [layer.digest for layer in plan.manifest.layers]
    return [("content", digest) for digest in content] + [("snapshot", f"{plan.snapshotter.name}/{name}") for name in plan.names]


def _credentials(attempts: Sequence[Attempt]) -> list[str]:
    """Names of the credentials without which the image may not have been had; who else may have it depends on them."""
    return sorted({a.credential for a in attempts if a.credential not in ("", "none") and not a.credential.startswith("withheld")})


def _no_config(platform: Platform) -> ImageConfig:
    return ImageConfig(platform=platform, diff_ids=())


def _read_small(content: Store, descriptor: Descriptor) -> bytes | None:
    """A document that is here already, verified again because it decides everything else; None when it is not."""
    if content.info(descriptor.digest) is None:
        return None
    try:
        return read_verified(content, descriptor.digest, MAX_DOCUMENT)
    except (DataLoss, NotFound):
        return None


def _store_small(content: Store, descriptor: Descriptor, data: bytes) -> None:
    if content.info(descriptor.digest) is not None:
        return
    writer = content.writer(f"document-{descriptor.digest}-{uuid.uuid4().hex}", total=len(data), expected=descriptor.digest)
    try:
        writer.write(data)
        writer.commit(len(data), descriptor.digest)
    finally:
        writer.close()


def _stored_fd(content: Store, digest: Digest) -> int:
    with content.reader(digest) as reader:
        return os.dup(reader.fileno())


async def _judged(verdict: Awaitable[Applied], chain: ChainRun | None) -> Applied:
    """The worker's verdict; where stream processors feed it, theirs counts first, for the cause is usually there."""
    if chain is None:
        return await verdict
    try:
        return await verdict
    finally:
        await chain.wait()


async def _end(task: asyncio.Future[None]) -> None:
    """Stop a task that may be done already; its error, if any, has been told or no longer matters."""
    task.cancel()
    await asyncio.wait([task])


async def _awaited(task: asyncio.Future[None]) -> None:
    await task


async def _first_of(task: asyncio.Future[Any], other: Coroutine[Any, Any, Any]) -> None:
    """Until either is done; the second is dropped then, the first is left alone."""
    waiting = asyncio.ensure_future(other)
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


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
