"""The disk of one run: the root file system, the wheel of this checkout, its unit file, its tests, the registry's data."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.vm.root import HERE, PROJECT, copy_root, run, run_in

SIZE: Final = "3G"  # sparse
UNIT: Final = PROJECT / "docs/deploy/imgsvc.service"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for a `with` block, its path short: sockets lie in it. What killed processes left of theirs goes as well."""
    for left in Path("/tmp").glob("imgsvc-vm-*.*"):
        owner = left.name.removeprefix("imgsvc-vm-").partition(".")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"imgsvc-vm-{os.getpid()}.", dir="/tmp") as made:
        yield Path(made)


@contextlib.contextmanager
def new_disk(directory: Path, extra: Path, *, unit: str = "") -> Iterator[Path]:
    """A bootable disk image with this checkout on it, for a `with` block.

    extra: a tree that is copied over its root. unit: other text for imgsvc.service. Beside the disk lie the kernel ("vmlinuz") and the initial RAM file system ("initrd").
    """
    root = directory / "root"
    copy_root(root)
    _add_checkout(root, unit or UNIT.read_text())
    shutil.copytree(extra, root, dirs_exist_ok=True)
    run_in(root, "chown", "-R", "docker-registry:", "/var/lib/docker-registry")
    shutil.copy(next((root / "boot").glob("vmlinuz*")), directory / "vmlinuz")
    with gzip.open(next((root / "boot").glob("initrd*"))) as packed:  # here rather than at every boot
        (directory / "initrd").write_bytes(packed.read())
    disk = directory / "disk.img"
    run(["mkfs.ext4", "-q", "-d", str(root), str(disk), SIZE])
    shutil.rmtree(root)
    try:
        yield disk
    finally:
        disk.unlink()


def _add_checkout(root: Path, unit: str) -> None:
    """The wheel, installed as an administrator does it; the unit, enabled; configuration; the tests."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*pip, "--wheel-dir", str(root / "tmp/wheel"), str(PROJECT)])
    wheel = next((root / "tmp/wheel").glob("*.whl")).name
    run_in(root, "/opt/imgsvc/bin/pip", "install", "--quiet", "--no-index", "--no-deps", f"/tmp/wheel/{wheel}")
    (root / "etc/systemd/system/imgsvc.service").write_text(unit)
    run_in(root, "systemctl", "enable", "imgsvc")
    shutil.copytree(HERE / "etc", root / "etc", dirs_exist_ok=True)
    tests = root / "opt/checkout"
    shutil.copytree(PROJECT / "tests", tests / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", tests)
    run_in(
        root, "python3", "-m", "compileall", "-q", "/opt/checkout/tests/vm", "/opt/checkout/tests/support", "/opt/checkout/tests/snapshot"
    )
