"""C-D2: the power goes during a pull and right after it was acknowledged. Many rounds: `python -m tests.vm.power_cuts`."""

from __future__ import annotations

import pytest

from tests.vm.power_cuts import Round

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.part("cut during")
def test_c_d2_a_power_cut_during_a_pull_leaves_the_image_absent_or_whole(played: Round) -> None:
    assert played.sound, played


@pytest.mark.part("cut after")
def test_c_d2_an_image_is_whole_when_the_power_goes_right_after_pullimage_answered(played: Round) -> None:
    assert played.present, played
    assert played.sound, played
