from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from imgsvc.base import fsutil
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, ResourceExhausted


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "record"
    for data in (b"old", b"new"):
        fsutil.write_atomic(target, data, mode=0o640)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["record"]


def test_write_atomic_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "record"
    target.mkdir()  # a directory cannot be replaced by a file
    with pytest.raises(IsADirectoryError):
        fsutil.write_atomic(target, b"new")
    assert os.listdir(tmp_path) == ["record"]


def test_private_dir_is_made_and_tightened(tmp_path: Path) -> None:
    made = fsutil.private_dir(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o755)
    assert stat.S_IMODE(fsutil.private_dir(made).stat().st_mode) == 0o700


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "/", "a\0b", "x" * 256, "é" * 128])
def test_what_cannot_be_a_file_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        fsutil.safe_component(text, "name")


@pytest.mark.parametrize("text", ["a", "...", "x" * 255, "é" * 127, "a b"])
def test_what_can_be_a_file_name_is_returned(text: str) -> None:
    assert fsutil.safe_component(text, "name") == text


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from imgsvc.base.fsutil import lock_exclusive; lock_exclusive(Path(sys.argv[1]), 'it'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FailedPrecondition, match=f"process {holder.pid}"):
            fsutil.lock_exclusive(lock, "the root")
        holder.kill()
        holder.wait()
        os.close(fsutil.lock_exclusive(lock, "the root"))


def test_a_lock_does_not_follow_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        fsutil.lock_exclusive(tmp_path / "lock", "the root")
    assert not (tmp_path / "victim").exists()


def test_space_is_required_beside_the_reserve(tmp_path: Path) -> None:
    stats = os.statvfs(tmp_path)
    total = stats.f_blocks * stats.f_frsize
    fsutil.require_space(tmp_path, 1, reserve=0, doing="a pull")
    with pytest.raises(ResourceExhausted, match="a pull needs"):
        fsutil.require_space(tmp_path, 1, reserve=total + 1, doing="a pull")
