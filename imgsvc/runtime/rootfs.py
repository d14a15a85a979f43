"""Mounting and unmounting what a bundle is made of: root file systems, ID-mapped volumes. Blocking."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imgsvc.base import kernel
from imgsvc.base.errors import FailedPrecondition
from imgsvc.base.removal import discard, unmount_below
from imgsvc.runtime.holder.namespaces import userns_fd
from imgsvc.runtime.interfaces import RootMount
from imgsvc.runtime.model import UserNamespace
from imgsvc.runtime.spec import selinux
from imgsvc.runtime.spec.volumes import BoundMount


@contextmanager
def mapping_fd(user: UserNamespace) -> Iterator[int]:
    """A descriptor of a user namespace with this mapping, for a `with` block."""
    fd = userns_fd(user)
    try:
        yield fd
    finally:
        os.close(fd)


def mount_all(mounts: Sequence[RootMount], target: Path, label: str = "") -> None:
    """Mount a snapshot, in order, onto one directory. label: of SELinux, for all files in it."""
    for m in mounts:
        kernel.mount_with_options(m.source, str(target), m.type, (*m.options, *labelled(m, label)))


def read_only(mount: RootMount, empty: Path) -> RootMount:
    """The same files behind a file system that is read-only itself, as a mount of a single layer is not.

    A bind mount's read-only flag can be taken off by a container with CAP_SYS_ADMIN, and what it wrote would be in the
    image from then on. An overlay without an upper directory refuses. empty: a directory that stays empty, for the
    second layer that such an overlay must have.
    """
    if mount.type != "bind" and "bind" not in mount.options and "rbind" not in mount.options:
        return mount
    return RootMount("overlay", "overlay", ("ro", f"lowerdir={mount.source}:{empty}"))


def labelled(mount: RootMount, label: str) -> tuple[str, ...]:
    """What a new mount needs for its label; the files behind a bind mount, which are this container's own, get it themselves."""
    if "bind" not in mount.options and "rbind" not in mount.options:
        return selinux.mount_option(label)
    if "ro" not in mount.options:
        selinux.relabel(mount.source, label)
    return ()


def mount_idmapped(mounts: Sequence[RootMount], target: Path, scratch: Path, fd: int, user: UserNamespace, label: str = "") -> None:
    """Mount a snapshot so that the pod's user namespace sees the image's owners.

    An overlay cannot be mapped itself: its lower layers are, and what is written goes to an upper directory that belongs
    to the pod's root. A plain bind mount is mapped directly. Source: facts of the kernel, mount_setattr(2).
    """
    for m in mounts:
        context = labelled(m, label)
        if m.shifted:
            kernel.mount_with_options(m.source, str(target), m.type, (*m.options, *context))
            continue
        if m.type != "overlay":
            kernel.idmapped_mount(m.source, str(target), fd)
            continue
        options = list(context)
        for option in m.options:
            key, _, value = option.partition("=")
            if key == "lowerdir":
                lowers = [_mapped_lower(layer, scratch / str(n), fd) for n, layer in enumerate(value.split(":"))]
                options.append("lowerdir=" + ":".join(lowers))
                continue
            if key == "upperdir":
                os.chown(value, user.uids[0].host_id, user.gids[0].host_id)
            options.append(option)
        kernel.mount_with_options(m.source, str(target), m.type, options)


def _mapped_lower(layer: str, place: Path, fd: int) -> str:
    place.mkdir(mode=0o711, parents=True)
    kernel.idmapped_mount(layer, str(place), fd)
    return str(place)


def idmapped_volume(bound: BoundMount, place: Path, user: UserNamespace) -> BoundMount:
    """The same volume seen through the pod's ID mapping. Runtimes differ in what they can; a mount of ours works with all."""
    if os.path.isdir(bound.source):
        place.mkdir(mode=0o711)
    else:
        place.touch()
    with mapping_fd(user) as fd:
        try:
            kernel.idmapped_mount(bound.source, str(place), fd, recursive="rbind" in bound.options)
        except OSError as error:
            raise FailedPrecondition(f"the volume's file system cannot be ID-mapped: {error.strerror}", where=bound.source) from error
    return BoundMount(bound.destination, str(place), bound.options)


def remove_bundle(bundle: Path) -> None:
    """Unmount and remove everything in a bundle, or another directory of ours with mounts in it. Idempotent. Blocking."""
    unmount_below(bundle)
    discard(bundle)
