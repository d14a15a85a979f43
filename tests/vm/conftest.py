"""Machines for the tests of this directory; those in inside/ run in the machine and are not collected here."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import root
from tests.vm.disk import new_disk, scratch
from tests.vm.images import prepare
from tests.vm.machine import Machine, machine
from tests.vm.power_cuts import wait_until_up

collect_ignore = ["inside"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Minutes in one call are no hang here: every wait has a limit of its own, which shows the machine's console."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def disk() -> Iterator[Path]:
    """A disk with this checkout; machines put layers over it."""
    if why := root.missing():
        pytest.skip(why)
    with scratch() as directory:
        prepare(directory / "extra")
        with new_disk(directory, directory / "extra") as made:
            yield made


@pytest.fixture(scope="module")
def vm(disk: Path) -> Iterator[Machine]:
    """A machine whose daemon and registry run; one for the tests of a file, in their order."""
    with machine(disk) as made:
        made.boot()
        wait_until_up(made)
        yield made
