"""Image records: which images are stored, under which names, and what they consist of.

An image is known by its ID, the digest of its config. Names are tags (`docker.io/library/nginx:1.27`) and repo digests
(`docker.io/library/nginx@sha256:…`); a name belongs to one image at a time. Becoming visible here is the last step of a
pull, so every record names a complete image. The records live in the metadata table "images"; a copy is held in memory,
so that listings never touch the disk.

Source: CRI v1 Image.
"""

from __future__ import annotations

import asyncio
import fnmatch
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from imgsvc.base.concurrency import to_the_end
from imgsvc.base.errors import ImgsvcError, InvalidArgument, NotFound, printable
from imgsvc.base.failpoints import afailpoint
from imgsvc.base.metadb.database import MetaDB, Record, WriteTxn
from imgsvc.base.oci import MAX_DOCUMENT, MAX_INDEX_DEPTH, MAX_SIZE, Descriptor, Digest, ImageConfig, Manifest, config_from_json
from imgsvc.base.reference import Reference, is_id, may_be_id

log = logging.getLogger(__name__)

TABLE: Final = "images"
RECORD_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image. snapshot: name of its committed snapshot, the same in every snapshotter."""

    descriptor: Descriptor
    diff_id: Digest
    snapshot: str
    encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """A complete image on this node.

    documents: digests of the index, manifest and config blobs, which stay as long as the image does.
    size: index, manifest, config and layers as stored [bytes], the number CRI reports. created_at: [s since epoch].
    provenance: {"resolved_by": endpoint, "blobs": {digest: {endpoint: bytes}}}.
    """

    image_id: Digest
    manifest: Descriptor
    config: ImageConfig
    layers: tuple[Layer, ...]
    documents: tuple[Digest, ...]
    size: int
    created_at: float
    repo_tags: tuple[str, ...] = ()
    repo_digests: tuple[str, ...] = ()
    artifact: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return self.repo_tags + self.repo_digests

    @property
    def repositories(self) -> set[str]:
        """Repositories it has names in."""
        return {name.partition("@")[0] for name in self.repo_digests} | {tag.rpartition(":")[0] for tag in self.repo_tags}

    @property
    def top_snapshot(self) -> str | None:
        """Snapshot a container starts from; None for an image without layers."""
        return self.layers[-1].snapshot if self.layers else None


def build_image(
    manifest_descriptor: Descriptor,
    manifest: Manifest,
    config: ImageConfig,
    snapshots: Sequence[str],
    encrypted: Sequence[bool],
    documents: Sequence[Descriptor],
    provenance: Mapping[str, Any],
    *,
    artifact: bool,
) -> Image:
    """The record of an image whose parts are all here. Snapshots and encrypted: one per layer, base first."""
    diff_ids: Sequence[Digest] = config.diff_ids or tuple(layer.digest for layer in manifest.layers)
    layers = tuple(
        Layer(descriptor, diff_id, snapshot, secret)
        for descriptor, diff_id, snapshot, secret in zip(manifest.layers, diff_ids, snapshots, encrypted, strict=True)
    )
    return Image(
        image_id=manifest.config.digest,
        manifest=manifest_descriptor,
        config=config,
        layers=layers,
        documents=tuple(d.digest for d in documents),
        size=sum(d.size for d in documents) + sum(layer.size for layer in manifest.layers),
        created_at=time.time(),
        artifact=artifact,
        provenance=provenance,
    )


def check_image(image: Image) -> None:
    """Raises: InvalidArgument when CRI's types could not carry the image: one such record would fail every listing of the node."""
    if not 0 <= image.size <= MAX_SIZE + (MAX_INDEX_DEPTH + 2) * MAX_DOCUMENT:
        raise InvalidArgument(f"a size of {image.size} bytes is out of range", where=image.image_id)
    try:
        "".join((image.config.user, *image.names)).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument("a name or user that is not Unicode text", where=image.image_id) from error


