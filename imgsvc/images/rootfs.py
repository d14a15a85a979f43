"""Root file systems of containers: a snapshot per container on top of an image's layers.

The image side as the runtime sees it (runtime.interfaces.Images). A caller that creates a container from an encrypted image must
be able to decrypt it now, not only when it was pulled: every encrypted layer's key is unwrapped again, and must be the
one the layer was decrypted with (CVE-2022-24778).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import FailedPrecondition, NotFound, PermissionDenied
from imgsvc.base.oci import Digest
from imgsvc.decrypt.interfaces import Decryptor
from imgsvc.images.layers import layer_names, layer_secrets, unwrap_layers
from imgsvc.images.records import Image, ImageStore
from imgsvc.runtime.interfaces import RootMount, RunnableImage, UserNamespace
from imgsvc.snapshot.interfaces import IDMapping, Key, Mount, Name, Snapshotter

KEY_PREFIX = "container-"


class ContainerRootfs:
    """Implements runtime.interfaces.Images over image records and snapshotters."""

    def __init__(
        self,
        images: ImageStore,
        snapshotters: Mapping[str, Snapshotter],
        decryptor: Decryptor,
        threads: Threads,
        *,
        default: str,
        check: Callable[[Image], Awaitable[None]] | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        """default: the snapshotter used where none is named. described: what to say of them in Status. check: raises for an image that may not be used (any more)."""
        self._check = check
        self._described = described or {}
        self._images = images
        self._snapshotters = snapshotters
        self._decryptor = decryptor
        self._threads = threads
        self._default = default

    async def runnable(self, reference: str) -> RunnableImage | None:
        """As runtime.interfaces.Images."""
        image = self._images.find(reference)
        return RunnableImage(image.image_id, image.config, image.repo_tags, image.repo_digests) if image else None

    async def prepare_root(
        self, container_id: str, image_id: Digest, *, snapshotter: str, readonly: bool = False, user: UserNamespace | None = None
    ) -> list[RootMount]:
        """As runtime.interfaces.Images."""
        image = self._images.get(image_id)
        if image is None:
            raise NotFound(f"image {image_id} is not on this node", hint="pull it first")
        if image.artifact:
            raise FailedPrecondition(f"{_label(image)} is an artifact without a root file system", hint="use an image")
        drivers = [self._snapshotters[name] for name in self._candidates(snapshotter)]
        key = Key(KEY_PREFIX + container_id)
        if self._check is not None:
            await self._check(image)
        await self._authorise(image)
        driver = await self._threads.run(_holder, image, drivers, key)
        mapping = _mapping(user) if user is not None and not readonly and not driver.idmapped else None
        mounts = await self._threads.run(_snapshot, image, driver, key, readonly=readonly, mapping=mapping)
        return [RootMount(mount.type, mount.source, mount.options, shifted=mapping is not None) for mount in mounts]

    def _candidates(self, snapshotter: str) -> list[str]:
        """The named driver alone; with none named the default one first: images may be in one that was the default before."""
        if not snapshotter:
            return [self._default, *(name for name in self._snapshotters if name != self._default)]
        if snapshotter not in self._snapshotters:
            raise NotFound(f'no snapshotter "{snapshotter}"', hint=f"this node has {', '.join(self._snapshotters)}")
        return [snapshotter]

    @property
    def drivers(self) -> Sequence[str]:
        """Names of the snapshotters that a root may be in."""
        return tuple(self._snapshotters)

    async def remove_root(self, container_id: str) -> None:
        """As runtime.interfaces.Images."""
        for snapshotter in self._snapshotters.values():
            await self._threads.run(snapshotter.remove, Key(KEY_PREFIX + container_id))

    async def root_usage(self, container_id: str) -> tuple[int, int]:
        """As runtime.interfaces.Images."""
        key = Key(KEY_PREFIX + container_id)
        for snapshotter in self._snapshotters.values():
            if await self._threads.run(snapshotter.stat, key) is not None:
                usage = await self._threads.run(snapshotter.usage, key)
                return usage.size, usage.inodes
        return 0, 0

    def describe(self) -> Mapping[str, Any]:
        """As runtime.interfaces.Images."""
        return self._described

    async def _authorise(self, image: Image) -> None:
        descriptors = [layer.descriptor for layer in image.layers]
        secrets = layer_secrets(descriptors, await unwrap_layers(self._decryptor, descriptors))
        if layer_names([layer.diff_id for layer in image.layers], secrets) != [layer.snapshot for layer in image.layers]:
            raise PermissionDenied(
                f"{_label(image)} was decrypted with other keys than this node has now", hint="pull it again with the right keys"
            )


def _holder(image: Image, drivers: Sequence[Snapshotter], key: Key) -> Snapshotter:
    """The driver that has the snapshot already, else one that has the image, else the first. Blocking."""
    having = [driver for driver in drivers if driver.stat(key) is not None] or [d for d in drivers if is_unpacked(image, d)]
    return having[0] if having else drivers[0]


def _snapshot(image: Image, driver: Snapshotter, key: Key, *, readonly: bool, mapping: IDMapping | None) -> Sequence[Mount]:
    """The mounts of a snapshot that is made unless it is there. Blocking. Raises: FailedPrecondition (layers are missing)."""
    if not is_unpacked(image, driver):
        raise FailedPrecondition(
            f"{_label(image)} is not completely unpacked for snapshotter {driver.name}",
            hint="pull it again for the runtime handler that will run it",
        )
    if driver.stat(key) is not None:
        return driver.mounts(key)
    parent = Name(image.top_snapshot) if image.top_snapshot else None
    return driver.view(key, parent) if readonly else driver.prepare(key, parent, mapping=mapping)


def is_unpacked(image: Image, snapshotter: Snapshotter) -> bool:
    """Whether all layers are there, with their files. Blocking: some microseconds per layer."""
    return all(snapshotter.stat(layer.snapshot) is not None for layer in image.layers)


def _mapping(user: UserNamespace) -> IDMapping:
    uids, gids = (tuple((row.container_id, row.host_id, row.length) for row in rows) for rows in (user.uids, user.gids))
    return IDMapping(uids, gids)


def _label(image: Image) -> str:
    return image.names[0] if image.names else image.image_id
