"""Mounting what a snapshotter describes, at a place of the caller's choice.

Overlay mounts of many layers do not fit into the one page mount(2) takes: then the lower directories are given relative
to the directory they share, from a thread with a working directory of its own. Idmapped lower directories (options
uidmap= and gidmap=) are bound on temporary places first; the overlay keeps them after those are gone.

Source: mount(2), overlayfs.rst, mount_setattr(2); facts of runtime.md section 6.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from imgsvc.errors import ImgsvcError, from_os_error
from imgsvc.snapshot import kernel
from imgsvc.snapshot.interfaces import Mount

_PAGE: Final = 4095  # [bytes] of mount(2) data
_FLAGS: Final = {
    "ro": kernel.MS_RDONLY,
    "nosuid": kernel.MS_NOSUID,
    "nodev": kernel.MS_NODEV,
    "noexec": kernel.MS_NOEXEC,
    "bind": kernel.MS_BIND,
    "rbind": kernel.MS_BIND | kernel.MS_REC,
}


def mount_all(mounts: Sequence[Mount], target: str) -> None:
    """Mount a snapshot on the directory `target` in this thread's mount namespace. Raises: ImgsvcError by cause."""
    for mount in mounts:
        try:
            with _idmapped(mount) as plain:
                _mount_one(plain, target)
        except OSError as error:
            raise from_os_error(error, f"cannot mount {mount.type} on {target}", where=mount.source) from error


def _mount_one(mount: Mount, target: str) -> None:
    flags, data = _split(mount.options)
    if mount.type == "bind":
        kernel.mount(mount.source, target, "", flags | kernel.MS_BIND, "")
        if extra := flags & ~(kernel.MS_BIND | kernel.MS_REC):  # a bind takes them on the second call only
            kernel.mount("", target, "", kernel.MS_REMOUNT | kernel.MS_BIND | extra, "")
        return
    joined = ",".join(data)
    if len(joined.encode()) <= _PAGE:
        kernel.mount(mount.source, target, mount.type, flags, joined)
    else:
        _mount_relative(mount, os.path.abspath(target), flags, data)


def _split(options: Sequence[str]) -> tuple[int, list[str]]:
    flags = 0
    data = []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option != "rw":
            data.append(option)
    return flags, data


def _mount_relative(mount: Mount, target: str, flags: int, data: list[str]) -> None:
    lowers = next(option for option in data if option.startswith("lowerdir=")).removeprefix("lowerdir=").split(":")
    base = os.path.commonpath(lowers)
    short = "lowerdir=" + ":".join(os.path.relpath(lower, base) for lower in lowers)
    options = ",".join(short if option.startswith("lowerdir=") else option for option in data)

    def run() -> None:
        kernel.unshare(kernel.CLONE_FS)  # this thread only: the process keeps its working directory
        os.chdir(base)
        kernel.mount(mount.source, target, mount.type, flags, options)

    in_own_thread(run)


def in_own_thread(work: Callable[[], None]) -> None:
    """Run `work` in a thread that ends with it, so that what it does to itself concerns nobody else. Raises: as `work`."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # carried over to the caller
            failed.append(error)

    thread = threading.Thread(target=run, name="mount")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def in_own_namespace(work: Callable[[], None]) -> None:
    """Run `work` where its mounts are seen by nobody else and vanish afterwards. Raises: OSError, as `work`."""

    def run() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE, "")  # slave: unmounts of the host still get through
        work()

    in_own_thread(run)


def mapping_option(mount: Mount, kind: str) -> str:
    """The value of uidmap= or gidmap=, "" without one: `container:host:size`, several joined by ";"."""
    return next((o.partition("=")[2] for o in mount.options if o.startswith(kind + "=")), "")


@contextlib.contextmanager
def _idmapped(mount: Mount) -> Iterator[Mount]:
    """The mount with its lower directories replaced by idmapped binds of them, for as long as the block runs."""
    uidmap, gidmap = mapping_option(mount, "uidmap"), mapping_option(mount, "gidmap")
    if not uidmap and not gidmap:
        yield mount
        return
    options = [o for o in mount.options if not o.startswith(("uidmap=", "gidmap=", "lowerdir="))]
    lowers = next(o for o in mount.options if o.startswith("lowerdir=")).removeprefix("lowerdir=").split(":")
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(user_namespace(uidmap, gidmap))
        base = stack.enter_context(tempfile.TemporaryDirectory(prefix="idmapped-"))
        places = []
        for index, lower in enumerate(lowers):
            place = os.path.join(base, str(index))
            os.mkdir(place)
            kernel.idmapped_mount(lower, place, namespace)
            stack.callback(kernel.umount, place, kernel.MNT_DETACH)
            places.append(place)
        yield Mount(mount.type, mount.source, (*options, "lowerdir=" + ":".join(places)))


@contextlib.contextmanager
def user_namespace(uidmap: str, gidmap: str) -> Iterator[int]:
    """A descriptor of a new user namespace with these mappings; a short-lived child holds it while it is set up."""
    child = subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
        if child.stdout.read(1) != b"\n":  # it echoes once it is inside
            raise ImgsvcError("cannot create a user namespace", hint="see sysctl user.max_user_namespaces")
        for kind, text in (("uid_map", uidmap), ("gid_map", gidmap)):
            with open(f"/proc/{child.pid}/{kind}", "w", encoding="ascii") as stream:
                stream.write("\n".join(part.replace(":", " ") for part in text.split(";")))
        fd = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        child.kill()
        child.communicate()
    try:
        yield fd
    finally:
        os.close(fd)