class ImageStore:
    """All images. Lookups are synchronous and cheap; changes are durable when they return.

    Attributes: unusable: records that no image can be made of, by image ID, each with the reason. They are in no listing; fsck reports them.
    """

    def __init__(self, db: MetaDB, pinned: Iterable[str] = ()) -> None:
        self._db = db
        self._pinned: dict[str, tuple[str, ...]] = {}
        self.pin(pinned)
        self._watchers: list[Callable[[str, Image], None]] = []
        self._changing = asyncio.Lock()
        self._images: dict[str, Image] = {}
        self._names: dict[str, str] = {}
        self._repositories: dict[str, dict[str, None]] = {}  # IDs of images by the repositories they have names in
        self.unusable: dict[str, str] = {}
        with db.read() as txn:
            for image_id, record in txn.items(TABLE):
                self._load(image_id, record)

    def _load(self, image_id: str, record: Record) -> None:
        """One bad record costs one image, not the start of the daemon."""
        try:
            image = _decode(record)
            check_image(image)
        except (ImgsvcError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {printable(str(error), 160)}"
            log.error("the record of image %s cannot be used: %s; pull the image again", image_id, reason)
            self.unusable[image_id] = reason
        else:
            self._show(image_id, image)

    def all(self) -> list[Image]:
        """Every image, oldest first."""
        return sorted(self._images.values(), key=lambda image: image.created_at)

    def get(self, image_id: str) -> Image | None:
        """By full ID."""
        return self._images.get(image_id)

    def find(self, text: str) -> Image | None:
        """By ID, unambiguous short ID, tag, digest or tag@digest, normalised. None when it is not stored.

        Raises: InvalidArgument when `text` cannot be any of these, or is a short ID of several images.
        """
        if text in self._images:
            return self._images[text]
        bare = text.removeprefix("sha256:")
        if text.startswith("sha256:") or may_be_id(text):
            matches = [image_id for image_id in self._images if image_id.startswith(f"sha256:{bare}")]
            if len(matches) > 1:
                raise InvalidArgument(f'image ID "{printable(text, 80)}" is ambiguous', hint="give more digits")
            if matches:
                return self._images[matches[0]]
            if text.startswith("sha256:") or len(bare) == 64:
                return None
        return self.named(Reference.parse(text))

    def of_repository(self, repository: str) -> list[Image]:
        """Images with a name in a repository (host/path). Costs what that repository has, not what the node has."""
        return [self._images[image_id] for image_id in self._repositories.get(repository, ())]

    def named(self, reference: Reference) -> Image | None:
        """The image that has this name."""
        # With a digest the tag is decoration: the digest alone decides (tag@digest).
        name = str(reference.with_digest(reference.digest)) if reference.digest else reference.tagged
        return self._images.get(self._names.get(name, ""))

    def on_change(self, watcher: Callable[[str, Image], None]) -> None:
        """Tell `watcher` of every change: ("added" | "removed" | "untagged", the image as it is or was)."""
        self._watchers.append(watcher)

    def _tell(self, change: str, image: Image) -> None:
        for watcher in self._watchers:
            watcher(change, image)

    def pin(self, patterns: Iterable[str], *, owner: str = "configuration") -> None:
        """Replace the pins of one owner. Raises: InvalidArgument for what is neither a name nor a pattern."""
        self._pinned[owner] = pin_patterns(patterns)

    def pinned(self, image: Image) -> bool:
        """Whether a pin keeps this image: exact name, ID, glob with `*` at the ends, or `*keyword*`."""
        called = (*image.names, image.image_id)
        return any(fnmatch.fnmatchcase(name, pattern) for name in called for patterns in self._pinned.values() for pattern in patterns)

    def forget_unusable(self, image_id: str) -> None:
        """Delete a record that is in `unusable`. Blocking."""
        self._db.write(lambda txn: txn.delete(TABLE, image_id))
        self.unusable.pop(image_id, None)

    async def add(self, image: Image, tag: str, repo_digest: str) -> Image:
        """Make a complete image visible under its names; either name may be "". Moves a tag that stood elsewhere.

        Returns: the record as stored, with every name it has now. Raises: InvalidArgument for what check_image refuses.
        """
        check_image(image)
        async with self._changing:
            known = self._images.get(image.image_id, image)
            touched = [
                replace(
                    image,
                    repo_tags=_plus(known.repo_tags, tag),
                    repo_digests=_plus(known.repo_digests, repo_digest),
                    created_at=known.created_at,
                )
            ]
            holder = self._images.get(self._names.get(tag, ""))
            if holder and holder.image_id != image.image_id:
                touched.append(_without(holder, tag))
            await self._write(touched, "added")
            return touched[0]

    async def tag(self, source: str, name: Reference) -> Image:
        """Give an image one more tag. Raises: NotFound, InvalidArgument (no tag in `name`)."""
        image = self.find(source)
        if image is None:
            raise NotFound(f'no image "{printable(source, 200)}"', hint="see `imgsvc images`")
        if not name.tag or name.digest:
            raise InvalidArgument(f'"{name}" is not a tag', hint="write it as registry/repository:tag")
        return await self.add(image, name.tagged, "")

    async def remove(self, image_id: str) -> Image | None:
        """Forget an image with all its names; None when it was not stored. The next collection removes its parts."""

        async def forget() -> Image | None:
            await self._db.awrite(lambda txn: txn.delete(TABLE, image_id))
            await afailpoint("image.removed")
            gone = self._hide(image_id)
            if gone is not None:
                self._tell("removed", gone)
            return gone

        async with self._changing:
            await afailpoint("image.remove")
            return await to_the_end(forget())

    async def untag(self, name: str) -> Image | None:
        """Remove one name; an image without names is removed. Returns the image that had it, None when none had."""
        reference = Reference.parse(name)
        image = self.named(reference)
        if image is None:
            return None
        gone = str(reference.with_digest(reference.digest)) if reference.digest else reference.tagged
        rest = _without(image, gone)
        if not rest.repo_tags:
            await self.remove(image.image_id)
            return image
        async with self._changing:
            await self._write([rest], "untagged")
        return image

    async def _write(self, images: Sequence[Image], change: str) -> None:
        """One transaction for all, then the copies in memory, then the watchers; the caller holds `_changing`.

        Once begun it goes to its end, or an image that a collection knows nothing of would be back after the next start.
        """

        def put(txn: WriteTxn) -> None:
            for image in images:
                txn.put(TABLE, image.image_id, _encode(image))

        async def show() -> None:
            await self._db.awrite(put)
            await afailpoint("image.added")
            for image in reversed(images):
                self._show(image.image_id, image)
                self.unusable.pop(image.image_id, None)
            self._tell(change, images[0])

        await afailpoint("image.add")
        await to_the_end(show())

    def _show(self, image_id: str, image: Image) -> None:
        self._hide(image_id)
        self._images[image_id] = image
        for name in image.names:
            self._names[name] = image_id
        for repository in image.repositories:
            self._repositories.setdefault(repository, {})[image_id] = None

    def _hide(self, image_id: str) -> Image | None:
        old = self._images.pop(image_id, None)
        for name in old.names if old else ():
            if self._names.get(name) == image_id:
                del self._names[name]
        for repository in old.repositories if old else ():
            self._repositories[repository].pop(image_id, None)
            if not self._repositories[repository]:
                del self._repositories[repository]
        return old


def _plus(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return names if not name or name in names else (*names, name)


def _without(image: Image, name: str) -> Image:
    return replace(
        image,
        repo_tags=tuple(n for n in image.repo_tags if n != name),
        repo_digests=tuple(n for n in image.repo_digests if n != name),
    )


def pin_patterns(texts: Iterable[str]) -> tuple[str, ...]:
    """What ImageStore.pin matches with. Raises: InvalidArgument for what is neither a name nor a pattern."""
    return tuple(_pin_pattern(text) for text in texts)


def _pin_pattern(text: str) -> str:
    """Exact names are normalised so that they match as the kubelet's do; patterns and image IDs stay as they are."""
    return text if "*" in text or is_id(text) else str(Reference.parse(text)).replace("[", "[[]")


def _encode(image: Image) -> Record:
    return {
        "version": RECORD_VERSION,
        "image_id": image.image_id,
        "manifest": image.manifest.to_json(),
        "config": dict(image.config.raw),
        "layers": [
            {"descriptor": layer.descriptor.to_json(), "diff_id": layer.diff_id, "snapshot": layer.snapshot, "encrypted": layer.encrypted}
            for layer in image.layers
        ],
        "documents": list(image.documents),
        "size": image.size,
        "created_at": image.created_at,
        "repo_tags": list(image.repo_tags),
        "repo_digests": list(image.repo_digests),
        "artifact": image.artifact,
        "provenance": dict(image.provenance),
    }


def _decode(record: Record) -> Image:
    return Image(
        image_id=Digest(record["image_id"]),
        manifest=Descriptor.from_json(record["manifest"]),
        config=config_from_json(record["config"], record["image_id"]),
        layers=tuple(
            Layer(Descriptor.from_json(entry["descriptor"]), Digest(entry["diff_id"]), entry["snapshot"], entry["encrypted"])
            for entry in record["layers"]
        ),
        documents=tuple(Digest(d) for d in record["documents"]),
        size=record["size"],
        created_at=record["created_at"],
        repo_tags=tuple(record["repo_tags"]),
        repo_digests=tuple(record["repo_digests"]),
        artifact=record["artifact"],
        provenance=record["provenance"],
    )
