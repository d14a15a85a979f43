"""Pulling: resolve → fetch → decrypt → unpack → publish, each part shared by all pulls that need it at the same time.

The order of a pull, and what makes it safe:

1. resolve asks the registry, always, so that the caller's credentials are really checked (KEP-2535).
2. A lease names everything the pull will need before it checks what is stored, so that no collection removes it.
3. Index, manifest and config are verified and stored. Layers are named by chain ID (see layer_names), so a layer that is
   there under its name is complete and is not fetched again.
4. Each missing layer is one flight (layers.py) over one download (blobs.py); a second pull that needs the same joins it.
   The last to leave cancels it; bytes stay for resume.
5. Only then the image gets its name, in one transaction. A kill anywhere before leaves no image and no half layer.

Source: docs/architecture.md ("The life of a pull").
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from imgsvc.base.concurrency import all_of, to_the_end
from imgsvc.base.errors import DataLoss, NotFound
from imgsvc.base.failpoints import afailpoint
from imgsvc.base.oci import Descriptor, Digest, ImageConfig, Manifest, Platform
from imgsvc.base.reference import Reference
from imgsvc.content.interfaces import Store
from imgsvc.content.verify import wrong_size
from imgsvc.decrypt.interfaces import Decryptor, LayerKey
from imgsvc.images.choosing import Chosen, choose
from imgsvc.images.documents import Documents
from imgsvc.images.downloads import Blobs
from imgsvc.images.layers import LayerPlan, Layers, NullReporter, PullReporter, layer_names, layer_secrets, unwrap_layers
from imgsvc.images.provenance import Provenance, Witness
from imgsvc.images.records import Image, build_image
from imgsvc.images.storage import Storage
from imgsvc.registry.interfaces import Attempt, BlobSource, Credential, Registry, Resolved, identity
from imgsvc.snapshot.interfaces import Key, Name, StreamSnapshotter, Unpacker


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to pull, with which credentials, into which snapshotter. reporter: receives progress.

    source: where from, if not from the registries of this node's configuration (an archive).
    """

    reference: Reference
    credential: Credential | None
    platform: Platform
    snapshotter: str
    reporter: PullReporter = field(default_factory=NullReporter)
    source: Registry | None = None


class Verifier(Protocol):
    """Decides whether an image may be used, by its name and digest; see verification.py."""

    async def verify(self, reference: Reference, target: Descriptor, credential: Credential | None) -> None:
        """Raises: PermissionDenied with the reason SignatureValidationFailed when it may not, or when that cannot be decided.

        The verdict is about target.digest, whatever a tag says later. credential: the puller's own, for signatures.
        """


class AllowAll:
    """The verifier of a node without [verify]."""

    async def verify(self, reference: Reference, target: Descriptor, credential: Credential | None) -> None:
        """Yes."""


@dataclass(slots=True)
class Pulled:
    """The outcome. timings [seconds] by phase, summed over layers that ran side by side.

    attempts: everything asked of registries; bytes_from: bytes of blobs by endpoint.
    """

    image: Image
    timings: dict[str, float]
    attempts: tuple[Attempt, ...] = ()
    bytes_from: Mapping[str, int] = field(default_factory=dict)


class PullObserver(Protocol):
    """Receives every pull, from any caller; must not block."""

    def started(self, request: PullRequest) -> None:
        """A pull begins."""

    def finished(self, request: PullRequest, outcome: Pulled | BaseException, seconds: float) -> None:
        """It ended, one way or the other."""


