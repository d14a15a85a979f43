"""`imgsvc mount`: an image's files, read-only, in a directory of the administrator's.

A mount is a view snapshot under a permanent lease, named by its directory, so that it outlives the daemon and nothing of
it is collected meanwhile. It goes through the same door as a container's root: policies and decryption keys are asked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

from imgsvc.base import procfs
from imgsvc.base.concurrency import KeyedLock, Threads, Undo
from imgsvc.base.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, from_os_error, printable
from imgsvc.images.leases import LeaseManager
from imgsvc.images.records import ImageStore
from imgsvc.images.rootfs import KEY_PREFIX, ContainerRootfs
from imgsvc.runtime.interfaces import RootMount

MountAll = Callable[[Sequence[RootMount], str], None]  # blocking; mounts on a directory of the host's
Unmount = Callable[[str], object]  # blocking; raises OSError, also while it is in use


class ImageMounts:
    """Mounts of images on this node, one per directory."""

    def __init__(
        self,
        images: ImageStore,
        roots: ContainerRootfs,
        leases: LeaseManager,
        threads: Threads,
        mount_all: MountAll,
        unmount: Unmount,
    ) -> None:
        self._images = images
        self._roots = roots
        self._leases = leases
        self._threads = threads
        self._mount_all = mount_all
        self._unmount = unmount
        self._locks = KeyedLock()

    async def mount(self, reference: str, directory: str) -> str:
        """Show an image's files in an empty directory; returns the image's ID.

        Raises: NotFound (the image), InvalidArgument (the directory), AlreadyExists (a file system is already mounted there), PermissionDenied.
        """
        target = await self._threads.run(_checked_target, directory)
        image = self._images.find(reference)
        if image is None:
            raise NotFound(f'image "{printable(reference, 200)}" is not on this node', hint="see `imgsvc images`, or pull it")
        name = _name(target)
        async with self._locks.hold(name), Undo() as undo:
            if any(lease.id == name for lease in self._leases.leases()):
                # A mount that a reboot or an umount(8) ended; what it left is replaced.
                await self._forget(name)
            kept = [("snapshot", f"{driver}/{KEY_PREFIX}{name}") for driver in self._roots.drivers]
            await self._leases.hold(kept, lease_id=name, permanent=True, purpose=f"mount on {target}")
            undo.push(f"forgetting the mount on {target}", self._forget, name)
            mounts = await self._roots.prepare_root(name, image.image_id, snapshotter="", readonly=True)
            await self._threads.run(self._mount_all, mounts, target)
        return image.image_id

    async def unmount(self, directory: str) -> None:
        """End a mount of ours. Raises: NotFound when there is none, FailedPrecondition while it is in use."""
        target = os.path.realpath(directory)
        name = _name(target)
        async with self._locks.hold(name):
            if not any(lease.id == name for lease in self._leases.leases()):
                raise NotFound("no image is mounted there", where=printable(target, 200))
            if await self._threads.run(_is_mounted, target):
                try:
                    await self._threads.run(self._unmount, target)
                except OSError as error:
                    raise FailedPrecondition(
                        f"it cannot be unmounted: {error.strerror}", where=target, hint="find the processes that use it"
                    ) from error
            await self._forget(name)

    async def _forget(self, name: str) -> None:
        await self._roots.remove_root(name)
        await self._leases.release(name)


def _name(target: str) -> str:
    return f"mount-{hashlib.sha256(os.fsencode(target)).hexdigest()[:32]}"


def _checked_target(directory: str) -> str:
    if not directory.startswith("/"):
        raise InvalidArgument(f'"{printable(directory, 200)}" is not an absolute path')
    target = os.path.realpath(directory)
    try:
        if _is_mounted(target):
            raise AlreadyExists("a file system is already mounted there", where=printable(target, 200), hint="`imgsvc unmount` it first")
        if os.listdir(target):
            raise InvalidArgument("the directory is not empty", where=printable(target, 200), hint="name an empty one")
    except OSError as error:
        raise from_os_error(error, "mounting an image", where=printable(target, 200)) from error
    return target


def _is_mounted(target: str) -> bool:
    """Whether something is mounted on exactly this directory; stat(2) does not tell bind mounts of one file system."""
    return any(mount.point == os.fsencode(target) for mount in procfs.mounts())
