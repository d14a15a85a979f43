"""The slow parts of this directory's tests, played on one machine beside all other tests: an emulator that waits for its turn costs nobody time.

A part is what one or several tests look at. `part("name")` marks those tests; conftest.py has the parts of the selected tests
played in their order, and hands each test what its part returned.
"""

from __future__ import annotations

import ast
import contextlib
import os
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from tests.vm.disk import new_disk, scratch
from tests.vm.images import prepare
from tests.vm.machine import Machine, machine
from tests.vm.power_cuts import PYTHON, Round, complaints, cut_after_pull, cut_during_pull, forget, wait_until_up

INSIDE: Final = Path(__file__).parent / "inside"
CHECKOUT: Final = "/opt/checkout"
PYTEST_TIMEOUT: Final = 3000.0  # [seconds]
_GIVING_WAY: Final = 19  # niceness


class Parts:
    """Plays parts one after the other on a thread, whose niceness all it starts inherits. One machine for all, made for the first."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "vm", initializer=lambda: os.nice(_GIVING_WAY))
        self._held = contextlib.ExitStack()
        self._machine: Machine | None = None
        self._broken: Exception | None = None  # why there is no machine
        self._played: dict[str, Future[Any]] = {}

    def play(self, name: str) -> Future[Any]:
        """What a part returns, or the exception it ends with; it is played once."""
        if name not in self._played:
            self._played[name] = self._thread.submit(self._play, PARTS[name])
        return self._played[name]

    def close(self) -> None:
        """Leave out what was not begun, switch the machine off and give everything back."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._machine is not None:
            self._machine.cut()  # ends the part that is being played
        self._thread.shutdown(wait=True)
        self._held.close()

    def _play(self, part: Callable[[Machine], Any]) -> Any:
        vm = self._made()
        try:
            if not vm.on:
                vm.boot()
                wait_until_up(vm)
            return part(vm)
        except BaseException:
            vm.cut()  # the next part boots it again
            raise

    def _made(self) -> Machine:
        if self._broken is not None:
            raise self._broken
        if self._machine is None:
            try:
                directory = self._held.enter_context(scratch())
                prepare(directory / "extra")
                self._machine = self._held.enter_context(machine(self._held.enter_context(new_disk(directory, directory / "extra"))))
            except Exception as error:
                self._broken = error
                raise
        return self._machine


def inside(vm: Machine) -> Mapping[str, list[ET.Element]]:
    """Run the tests of inside/ by the machine's own pytest. Returns: its test cases, by FILE::TEST without parameters."""
    command = [
        PYTHON,
        "-m",
        "pytest",
        "-q",
        "--confcutdir=tests/vm/inside",
        "-p",
        "no:cacheprovider",
        "--junitxml=/tmp/results.xml",
        *("-o", "timeout=600", "-o", "faulthandler_timeout=600"),
    ]
    done = vm.run("env", "-C", CHECKOUT, *command, "tests/vm/inside", timeout=PYTEST_TIMEOUT)
    assert done.status in (0, 1), (
        f"pytest in the machine ended with {done.status}:\n{done.out[-6000:]}\n{done.err[-2000:]}\n{vm.console[-2000:]}"
    )
    found: dict[str, list[ET.Element]] = {}
    for case in ET.fromstring(vm.check("cat", "/tmp/results.xml")).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name', '').partition('[')[0]}"
        found.setdefault(name, []).append(case)
    return found


def names_inside() -> list[str]:
    """FILE::TEST of all in inside/, without importing them."""
    files = sorted(INSIDE.glob("test_*.py"))
    found = [(file.stem, node) for file in files for node in ast.parse(file.read_text()).body]
    return [f"{stem}::{node.name}" for stem, node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def across_a_reboot(vm: Machine) -> list[str]:
    """Run pods, reboot, look at them and remove them. Returns: complaints in the daemon's journal since."""
    script = f"{CHECKOUT}/tests/vm/inside/across_reboot.py"
    vm.check("env", "-C", CHECKOUT, f"PYTHONPATH={CHECKOUT}", PYTHON, script, "before")
    vm.shut_down()
    vm.boot()
    wait_until_up(vm)
    vm.check("env", "-C", CHECKOUT, f"PYTHONPATH={CHECKOUT}", PYTHON, script, "after")
    return complaints(vm)


def cut_at_a_random_moment(vm: Machine) -> Round:
    """Cut the power during a pull, and look."""
    return cut_during_pull(vm, random.Random().uniform(1, 8))


def cut_when_acknowledged(vm: Machine) -> Round:
    """Take the pull up again if it was cut short, cut the power right after PullImage has answered, and look."""
    forget(vm)
    return cut_after_pull(vm)


PARTS: Final[Mapping[str, Callable[[Machine], Any]]] = {
    "inside": inside,
    "reboot": across_a_reboot,
    "cut during": cut_at_a_random_moment,
    "cut after": cut_when_acknowledged,
}
