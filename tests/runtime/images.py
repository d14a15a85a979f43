"""An image side without registries: one busybox image, overlay roots as the real snapshotter makes them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imgsvc.base.errors import PermissionDenied
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import Digest, ImageConfig, Platform
from imgsvc.runtime.interfaces import Images, RootMount, RunnableImage
from imgsvc.runtime.model import UserNamespace

BUSYBOX = "busybox"
IMAGE_ID = Digest.of(b"busybox")


def make_rootfs(root: Path) -> Path:
    """A root file system around Debian's busybox-static."""
    for directory in ("bin", "etc", "tmp", "proc", "sys", "dev", "home"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True).stdout.split():
        if applet != "busybox":
            os.symlink("busybox", root / "bin" / applet)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nann:x:1000:\nwheel:x:10:ann\ngames:x:20:ann\n")
    return root


class BusyboxImages:
    """Satisfies Images. `config` and files below `rootfs` may be changed by a test; `forbidden` refuses to hand out roots."""

    def __init__(self, directory: Path, database: MetaDB) -> None:
        self.directory = directory
        self._database = database
        self.rootfs = directory / "rootfs"
        if not self.rootfs.exists():
            make_rootfs(self.rootfs)
        self.config = ImageConfig(Platform.host(), (), env=("FROM_IMAGE=yes",), cmd=("sh",))
        self.forbidden = False

    async def runnable(self, reference: str) -> RunnableImage | None:
        if reference not in (BUSYBOX, str(IMAGE_ID)):
            return None
        return RunnableImage(IMAGE_ID, self.config, ("docker.io/library/busybox:latest",), (f"docker.io/library/busybox@{IMAGE_ID}",))

    def describe(self) -> Mapping[str, Any]:
        return {}

    async def prepare_root(
        self, container_id: str, image_id: Digest, *, snapshotter: str, readonly: bool = False, user: UserNamespace | None = None
    ) -> Sequence[RootMount]:
        if self.forbidden:
            raise PermissionDenied("no key")
        await self._database.awrite(lambda _: None)  # as a snapshotter's record: behind the container's, in the same queue
        upper, work = self.directory / "roots" / container_id / "upper", self.directory / "roots" / container_id / "work"
        for path in (upper, work):
            path.mkdir(parents=True, exist_ok=True)
        options = [f"lowerdir={self.rootfs}"]
        if not readonly:
            return [RootMount("overlay", "overlay", (*options, f"upperdir={upper}", f"workdir={work}"))]
        return [RootMount("bind", str(self.rootfs), ("rbind", "ro"))]

    async def remove_root(self, container_id: str) -> None:
        shutil.rmtree(self.directory / "roots" / container_id, ignore_errors=True)

    async def root_usage(self, container_id: str) -> tuple[int, int]:
        upper = self.directory / "roots" / container_id / "upper"
        files = list(upper.rglob("*"))
        return sum(p.lstat().st_size for p in files), len(files)

    def roots(self) -> list[str]:
        """Containers that have a root."""
        directory = self.directory / "roots"
        return sorted(p.name for p in directory.iterdir()) if directory.exists() else []

    def with_config(self, **changes: object) -> None:
        """Change the image's configuration."""
        self.config = dataclasses.replace(self.config, **changes)  # type: ignore[arg-type]


def as_images(images: BusyboxImages) -> Images:
    """Typed as its Protocol, for mypy."""
    return images
