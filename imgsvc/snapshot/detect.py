"""Which driver this machine can use for a directory: tried out, not guessed from versions."""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imgsvc.base import kernel
from imgsvc.base.errors import ImgsvcError
from imgsvc.base.fsutil import private_dir
from imgsvc.base.oci import MIB
from imgsvc.base.removal import remove_tree, scratch_directory
from imgsvc.snapshot import native, overlay
from imgsvc.snapshot.erofs.build import OpenLayer, build_image
from imgsvc.snapshot.erofs.index import record
from imgsvc.snapshot.erofs.mounting import mount_image
from imgsvc.snapshot.interfaces import Mount
from imgsvc.snapshot.mount import in_own_namespace, mount_all, user_namespace
from imgsvc.snapshot.overlay import OverlayOptions
from imgsvc.snapshot.unpack.tarstream import TarStream


@dataclass(frozen=True, slots=True)
class Detected:
    """driver: its name. reason: why, in words for Status. options: for OverlaySnapshotter; None when not usable.

    idmapped: plain directories can be mounted with owners shifted. without_erofs: why EROFS cannot be used; "" when it can.
    """

    driver: str
    reason: str
    options: OverlayOptions | None
    idmapped: bool
    without_erofs: str = "overlayfs is not usable"


def detect(root: Path) -> Detected:
    """Try overlayfs below `root` (created), in a private mount namespace. Blocking: some milliseconds.

    Returns: overlayfs with what else works, or native and the reason. Never raises for lack of features.
    """
    private_dir(root)
    userxattr = _in_user_namespace()
    with scratch_directory(".detect-", root) as scratch:
        for name in ("lower/dir", "upper/dir", "work", "merged", "mapped", "erofs"):
            (scratch / name).mkdir(parents=True)
        plain = _why_not(_try_idmap, scratch)
        if problem := _why_not(lambda place: _try_overlay(place, userxattr=userxattr), scratch):
            return Detected(native.NAME, f"overlayfs is not usable on {root}: {problem}{_said(plain)}", None, not plain)
        mapped = plain or _why_not(_try_mapped_overlay, scratch)
        erofs = _why_not(_try_erofs, scratch)
    index = Path("/sys/module/overlay/parameters/index").exists()
    options = OverlayOptions(userxattr=userxattr, index_off=index, idmapped=not mapped)
    return Detected(overlay.NAME, f"overlayfs works on {root}{_said(mapped)}", options, not plain, erofs)


def _said(problem: str) -> str:
    return f", without idmapped mounts ({problem})" if problem else ", with idmapped mounts"


def _why_not(attempt: Callable[[Path], None], scratch: Path) -> str:
    """What an attempt failed with, in a mount namespace of its own; "" when it works."""
    try:
        in_own_namespace(lambda: attempt(scratch))
    except (OSError, ImgsvcError) as error:
        return str(error)
    return ""


def _in_user_namespace() -> bool:
    try:
        with open("/proc/self/uid_map", encoding="ascii") as stream:
            return stream.read().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def _try_overlay(scratch: Path, *, userxattr: bool) -> None:
    """Mount, hide a file by a whiteout, a directory's contents by an opaque mark, and write. Raises: OSError, ImgsvcError."""
    (scratch / "lower/hidden").touch()
    (scratch / "lower/dir/hidden").touch()
    os.mknod(scratch / "upper/hidden", stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(scratch / "upper/dir", f"{'user' if userxattr else 'trusted'}.overlay.opaque", b"y")
    _mount_overlay(scratch, "lower", ("userxattr",) if userxattr else ())
    (scratch / "merged/written").touch()
    if os.path.lexists(scratch / "merged/hidden") or os.listdir(scratch / "merged/dir"):
        raise OSError(errno.ENOTSUP, "its whiteouts do not work on this file system")


def _mount_overlay(scratch: Path, lower: str, options: tuple[str, ...]) -> None:
    places = (f"workdir={scratch}/work", f"upperdir={scratch}/upper", f"lowerdir={scratch}/{lower}")
    mount_all([Mount("overlay", "overlay", (*options, *places))], f"{scratch}/merged")


def _try_erofs(scratch: Path) -> None:
    """Mount a tiny image straight from its file, with a layer beside it as a device, blocks smaller than a page, and an xattr."""
    with (scratch / "layer.tar").open("w+b") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("file")
        entry.size, entry.pax_headers = 5, {"SCHILY.xattr.user.imgsvc": "set"}
        archive.addfile(entry, io.BytesIO(b"hello"))
    with (scratch / "layer.tar").open("rb") as tar, (scratch / "layer.index").open("w+b") as index, (scratch / "image").open("wb") as image:
        record(TarStream(lambda: tar.read(MIB)), index.write)
        index.flush()
        build_image([OpenLayer(tar.fileno(), index.fileno())], image.fileno())
    mount_image(scratch / "image", [scratch / "layer.tar"], scratch / "erofs")
    if (scratch / "erofs/file").read_bytes() != b"hello" or os.getxattr(scratch / "erofs/file", "user.imgsvc") != b"set":
        raise OSError(errno.ENOTSUP, "a file in an image is not what it was")


def _try_idmap(scratch: Path) -> None:
    with user_namespace("0:100000:65536", "0:100000:65536") as namespace:
        kernel.idmapped_mount(str(scratch / "lower"), str(scratch / "mapped"), namespace, read_only=True)
    if (scratch / "mapped").stat().st_uid != 100000 + os.geteuid():
        raise OSError(errno.ENOTSUP, "owners are not shifted")


def _try_mapped_overlay(scratch: Path) -> None:
    """Lower directories may be mapped since Linux 5.19, long after plain binds."""
    (scratch / "lower/owned").mkdir()
    _try_idmap(scratch)
    remove_tree(scratch / "work")
    (scratch / "work").mkdir()
    _mount_overlay(scratch, "mapped", ())
    if (scratch / "merged/owned").stat().st_uid != 100000 + os.geteuid():
        raise OSError(errno.ENOTSUP, "owners are not shifted through overlayfs")