class Puller:
    """Pulls images. One per daemon."""

    def __init__(
        self,
        *,
        registry: Registry,
        storage: Storage,
        unpacker: Unpacker,
        decryptor: Decryptor,
        provenance: Provenance,
        verifier: Verifier | None = None,
        observer: PullObserver | None = None,
        durable: bool = True,
    ) -> None:
        """durable: acknowledged images survive a power cut (images.sync = "full")."""
        self._verifier = verifier or AllowAll()
        self._observer = observer
        self._registry = registry
        self._content = storage.content
        self._snapshotters = storage.snapshotters
        self._decryptor = decryptor
        self._images = storage.images
        self._leases = storage.leases
        self._threads = storage.threads
        self.blobs = Blobs(storage.content, storage.threads)  # shared with all other downloads into the store
        self._layers = Layers(self.blobs, storage.snapshotters, unpacker, decryptor, storage.threads, durable=durable)
        self.documents = Documents(storage.content, storage.threads, provenance)  # likewise
        self._provenance = provenance

    async def pull(self, request: PullRequest) -> Pulled:
        """Make the image complete and visible on this node. Cancelling the last caller cancels the work.

        Raises: PullFailed with every attempt; DataLoss, InvalidArgument, PermissionDenied, ResourceExhausted.
        Durability: when this returns, the image survives a power cut (sync = "full").
        """
        if self._observer is None:
            return await self._pull(request)
        began = time.monotonic()
        self._observer.started(request)
        try:
            pulled = await self._pull(request)
        except BaseException as error:
            self._observer.finished(request, error, time.monotonic() - began)
            raise
        self._observer.finished(request, pulled, time.monotonic() - began)
        return pulled

    async def _pull(self, request: PullRequest) -> Pulled:
        began = time.monotonic()
        registry = request.source or self._registry
        resolved = await registry.resolve(request.reference, request.credential)
        request.reporter.resolved(resolved.descriptor.digest, resolved.endpoint)
        timings = {"resolve": time.monotonic() - began}
        await self._verifier.verify(request.reference, resolved.descriptor, request.credential)
        timings["verify"] = time.monotonic() - began - timings["resolve"]
        took_credentials = any(attempt.credential.taken for attempt in resolved.attempts)

        def saw(key: str, blob: Digest | None = None) -> None:
            anonymous = not (took_credentials or witness.took_credentials)
            self._provenance.saw(request.reference.name, key, anonymous=anonymous, blob=blob)

        witness = Witness(registry.fetcher(request.reference, request.credential), saw, self._provenance.unsee)
        await afailpoint("pull.resolved")
        async with self._leases.held([("content", resolved.descriptor.digest)], purpose=f"pull {request.reference}") as lease:
            chosen = await self._choose(request, witness, resolved, anonymous=not took_credentials)
            documents, manifest = chosen.documents, chosen.manifest
            config = chosen.config or ImageConfig(platform=request.platform, diff_ids=())
            plan = replace(await self._plan(request, witness, manifest, config, timings), on_unpacked=saw)
            await self._leases.add(lease, _resources(plan, documents))
            await self._store(documents)
            await afailpoint("pull.documents")
            if not config.diff_ids:
                await all_of(*(self._layers.bring(plan, layer) for layer in manifest.layers))
            else:
                await self._layers.ensure_all(plan)
            await afailpoint("pull.layers")
            await self._threads.run(_check_sizes, self._content, [d for d, _ in documents] + list(manifest.layers), str(request.reference))
            shown = await self._proven(plan, witness, is_unpacked=bool(config.diff_ids), anonymous=not took_credentials)
            attempts = (*resolved.attempts, *(a for source in plan.sources.values() for a in source.attempts))
            image = build_image(
                documents[-2][0],
                manifest,
                config,
                plan.names,
                [key is not None for key in plan.keys],
                [descriptor for descriptor, _ in documents],
                {
                    "resolved_by": resolved.endpoint,
                    "credentials": _credentials(attempts),
                    "blobs": {digest: dict(source.by_endpoint) for digest, source in plan.sources.items()},
                },
                artifact=chosen.config is None,
            )
            await self._provenance.record(
                request.reference.name,
                [descriptor.digest for descriptor, _ in documents] + list(shown),
                anonymous=not (took_credentials or witness.took_credentials),
                unpacked={name: layer.digest for name, layer in zip(plan.names, plan.layers, strict=True) if name in shown},
            )
            reference = request.reference
            added = await self._images.add(
                image,
                "" if reference.digest else reference.tagged,
                str(reference.with_digest(resolved.descriptor.digest)),
            )
            timings["total"] = time.monotonic() - began
            return Pulled(added, timings, attempts, _bytes_from(plan.sources.values()))

    async def bring_back(self, image: Image, blobs: Sequence[Digest]) -> None:
        """Have blobs of layers of a complete image in the store, from its own repository where the cache gave them up.

        The caller's lease names them. Raises: PullFailed, DataLoss, ResourceExhausted, NotFound (the image has no name).
        """
        plan = self._plan_of(image, next(iter(self._snapshotters)), [None] * len(image.layers))
        await all_of(*(self._layers.bring(plan, layer) for layer in plan.layers if layer.digest in blobs))

    async def unpack_aside(self, image: Image, position: int, snapshotter: str, key: Key) -> None:
        """Unpack a layer of a complete image once more, into an active snapshot `key` that the caller removes in every case.

        From its blob; from itself where the snapshotter keeps it as its stream.
        Raises: as pull; PermissionDenied without the key of an encrypted layer.
        """
        driver, layer = self._snapshotters[snapshotter], image.layers[position]
        if isinstance(driver, StreamSnapshotter):
            await self._layers.read_again(driver, Name(layer.snapshot), layer.diff_id, key)
            return
        keys = await unwrap_layers(self._decryptor, [layer.descriptor for layer in image.layers])
        await self._layers.unpack_aside(self._plan_of(image, snapshotter, keys), position, key)

    async def move(self, image: Image, snapshotter: str) -> None:
        """Unpack a complete image for another snapshotter, too, from its blobs; what the cache gave up is fetched from its repository.

        The caller's lease names blobs and snapshots. Raises: as pull; PermissionDenied without the key of an encrypted layer.
        """
        keys = await unwrap_layers(self._decryptor, [layer.descriptor for layer in image.layers])
        await self._layers.ensure_all(self._plan_of(image, snapshotter, keys))

    def _plan_of(self, image: Image, snapshotter: str, keys: Sequence[LayerKey | None]) -> LayerPlan:
        # A digest is a name that a registry answered to; a tag may be of our own making (`imgsvc tag`).
        name = next(iter(image.repo_digests + image.repo_tags), "")
        if not name:
            raise NotFound(f"image {image.image_id} has no name to fetch its layers by")
        return LayerPlan(
            label=name,
            fetcher=self._registry.fetcher(Reference.parse(name), None),
            layers=tuple(layer.descriptor for layer in image.layers),
            diff_ids=tuple(layer.diff_id for layer in image.layers),
            names=tuple(Name(layer.snapshot) for layer in image.layers),
            keys=tuple(keys),
            snapshotter=self._snapshotters[snapshotter],
            reporter=NullReporter(),
        )

    async def _proven(self, plan: LayerPlan, witness: Witness, *, is_unpacked: bool, anonymous: bool) -> list[str]:
        """Digests of blobs and names of snapshots that the image's repository has shown, or that are public: all that is here.

        What came another way (stored, unpacked or on its way in before) is used only after that. Source: provenance.py.
        Raises: PullFailed, PermissionDenied when the repository has other bytes; DataLoss when a layer is not what the config says.
        """
        shown: list[list[str]] = await all_of(
            *(
                self._prove_layer(plan, position, witness, is_unpacked=is_unpacked, anonymous=anonymous)
                for position in range(len(plan.layers))
            )
        )
        return [part for layer in shown for part in layer]

    async def _prove_layer(self, plan: LayerPlan, position: int, witness: Witness, *, is_unpacked: bool, anonymous: bool) -> list[str]:
        layer, name, repository = plan.layers[position], plan.names[position], Reference.parse(plan.label).name
        is_stored = await self._threads.run(self.blobs.has, layer.digest)
        is_known = layer.digest in witness.shown or self._provenance.may_use(repository, layer.digest, anonymous=anonymous)
        if is_stored and not is_known:
            await witness.prove(layer, self._content, self._threads)
            is_known = True
        shown = [str(layer.digest)] if is_known else []
        if not is_unpacked:
            return shown
        if position not in plan.unpacked and not self._provenance.may_use(repository, name, anonymous=anonymous):
            if not is_known:
                await self._layers.bring(plan, layer)
                await witness.prove(layer, self._content, self._threads)
                shown = [str(layer.digest)]
            if not self._provenance.unpacks_to(layer.digest, name):
                await self._unpack_to_compare(plan, position)
        return [*shown, str(name)]

    async def _unpack_to_compare(self, plan: LayerPlan, position: int) -> None:
        """Unpack a layer that is here from other bytes, to see that these are the same. Raises: DataLoss when they are not."""
        key = Key(f"compare-{uuid.uuid4().hex}")
        try:
            await self._layers.unpack_aside(plan, position, key)
        finally:
            await to_the_end(self._threads.run(plan.snapshotter.remove, key))

    async def _choose(self, request: PullRequest, witness: Witness, resolved: Resolved, *, anonymous: bool) -> Chosen:
        """The image of what was resolved; its own document has come with the answer, if it has."""

        async def read(descriptor: Descriptor) -> bytes:
            if descriptor is resolved.descriptor and resolved.document is not None:
                return resolved.document
            return await self.documents.get(request.reference.name, identity(request.credential), descriptor, witness, anonymous=anonymous)

        return await choose(resolved.descriptor, request.platform, read, str(request.reference))

    async def _store(self, documents: Sequence[tuple[Descriptor, bytes]]) -> None:
        await all_of(*(self.documents.put(descriptor, data) for descriptor, data in documents))

    async def _plan(
        self, request: PullRequest, witness: Witness, manifest: Manifest, config: ImageConfig, timings: dict[str, float]
    ) -> LayerPlan:
        snapshotter = self._snapshotters.get(request.snapshotter)
        if snapshotter is None:
            raise NotFound(f'no snapshotter "{request.snapshotter}"', hint=f"this node has {', '.join(self._snapshotters)}")
        began = time.monotonic()
        keys = await unwrap_layers(self._decryptor, manifest.layers)
        if any(keys):
            timings["unwrap"] = time.monotonic() - began
        diff_ids = config.diff_ids or tuple(layer.digest for layer in manifest.layers)
        return LayerPlan(
            label=str(request.reference),
            fetcher=witness,
            layers=manifest.layers,
            diff_ids=diff_ids,
            names=tuple(layer_names(diff_ids, layer_secrets(manifest.layers, keys))),
            keys=tuple(keys),
            snapshotter=snapshotter,
            reporter=request.reporter,
            timings=timings,
        )


def _resources(plan: LayerPlan, documents: Sequence[tuple[Descriptor, bytes]]) -> list[tuple[str, str]]:
    """Everything a pull needs, for its lease: documents, layer blobs, snapshots."""
    content = [d.digest for d, _ in documents] + [layer.digest for layer in plan.layers]
    return [("content", digest) for digest in content] + [("snapshot", f"{plan.snapshotter.name}/{name}") for name in plan.names]


def _bytes_from(sources: Iterable[BlobSource]) -> dict[str, int]:
    total: dict[str, int] = {}
    for source in sources:
        for endpoint, count in source.by_endpoint.items():
            total[endpoint] = total.get(endpoint, 0) + count
    return total


def _credentials(attempts: Sequence[Attempt]) -> list[str]:
    """Names of the credentials without which the image may not have been had; who else may have it depends on them."""
    return sorted({str(a.credential) for a in attempts if a.credential.taken})


def _check_sizes(content: Store, blobs: Sequence[Descriptor], where: str) -> None:
    """Raises: DataLoss when a descriptor claims another size than its blob has, wherever the blob came from."""
    for blob in blobs:
        if problem := wrong_size(content, blob):
            raise DataLoss(problem, where=where, hint="the manifest is wrong; push the image again")
