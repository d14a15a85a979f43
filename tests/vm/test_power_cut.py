"""C-D2: the power goes during a pull and right after it was acknowledged. Many rounds: `python -m tests.vm.power_cuts`."""

from __future__ import annotations

import random

import pytest

from tests.vm.images import CUT
from tests.vm.machine import Machine
from tests.vm.power_cuts import cut_after_pull, cut_during_pull

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3600)]


def test_c_d2_a_power_cut_during_a_pull_leaves_the_image_absent_or_whole(vm: Machine) -> None:
    seen = cut_during_pull(vm, random.Random().uniform(2, 12))
    assert seen.sound, seen
    # and the pull can be taken up again:
    vm.check("imgsvc", "pull", CUT)


def test_c_d2_an_image_is_whole_when_the_power_goes_right_after_pullimage_answered(vm: Machine) -> None:
    vm.check("imgsvc", "rmi", CUT)
    vm.check("imgsvc", "gc")
    seen = cut_after_pull(vm)
    assert seen.present, seen
    assert seen.sound, seen
