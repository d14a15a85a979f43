"""Rounds of: pull, cut the power, boot, look. `python -m tests.vm.power_cuts ROUNDS [SEED]` runs many and prints a table.

Odd rounds cut right after PullImage answered, even ones at a random moment of the pull. C-D2.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.vm.disk import new_disk, scratch
from tests.vm.images import prepare
from tests.vm.machine import Machine, MachineLost, machine
from tests.vm.names import CUT

PYTHON: Final = "/opt/imgsvc/bin/python"
UP: Final = "until [ -S /run/imgsvc/imgsvc.sock ] && systemctl is-active --quiet imgsvc docker-registry; do sleep 0.2; done"
UP_TIMEOUT: Final = 600.0  # [seconds]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round showed. after [seconds]: from the start of the pull to the cut; boot [seconds]."""

    after: float
    acknowledged: bool
    present: bool
    differences: list[str]
    findings: list[Any]
    complaints: list[str]
    boot: float

    @property
    def sound(self) -> bool:
        """Acknowledged means there; there means whole; nothing is broken."""
        return (self.present or not self.acknowledged) and not self.differences and not self.findings and not self.complaints


def wait_until_up(vm: Machine) -> None:
    """Until the daemon and the registry run. Raises: MachineLost with what they say."""
    if vm.run("sh", "-c", UP, timeout=UP_TIMEOUT).status != 0:
        said = vm.run("journalctl", "-b", "-o", "short-monotonic", "-u", "imgsvc", "-u", "docker-registry").out
        raise MachineLost(f"imgsvc or docker-registry does not get ready; their journal:\n{said[-6000:]}")


def cut_during_pull(vm: Machine, after: float) -> Round:
    """Start a pull and cut the power `after` seconds later, whatever has happened by then."""
    began = time.monotonic()
    pulling = vm.begin("imgsvc", "pull", CUT)
    answered = vm.answers_within(pulling, after)
    return _cut_and_look(vm, began, acknowledged=answered)


def cut_after_pull(vm: Machine) -> Round:
    """Cut the power as soon as the pull was acknowledged."""
    began = time.monotonic()
    vm.check("imgsvc", "pull", CUT)
    return _cut_and_look(vm, began, acknowledged=True)


def _cut_and_look(vm: Machine, began: float, *, acknowledged: bool) -> Round:
    vm.cut()
    after = time.monotonic() - began
    boot = vm.boot()
    wait_until_up(vm)
    seen = json.loads(vm.check("env", "-C", "/opt/checkout", PYTHON, "-m", "tests.vm.look", CUT))
    return Round(after, acknowledged, seen["image"], seen["differences"], seen["fsck"], complaints(vm), boot)


def complaints(vm: Machine) -> list[str]:
    """Lines of the daemon's journal, since boot, that tell of errors."""
    lines = vm.check("journalctl", "-b", "-u", "imgsvc", "-o", "cat").splitlines()
    return [line for line in lines if " ERROR " in line or "Traceback" in line]


def forget(vm: Machine) -> None:
    """Remove the image and what only it used, for the next round; of a pull that was cut short nothing is removed."""
    if vm.run("imgsvc", "rmi", CUT).status == 0:
        vm.check("imgsvc", "gc")


def many(rounds: int, seed: int, directory: Path) -> bool:
    """Run rounds on one disk and print them. Returns: all sound."""
    chance = random.Random(seed)
    extra = directory / "extra"
    prepare(extra)
    sound = True
    with new_disk(directory, extra) as disk, machine(disk) as vm:
        vm.boot()
        wait_until_up(vm)
        length = 20.0
        print(f"seed {seed}\nround  cut after  acknowledged  present  differences  fsck  errors  boot", flush=True)
        for number in range(rounds):
            done = cut_during_pull(vm, chance.uniform(0.5, length)) if number % 2 else cut_after_pull(vm)
            length = length if number % 2 else done.after
            counts = f"{len(done.differences):11}  {len(done.findings):4}  {len(done.complaints):6}"
            print(
                f"{number + 1:5}  {done.after:7.2f} s  {done.acknowledged!s:12}  {done.present!s:7}  {counts}  {done.boot:.0f} s",
                flush=True,
            )
            if not done.sound:
                sound = False
                print(f"       {done}", flush=True)
            forget(vm)
    return sound


if __name__ == "__main__":
    with scratch() as place:
        sys.exit(not many(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1, place))
