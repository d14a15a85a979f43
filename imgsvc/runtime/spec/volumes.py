"""Where a container's mounts come from: host paths, image volumes, volumes an image declares. Blocking, with I/O.

Everything that is looked up inside an image or a container root goes through kernel.open_in_root, so that no symlink in
it can point the daemon at the host (CVE-2022-23648, CVE-2024-5154).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.base import kernel, procfs
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, NotFound, from_os_error, printable
from imgsvc.runtime.model import Mount, Propagation
from imgsvc.runtime.spec.copyup import copy_directory

_PROPAGATION: Final[Mapping[Propagation, str]] = {
    Propagation.PRIVATE: "rprivate",
    Propagation.HOST_TO_CONTAINER: "rslave",
    Propagation.BIDIRECTIONAL: "rshared",
}
_ALLOWED_OPTIONS: Final = frozenset({"noexec", "nodev", "nosuid", "exec", "dev", "suid", "noatime", "relatime", "nodiratime"})
_MAX_LINKS: Final = 40  # in one path, as the kernel


@dataclass(frozen=True, slots=True)
class BoundMount:
    """A mount of the OCI specification whose source is settled."""

    destination: str
    source: str
    options: tuple[str, ...]

    def to_spec(self) -> dict[str, Any]:
        """An entry of `mounts`."""
        return {"destination": self.destination, "type": "bind", "source": self.source, "options": list(self.options)}


def host_mount(mount: Mount, *, rro: bool) -> BoundMount:
    """A host path volume. A path that does not exist becomes a directory, as Docker and containerd do.

    Raises: InvalidArgument, FailedPrecondition (propagation the node's mount does not have; no recursive read-only).
    """
    if not mount.host_path.startswith("/"):
        raise InvalidArgument(f'host path "{printable(mount.host_path, 120)}" is not absolute', where=mount.container_path)
    try:
        if not os.path.lexists(mount.host_path):
            os.makedirs(mount.host_path, 0o755, exist_ok=True)
        source = os.path.realpath(mount.host_path, strict=True)
    except OSError as error:
        raise from_os_error(error, "looking up a host path volume", where=mount.host_path) from error
    _require_propagation(source, mount.propagation)
    return BoundMount(mount.container_path, source, mount_options(mount, rro=rro))


def mount_options(mount: Mount, *, rro: bool) -> tuple[str, ...]:
    """Options of a bind mount. rro: the runtime knows recursive read-only mounts."""
    _require_options(mount, _ALLOWED_OPTIONS)
    if mount.recursive_read_only:
        if not mount.readonly:
            raise InvalidArgument("recursive_read_only without readonly", where=mount.container_path)
        if mount.propagation != Propagation.PRIVATE:
            raise InvalidArgument("recursive_read_only needs private propagation", where=mount.container_path)
        if not rro:
            raise FailedPrecondition("this runtime has no recursive read-only mounts", where=mount.container_path)
    access = "rro" if mount.recursive_read_only else "ro" if mount.readonly else "rw"
    return ("rbind", _PROPAGATION[mount.propagation], access, *mount.mount_options)


def image_mount_options(mount: Mount) -> tuple[str, ...]:
    """Options of an image volume: what the pod adds is checked, and what keeps the image as it is comes last.

    Programs in it may be run: the conformance suite asks for that. Raises: InvalidArgument.
    """
    _require_options(mount, _ALLOWED_OPTIONS - {"dev", "suid"})
    return ("rbind", "rprivate", *mount.mount_options, "nosuid", "nodev", "ro")


def _require_options(mount: Mount, allowed: frozenset[str]) -> None:
    unknown = set(mount.mount_options) - allowed
    if unknown:
        raise InvalidArgument(
            f"mount option {printable(min(unknown), 40)} is not supported",
            where=mount.container_path,
            hint=f"use {', '.join(sorted(allowed))}",
        )


def _require_propagation(source: str, propagation: Propagation) -> None:
    if propagation == Propagation.PRIVATE:
        return
    optional = mount_fields(source)
    shared = any(field.startswith("shared:") for field in optional)
    if propagation == Propagation.BIDIRECTIONAL and not shared:
        raise FailedPrecondition("bidirectional propagation needs a shared mount on the node", where=source)
    if propagation == Propagation.HOST_TO_CONTAINER and not shared and not any(f.startswith("master:") for f in optional):
        raise FailedPrecondition("propagation from the host needs a shared or slave mount on the node", where=source)


def mount_fields(path: str) -> tuple[str, ...]:
    """The propagation fields ("shared:N", "master:N") of the mount a canonical path is on."""
    where = os.fsencode(path)
    best: procfs.Mount | None = None
    for mount in procfs.mounts():
        if procfs.is_within(where, mount.point) and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best.propagation if best else ()


def root_propagation(mounts: Iterable[Mount]) -> str:
    """Propagation of the root: what the most open volume needs. The specification has no recursive values for it."""
    return "shared" if any(m.propagation == Propagation.BIDIRECTIONAL for m in mounts) else "slave"


def sub_path_of_image(root: Path, sub_path: str, target: Path) -> None:
    """Bind a directory of a mounted image at `target`, resolved inside the image, whatever its symlinks say.

    Raises: InvalidArgument (leads out, or not a directory), NotFound.
    """
    if sub_path.startswith("/") or ".." in sub_path.split("/"):
        raise InvalidArgument(f'image_sub_path "{printable(sub_path, 120)}" must be relative and without ".."')
    try:
        fd = kernel.open_in_root(root, sub_path or ".", os.O_PATH)
    except OSError as error:
        raise NotFound(f"the image volume has no such sub-path: {error.strerror}", where=printable(sub_path, 120)) from error
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise InvalidArgument("the sub-path of an image volume is not a directory", where=printable(sub_path, 120))
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        kernel.bind_fd(fd, str(target))
    finally:
        os.close(fd)
    flags = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("", str(target), "", flags)


def declared_volume(rootfs: Path, path: str, storage: Path, owner: tuple[int, int] = (0, 0)) -> BoundMount:
    """A volume the image declares: a directory of the container's own, filled with the image's content of that path.

    Owners are as the root shows them to us: in a pod with a user namespace, those on the node.
    owner: (UID, GID) on the node of the container's root, for a directory that the image does not have.
    Raises: InvalidArgument (the image has something there that is not a directory), ImgsvcError.
    """
    storage.mkdir(mode=0o755, parents=True, exist_ok=True)
    os.chown(storage, *owner)
    try:
        fd = kernel.open_in_root(rootfs, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return BoundMount(path, str(storage), ("rbind", "rprivate", "rw"))
    except OSError as error:
        raise InvalidArgument(f"the image's volume cannot be opened: {error.strerror}", where=printable(path, 120)) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            raise InvalidArgument("the image declares a volume that is not a directory", where=printable(path, 120))
        copy_directory(fd, storage)
    except OSError as error:
        raise from_os_error(error, "copying an image's volume", where=path) from error
    finally:
        os.close(fd)
    return BoundMount(path, str(storage), ("rbind", "rprivate", "rw"))


def clean(path: str) -> str:
    """An absolute path of a container in its one spelling: one slash at its start, none at its end, no `.`, `..` or empty part.

    normpath() alone keeps two slashes at the start, as POSIX lets it.
    """
    return os.path.normpath("/" + path.lstrip("/"))


def is_at_or_below(path: str, directory: str) -> bool:
    """Whether a clean path is a clean directory or below it."""
    return directory in ("/", path) or path.startswith(directory + "/")


def depth(path: str) -> int:
    """Number of directories a path leads through; 0 for the root."""
    return clean(path).rstrip("/").count("/")


def in_mount_order(mounts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parents before children; order among equals is kept."""
    return sorted(mounts, key=lambda m: depth(m["destination"]))


class Places:
    """Where the mounts of a container land: their paths with the image's symbolic links resolved, as the runtime will resolve them.

    Two spellings of one place can so be compared. What is below a mount is not the image's, so its links are not followed.
    """

    def __init__(self, rootfs: Path, mounted: Iterable[str] = ()) -> None:
        """mounted: clean paths where something is mounted anyway."""
        self._rootfs = rootfs
        self._mounted = set(mounted)

    def mount(self, path: str) -> str:
        """The place of a mount, which covers from now on what is below it. Parents first. Raises: InvalidArgument."""
        place = self.find(path)
        self._mounted.add(place)
        return place

    def is_covered(self, place: str) -> bool:
        """Whether a file system is already mounted there, or above it."""
        return any(is_at_or_below(place, mounted) for mounted in self._mounted)

    def find(self, path: str) -> str:
        """The place a path leads to. Blocking. Raises: InvalidArgument (links in a circle)."""
        left = clean(path).strip("/").split("/")[::-1]
        place, links = "/", 0
        while left:
            if self.is_covered(place):
                return clean("/".join((place, *reversed(left))))
            part = left.pop()
            if part in ("", "."):
                continue
            if part == "..":
                place = os.path.dirname(place)
                continue
            target = self._link(place, part)
            if target is None:
                place = place.rstrip("/") + "/" + part
                continue
            links += 1
            if links > _MAX_LINKS:
                raise InvalidArgument("too many symbolic links in the image", where=printable(path, 120))
            left += target.split("/")[::-1]
            place = "/" if target.startswith("/") else place
        return place

    def _link(self, directory: str, name: str) -> str | None:
        try:
            fd = kernel.open_in_root(self._rootfs, directory, os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return None
        try:
            return os.readlink(name, dir_fd=fd)
        except OSError:
            return None
        finally:
            os.close(fd)
