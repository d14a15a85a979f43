"""System calls by ctypes, where more than one call makes the thing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgsvc.base import kernel, removal

pytestmark = pytest.mark.root


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory to mount on, in mounts of this test's own thread."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def test_an_overlay_of_more_layers_than_a_page_of_options_names(place: Path, tmp_path: Path) -> None:
    lowers = [tmp_path / ("long" * 20) / str(number) for number in range(150)]
    for number, lower in enumerate(lowers):
        lower.mkdir(parents=True)
        (lower / f"file{number}").touch()

    def seen() -> list[str]:
        kernel.unshare_mounts()
        kernel.mount_with_options("overlay", str(place), "overlay", ("ro", "lowerdir=" + ":".join(map(str, lowers))))
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").touch()
        return os.listdir(place)

    where = os.getcwd()
    assert set(kernel.in_fresh_thread(seen)) == {f"file{number}" for number in range(150)}
    assert os.getcwd() == where
    assert os.listdir(place) == []


def test_a_bind_takes_all_its_options(place: Path, tmp_path: Path) -> None:
    def options() -> list[str]:
        kernel.unshare_mounts()
        kernel.mount_with_options(str(tmp_path), str(place), "bind", ("rbind", "ro", "nosuid", "noexec"))
        (line,) = (line.split() for line in Path("/proc/thread-self/mountinfo").read_text().splitlines() if f" {place} " in line)
        return line[5].split(",")

    assert {"ro", "nosuid", "noexec"} <= set(kernel.in_fresh_thread(options))


def test_umount_says_whether_there_was_a_mount_and_leaves_one_in_use_where_told_so(place: Path) -> None:
    def work() -> None:
        kernel.unshare_mounts()
        assert not kernel.umount(place)
        assert not kernel.umount(place / "nowhere")
        for _ in range(2):
            kernel.mount("tmpfs", str(place), "tmpfs")
        fd = os.open(place, os.O_RDONLY)
        with pytest.raises(OSError, match="busy"):
            kernel.umount(place, in_use=False)
        removal.unmount_below(place)
        assert not kernel.umount(place, in_use=False)
        os.close(fd)

    kernel.in_fresh_thread(work)
