"""Which driver this machine can use for a directory: tried out, not guessed from versions."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from imgsvc.errors import ImgsvcError
from imgsvc.fsutil import private_dir
from imgsvc.snapshot import kernel, native, overlay
from imgsvc.snapshot.interfaces import Mount
from imgsvc.snapshot.mount import in_own_namespace, mount_all, user_namespace
from imgsvc.snapshot.overlay import OverlayOptions


@dataclass(frozen=True, slots=True)
class Detected:
    """driver: its name. reason: why, in words for Status. options: for OverlaySnapshotter; None when not usable."""

    driver: str
    reason: str
    options: OverlayOptions | None


def detect(root: Path) -> Detected:
    """Try overlayfs below `root` (created), in a mount namespace nobody else sees. Blocking: some milliseconds.

    Returns: overlayfs with what else works, or native and the reason. Never raises for lack of features.
    """
    private_dir(root)
    userxattr = _in_user_namespace()
    with tempfile.TemporaryDirectory(prefix=".detect-", dir=root) as scratch:
        try:
            _try_overlay(Path(scratch), userxattr=userxattr)
        except (OSError, ImgsvcError) as error:
            return Detected(native.NAME, f"overlayfs is not usable on {root}: {error}", None)
        idmapped = _try_idmap(Path(scratch))
    index = Path("/sys/module/overlay/parameters/index").exists()
    options = OverlayOptions(userxattr=userxattr, index_off=index, idmapped=not idmapped)
    extra = "with idmapped mounts" if not idmapped else f"without idmapped mounts ({idmapped})"
    return Detected(overlay.NAME, f"overlayfs works on {root}, {extra}", options)


def _in_user_namespace() -> bool:
    try:
        with open("/proc/self/uid_map", encoding="ascii") as stream:
            return stream.read().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def _try_overlay(scratch: Path, *, userxattr: bool) -> None:
    """Mount, hide a file by a whiteout, a directory's contents by an opaque mark, and write. Raises: OSError, ImgsvcError."""
    for name in ("lower/dir", "upper/dir", "work", "merged"):
        (scratch / name).mkdir(parents=True)
    (scratch / "lower/hidden").touch()
    (scratch / "lower/dir/hidden").touch()
    os.mknod(scratch / "upper/hidden", stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(scratch / "upper/dir", f"{'user' if userxattr else 'trusted'}.overlay.opaque", b"y")
    extra = ("userxattr",) if userxattr else ()
    lower, upper, work, merged = (str(scratch / n) for n in ("lower", "upper", "work", "merged"))
    mount = Mount("overlay", "overlay", (*extra, f"workdir={work}", f"upperdir={upper}", f"lowerdir={lower}"))

    def attempt() -> None:
        mount_all([mount], merged)
        (scratch / "merged/written").touch()
        if os.path.lexists(f"{merged}/hidden") or os.listdir(f"{merged}/dir"):
            raise OSError(errno.ENOTSUP, "its whiteouts do not work on this file system")

    in_own_namespace(attempt)
    shutil.rmtree(scratch / "work")


def _try_idmap(scratch: Path) -> str:
    """Why idmapped mounts do not work here, "" if they do."""

    def attempt() -> None:
        with user_namespace("0:100000:65536", "0:100000:65536") as namespace:
            kernel.idmapped_mount(str(scratch / "lower"), str(scratch / "merged"), namespace)
        if (scratch / "merged").stat().st_uid != 100000 + os.geteuid():
            raise OSError(errno.ENOTSUP, "owners are not shifted")

    try:
        in_own_namespace(attempt)
    except (OSError, ImgsvcError) as error:
        return str(error)
    return ""
