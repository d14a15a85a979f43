"""Mounting what a snapshotter describes, at a place of the caller's choice.

Idmapped lower directories (options uidmap= and gidmap=) are bound on temporary places first; the overlay keeps them after
those are gone.

Source: overlayfs.rst, mount_setattr(2).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence

from imgsvc.base import kernel
from imgsvc.base.errors import ImgsvcError, from_os_error
from imgsvc.base.removal import scratch_directory
from imgsvc.snapshot.interfaces import Mount


def mount_all(mounts: Sequence[Mount], target: str) -> None:
    """Mount a snapshot on the directory `target` in this thread's mount namespace. Raises: ImgsvcError by cause."""
    for mount in mounts:
        try:
            with _idmapped(mount) as plain:
                kernel.mount_with_options(plain.source, target, plain.type, plain.options)
        except OSError as error:
            raise from_os_error(error, f"cannot mount {mount.type} on {target}", where=mount.source) from error


def in_own_namespace(work: Callable[[], None]) -> None:
    """Run `work` in a private mount namespace: other processes do not see its mounts, which vanish afterwards. Raises: OSError, as `work`."""

    def run() -> None:
        kernel.unshare_mounts()
        work()

    kernel.in_fresh_thread(run)


@contextlib.contextmanager
def _idmapped(mount: Mount) -> Iterator[Mount]:
    """The mount with its lower directories replaced by idmapped binds of them, for as long as the block runs."""
    uidmap, gidmap = mount.value("uidmap"), mount.value("gidmap")  # `container:host:size`, several joined by ";"
    if not uidmap and not gidmap:
        yield mount
        return
    options = [o for o in mount.options if not o.startswith(("uidmap=", "gidmap=", "lowerdir="))]
    lowers = mount.value("lowerdir").split(":")
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(user_namespace(uidmap, gidmap))
        base = stack.enter_context(scratch_directory("idmapped-"))
        places = []
        for index, lower in enumerate(lowers):
            place = os.path.join(base, str(index))
            os.mkdir(place)
            kernel.idmapped_mount(lower, place, namespace, read_only=True)
            stack.callback(kernel.umount, place)
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
