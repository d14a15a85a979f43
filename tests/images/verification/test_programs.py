"""containerd's verifier programs (C-E4)."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.base.concurrency import Threads
from imgsvc.base.oci import OCI_MANIFEST, Descriptor, Digest
from imgsvc.images.verification.programs import Judgement, Programs

TARGET = Descriptor(OCI_MANIFEST, Digest.of(b"x"), 1)
NAME = "docker.io/library/app:1"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "bin"
    made.mkdir()
    return made


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(2, "test")
    yield made
    made.close()


def program(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def judge(directory: Path, threads: Threads, *, limit: int = 10, timeout: float = 10.0) -> Judgement:
    return asyncio.run(Programs(directory, limit, timeout, threads).judge(NAME, TARGET))


def test_c_e4_no_directory_and_an_empty_one_have_nobody_to_refuse(directory: Path, threads: Threads) -> None:
    assert judge(directory, threads) == Judgement(True, 0, "")
    assert judge(directory / "absent", threads) == Judgement(True, 0, "")


def test_c_e4_a_program_gets_name_digest_and_descriptor(directory: Path, threads: Threads, tmp_path: Path) -> None:
    program(directory, "a", f'echo "$@" > {tmp_path}/args; cat > {tmp_path}/stdin; echo fine')

    verdict = judge(directory, threads)

    assert verdict == Judgement(True, 1, "a => fine")
    assert (
        tmp_path / "args"
    ).read_text() == f"-name {NAME} -digest {TARGET.digest} -stdin-media-type application/vnd.oci.descriptor.v1+json\n"
    assert json.loads((tmp_path / "stdin").read_text()) == TARGET.to_json()


def test_c_e4_all_have_to_agree(directory: Path, threads: Threads) -> None:
    program(directory, "a", "echo fine")
    program(directory, "b", "echo never; exit 7")

    verdict = judge(directory, threads)

    assert not verdict.ok
    assert verdict.reason == "b refused it (exit code 7): never"


@pytest.mark.parametrize("limit, ok, asked, skipped", [(0, True, 0, 2), (1, True, 1, 1), (2, False, 2, 0), (-1, False, 2, 0)])
def test_c_e4_max_verifiers(directory: Path, threads: Threads, limit: int, ok: bool, asked: int, skipped: int) -> None:
    program(directory, "a", "exit 0")
    program(directory, "b", "exit 1")

    verdict = judge(directory, threads, limit=limit)

    assert (verdict.ok, verdict.asked, verdict.skipped) == (ok, asked, skipped)


def test_c_e4_a_program_that_cannot_be_started_refuses(directory: Path, threads: Threads) -> None:
    (directory / "a").write_text("not executable")
    assert "not an executable" in judge(directory, threads).reason

    program(directory, "a", "")
    (directory / "a").write_bytes(b"\x7fELF nonsense")
    assert not judge(directory, threads).ok


def test_c_e4_a_program_that_hangs_refuses_and_is_gone(directory: Path, threads: Threads, tmp_path: Path) -> None:
    program(directory, "a", f"echo $$ > {tmp_path}/pid; sleep 60 & sleep 60")
    began = time.monotonic()

    verdict = judge(directory, threads, timeout=3.0)  # long enough for a busy machine to get it started

    assert "no answer within 3 s" in verdict.reason
    assert time.monotonic() - began < 20
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_c_e4_endless_output_is_cut(directory: Path, threads: Threads) -> None:
    program(directory, "a", "head -c 300000000 /dev/zero | tr '\\0' x; head -c 1000000 /dev/zero >&2")

    verdict = judge(directory, threads)

    assert verdict.ok
    assert len(verdict.reason) < 1000


def test_c_e4_a_program_need_not_read_its_input(directory: Path, threads: Threads) -> None:
    program(directory, "a", "exec <&-; echo fine")

    assert judge(directory, threads).ok


@pytest.mark.root
def test_c_e4_a_fork_bomb_stays_in_its_control_group(directory: Path, threads: Threads, tmp_path: Path) -> None:
    if not any((Path("/sys/fs/cgroup") / name).exists() for name in ("pids/cgroup.procs", "cgroup.controllers")):
        pytest.skip("this node has no control groups for processes")
    mark = f"marker-{os.getpid()}"
    program(directory, "a", f"bomb() {{ setsid sh -c 'sleep 61 # {mark}' & bomb; }}; bomb")

    verdict = judge(directory, threads, timeout=1.0)

    assert not verdict.ok
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark in _read(p)]
    assert left == []
    assert not list(Path("/sys/fs/cgroup").glob(f"*/imgsvc-verify-{os.getpid()}-*"))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_the_fingerprint_changes_with_the_programs(directory: Path, threads: Threads) -> None:
    programs = Programs(directory, 10, 1.0, threads)
    program(directory, "a", "exit 0")
    before = programs.fingerprint()

    program(directory, "a", "exit 1  ")

    assert programs.fingerprint() != before
