"""Device nodes of the host for a container: `linux.devices` and the matching cgroup rules. Blocking."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from imgsvc.base.errors import InvalidArgument, NotFound, printable
from imgsvc.runtime.model import Device, User

# Directories below /dev that every container gets its own of, and links that its runtime makes.
_OWN: Final = frozenset(
    {"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console", "core", "stdin", "stdout", "stderr", "ptmx"}
)
_MAX_DEPTH: Final = 8


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device as the OCI specification wants it. kind: "c" or "b"."""

    path: str
    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    access: str = "rwm"

    def node(self, owner: User | None = None) -> dict[str, Any]:
        """An entry of linux.devices. owner: whose it shall be in the container."""
        uid, gid = (owner.uid, owner.gid) if owner else (self.uid, self.gid)
        return {
            "path": self.path,
            "type": self.kind,
            "major": self.major,
            "minor": self.minor,
            "fileMode": self.mode,
            "uid": uid,
            "gid": gid,
        }

    def rule(self) -> dict[str, Any]:
        """An entry of linux.resources.devices."""
        return {"allow": True, "type": self.kind, "major": self.major, "minor": self.minor, "access": self.access}


def requested(devices: Sequence[Device]) -> list[DeviceNode]:
    """The devices that the pod requests; a directory means all devices in it. Raises: InvalidArgument, NotFound."""
    found = []
    for device in devices:
        if not set(device.permissions) <= set("rwm"):
            raise InvalidArgument(f'device permissions "{printable(device.permissions, 20)}" are not of r, w and m', where=device.host_path)
        target = device.container_path or device.host_path
        path = os.path.realpath(device.host_path)
        if os.path.isdir(path):
            found += [_node(p, os.path.join(target, os.path.relpath(p, path)), device.permissions) for p in _walk(path, 0)]
        else:
            found.append(_node(path, target, device.permissions))
    return found


def all_of_host() -> list[DeviceNode]:
    """Every device below /dev, for privileged containers; what disappears meanwhile is skipped."""
    found = []
    for path in _walk("/dev", 0):
        try:
            found.append(_node(path, path, "rwm"))
        except NotFound:
            continue
    return found


def _walk(directory: str, depth: int) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(directory), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        if depth == 0 and directory == "/dev" and entry.name in _OWN:
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth < _MAX_DEPTH:
                yield from _walk(entry.path, depth + 1)
        elif not entry.is_symlink() and _is_device(entry.path):
            yield entry.path


def _is_device(path: str) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _node(host_path: str, path: str, access: str) -> DeviceNode:
    try:
        status = os.stat(host_path)
    except OSError as error:
        raise NotFound(f"the device cannot be found: {error.strerror}", where=host_path) from error
    if not _is_device(host_path):
        raise InvalidArgument("not a device", where=host_path)
    return DeviceNode(
        path=path,
        kind="c" if stat.S_ISCHR(status.st_mode) else "b",
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        access=access or "rwm",
    )
