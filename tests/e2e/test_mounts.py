"""`imgsvc mount` and `unmount` with the real daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.daemon import Daemon

pytestmark = pytest.mark.root


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "shown"
    made.mkdir()
    return made


def test_an_image_is_shown_read_only_survives_the_daemon_and_goes(image_daemon: Daemon, busybox: str, directory: Path) -> None:
    assert image_daemon.cli("pull", "busybox").returncode == 0
    mounted = image_daemon.cli("mount", "busybox", str(directory))
    assert (mounted.returncode, mounted.stdout.strip()) == (0, busybox), mounted
    try:
        assert (directory / "bin/busybox").exists()
        with pytest.raises(OSError, match="Read-only"):
            (directory / "new").touch()

        image_daemon.kill()
        image_daemon.start()
        image_daemon.cli("rmi", "busybox")
        assert image_daemon.cli("gc").returncode == 0
        assert (directory / "bin/busybox").read_bytes()[:4] == b"\x7fELF"
    finally:
        gone = image_daemon.cli("unmount", str(directory))
    assert gone.returncode == 0, gone
    assert os.listdir(directory) == []
    assert image_daemon.cli("gc").returncode == 0
    assert not list((image_daemon.root / "snapshots").glob("*/snapshots/*"))


def test_what_cannot_be_mounted_is_one_line(image_daemon: Daemon, busybox: str, directory: Path) -> None:
    assert "e2e/nothing" in image_daemon.cli("mount", "e2e/nothing", str(directory)).stderr
    image_daemon.cli("pull", "busybox")
    (directory / "file").touch()
    refused = image_daemon.cli("mount", "busybox", str(directory))
    assert refused.returncode == 1
    assert "not empty" in refused.stderr
    assert image_daemon.cli("unmount", str(directory)).returncode == 1


def test_a_mount_that_somebody_else_ended_can_be_made_again(image_daemon: Daemon, busybox: str, directory: Path) -> None:
    image_daemon.cli("pull", "busybox")
    assert image_daemon.cli("mount", "busybox", str(directory)).returncode == 0
    assert image_daemon.cli("mount", "busybox", str(directory)).returncode == 1
    os.system(f"umount {directory}")  # a path of this test's own
    assert image_daemon.cli("mount", "busybox", str(directory)).returncode == 0
    assert image_daemon.cli("unmount", str(directory)).returncode == 0
