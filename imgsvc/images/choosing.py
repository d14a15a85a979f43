"""Which image a name means on a platform: the walk from what a registry named down to one manifest and its config.

Indexes say what their entries run on, as a rule. An entry that does not is judged by its image's config, and one that turns
out to be no image (an SBOM, a signature) is passed over as long as there is an image. Reading is up to the caller.

Source: OCI image-spec 1.1 image-index.md; containerd core/images (Manifest) for entries without a platform.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from imgsvc.base.errors import InvalidArgument, NotFound, ResourceExhausted
from imgsvc.base.oci import MAX_INDEX_DEPTH, Descriptor, ImageConfig, Manifest, Platform, no_platform, parse_document, platform_rank

MAX_DOCUMENTS: Final = 128  # read for one choice; an index of thirty entries without a platform takes 61
Read = Callable[[Descriptor], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """documents: every index on the way down, the manifest, its config, with their bytes. config: None for an artifact."""

    documents: tuple[tuple[Descriptor, bytes], ...]
    manifest: Manifest
    config: ImageConfig | None


async def choose(target: Descriptor, wanted: Platform, read: Read, where: str) -> Chosen:
    """The image for `wanted`; an artifact where there is no image at all. read: verified bytes of a document; where: for errors.

    Raises: NotFound naming what is on offer; InvalidArgument (a bad document), ResourceExhausted (over a limit); what `read` raises.
    """
    search = _Search(wanted, read, where)
    best: tuple[int, Chosen] | None = None
    artifact: _Found | None = None
    async for found in search.found(target):
        chosen = await search.image(found)
        if chosen is None or chosen.config is None:
            artifact = artifact or found
            continue
        rank = 0 if found.told else platform_rank(wanted, chosen.config.platform)
        if rank is None:
            search.offered.add(chosen.config.platform)
        elif best is None or rank < best[0]:
            best = rank, chosen
        if rank == 0:
            break
    if best is not None:
        return _checked(best[1], wanted, where)
    if artifact is not None:
        return await search.artifact(artifact)
    raise no_platform(wanted, search.offered, where)


@dataclass(frozen=True, slots=True)
class _Found:
    """A manifest with the documents that led to it, itself last. told: it is for the wanted platform, by its entry."""

    documents: tuple[tuple[Descriptor, bytes], ...]
    manifest: Manifest
    told: bool


class _Search:
    """offered: platforms that were passed over."""

    def __init__(self, wanted: Platform, read: Read, where: str) -> None:
        self.offered: set[Platform] = set()
        self._wanted = wanted
        self._read_document = read
        self._where = where
        self._left = MAX_DOCUMENTS

    async def found(
        self, entry: Descriptor, above: tuple[tuple[Descriptor, bytes], ...] = (), *, told: bool = True
    ) -> AsyncIterator[_Found]:
        """Manifests that may be meant, best first. The target itself counts as told: without an index there is nothing to choose."""
        data = await self._read(entry)
        documents = (*above, (entry, data))
        document = parse_document(data, entry.media_type, self._where)
        if isinstance(document, Manifest):
            yield _Found(documents, document, told)
            return
        if len(above) == MAX_INDEX_DEPTH:
            raise ResourceExhausted(f"indexes nested deeper than {MAX_INDEX_DEPTH}", where=self._where)
        self.offered.update(inner.platform for inner in document.manifests if inner.platform)
        for inner in document.candidates(self._wanted):
            async for found in self.found(inner, documents, told=inner.platform is not None):
                yield found

    async def image(self, found: _Found) -> Chosen | None:
        """With its config; None when its type alone says that it is an artifact."""
        return await self.artifact(found) if found.manifest.may_be_image else None

    async def artifact(self, found: _Found) -> Chosen:
        """With whatever its config is."""
        raw = await self._read(found.manifest.config)
        config = found.manifest.read_config(raw, f"{self._where}: config")
        return Chosen((*found.documents, (found.manifest.config, raw)), found.manifest, config)

    async def _read(self, descriptor: Descriptor) -> bytes:
        if not self._left:
            raise ResourceExhausted(
                f"no image among the first {MAX_DOCUMENTS} documents of an index",
                where=self._where,
                hint="its entries should name their platforms",
            )
        self._left -= 1
        return await self._read_document(descriptor)


def _checked(chosen: Chosen, wanted: Platform, where: str) -> Chosen:
    """Raises: InvalidArgument when the config does not fit its manifest; NotFound when it does not fit what was asked for."""
    config, layers = chosen.config, chosen.manifest.layers
    assert config is not None
    is_alone = len(chosen.documents) == 2  # manifest and config, no index
    # An image without an index is taken as this node's, whatever it says, as everywhere. One that was asked for has to fit.
    if is_alone and wanted != Platform.host() and (wanted.os, wanted.architecture) != (config.platform.os, config.platform.architecture):
        hint = "leave out the platform to have that"
        raise NotFound(f"there is no image for {wanted}, only one for {config.platform}", where=where, hint=hint)
    if config.diff_ids and len(config.diff_ids) != len(layers):
        raise InvalidArgument(f"{len(layers)} layers but {len(config.diff_ids)} diff IDs in the config", where=where)
    if layers and not config.diff_ids:
        raise InvalidArgument("an image config without diff IDs", where=where)
    return chosen
