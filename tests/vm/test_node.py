"""The tests of inside/, run by the machine's own pytest, and what takes a reboot."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.vm.machine import Machine
from tests.vm.power_cuts import PYTHON, complaints, wait_until_up

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3600)]

INSIDE = Path(__file__).parent / "inside"
CHECKOUT = "/opt/checkout"
PYTEST_TIMEOUT = 1800.0  # [seconds]


def names() -> list[str]:
    """FILE::TEST of all in inside/, without importing them."""
    files = sorted(INSIDE.glob("test_*.py"))
    found = [(file.stem, node) for file in files for node in ast.parse(file.read_text()).body]
    return [f"{stem}::{node.name}" for stem, node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def in_machine(vm: Machine, *arguments: str) -> dict[str, list[ET.Element]]:
    """Run pytest in the machine. Returns: its test cases, by FILE::TEST without parameters."""
    command = [
        PYTHON,
        "-m",
        "pytest",
        "-q",
        "--confcutdir=tests/vm/inside",
        "-p",
        "no:cacheprovider",
        "--junitxml=/tmp/results.xml",
        *("-o", "timeout=300", "-o", "faulthandler_timeout=300"),
    ]
    done = vm.run("env", "-C", CHECKOUT, *command, *arguments, timeout=PYTEST_TIMEOUT)
    assert done.status in (0, 1), (
        f"pytest in the machine ended with {done.status}:\n{done.out[-6000:]}\n{done.err[-2000:]}\n{vm.console[-2000:]}"
    )
    found: dict[str, list[ET.Element]] = {}
    for case in ET.fromstring(vm.check("cat", "/tmp/results.xml")).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name', '').partition('[')[0]}"
        found.setdefault(name, []).append(case)
    return found


@pytest.fixture(scope="module")
def results(vm: Machine) -> dict[str, list[ET.Element]]:
    return in_machine(vm, "tests/vm/inside")


@pytest.mark.parametrize("name", names())
def test_inside(results: Mapping[str, list[ET.Element]], name: str) -> None:
    assert results.get(name), "the machine's pytest did not run it"
    for case in results[name]:
        for kind in ("failure", "error"):
            for bad in case.iter(kind):
                pytest.fail(f"in the machine, {case.get('name')}:\n{bad.text}", pytrace=False)
        for skipped in case.iter("skipped"):
            pytest.skip(f"in the machine: {skipped.get('message')}")


def test_c_d5_after_a_reboot_pods_are_not_ready_and_everything_can_be_removed(vm: Machine) -> None:
    script = f"{CHECKOUT}/tests/vm/inside/across_reboot.py"
    vm.check("env", "-C", CHECKOUT, f"PYTHONPATH={CHECKOUT}", PYTHON, script, "before")
    vm.shut_down()
    vm.boot()
    wait_until_up(vm)
    vm.check("env", "-C", CHECKOUT, f"PYTHONPATH={CHECKOUT}", PYTHON, script, "after")
    assert complaints(vm) == []
