"""Kills for memory are found although systemd removes a container's cgroup before anybody looks. Real kills: tests/vm."""

from __future__ import annotations

import shutil
from pathlib import Path

from imgsvc.runtime.numbers.oom import OomLedger


def group(path: Path, kills: int, own: int | None = None) -> Path:
    """A cgroup as the kernel shows it. own: kills in it itself, not below."""
    path.mkdir(parents=True, exist_ok=True)
    for name, count in (("memory.events", kills), ("memory.events.local", kills if own is None else own)):
        (path / name).write_text(f"low 0\nhigh 0\nmax 7\noom {count}\noom_kill {count}\noom_group_kill 0\n")
    return path


def test_a_kill_in_a_cgroup_that_is_gone_belongs_to_the_container_that_ended(tmp_path: Path) -> None:
    pod = group(tmp_path / "pod", 0, 0)
    first, second = group(pod / "first", 0), group(pod / "second", 0)
    ledger = OomLedger()
    ledger.begin(first)
    ledger.begin(second)
    shutil.rmtree(first)
    group(pod, 1, 0)
    assert ledger.ended(first)
    shutil.rmtree(second)
    assert not ledger.ended(second)


def test_a_kill_in_a_living_neighbour_is_not_the_fault_of_the_one_that_ended(tmp_path: Path) -> None:
    pod = group(tmp_path / "pod", 0, 0)
    first, second = group(pod / "first", 0), group(pod / "second", 0)
    ledger = OomLedger()
    ledger.begin(first)
    group(second, 1)
    group(pod, 1, 0)
    shutil.rmtree(first)
    assert not ledger.ended(first)


def test_a_kill_seen_before_its_cgroup_went_counts_once(tmp_path: Path) -> None:
    pod = group(tmp_path / "pod", 0, 0)
    first, second = group(pod / "first", 0), group(pod / "second", 0)
    ledger = OomLedger()
    ledger.begin(first)
    group(first, 2)
    group(pod, 2, 0)
    assert ledger.ended(first)
    shutil.rmtree(first)
    shutil.rmtree(second)
    assert not ledger.ended(second)


def test_what_was_killed_before_is_nobodys_who_runs_now(tmp_path: Path) -> None:
    pod = group(tmp_path / "pod", 3, 1)
    container = group(pod / "container", 0)
    ledger = OomLedger()
    ledger.begin(container)
    shutil.rmtree(container)
    assert not ledger.ended(container)


def test_without_a_memory_controller_nothing_is_claimed(tmp_path: Path) -> None:
    ledger = OomLedger()
    ledger.begin(tmp_path / "pod" / "container")
    assert not ledger.ended(tmp_path / "pod" / "container")
