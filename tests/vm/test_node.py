"""What the tests of inside/ found in the machine, and what takes a reboot."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree as ET

import pytest

from tests.vm.parts import names_inside

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.part("inside")
@pytest.mark.parametrize("name", names_inside())
def test_inside(played: Mapping[str, list[ET.Element]], name: str) -> None:
    assert played.get(name), "the machine's pytest did not run it"
    for case in played[name]:
        for kind in ("failure", "error"):
            for bad in case.iter(kind):
                pytest.fail(f"in the machine, {case.get('name')}:\n{bad.text}", pytrace=False)
        for skipped in case.iter("skipped"):
            pytest.skip(f"in the machine: {skipped.get('message')}")


@pytest.mark.part("reboot")
def test_c_d5_after_a_reboot_pods_are_not_ready_and_everything_can_be_removed(played: list[str]) -> None:
    assert played == []
