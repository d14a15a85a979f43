"""What the edge does with errors."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from imgsvc.daemon.rpc import MAX_MESSAGE, fit


@pytest.mark.parametrize("character", ["a", "ä", "…", "%", "🐳"])
def test_a_long_message_keeps_its_ends_and_fits(character: str) -> None:
    shown = fit("what failed " + character * 100_000 + " what to do")
    assert shown.startswith("what failed")
    assert shown.endswith("what to do")
    assert "log" in shown
    assert MAX_MESSAGE * 0.9 < len(quote(shown, safe="".join(map(chr, range(0x20, 0x7F))).replace("%", ""))) <= MAX_MESSAGE


@pytest.mark.parametrize("text", ["", "short", "x" * MAX_MESSAGE, "ä" * (MAX_MESSAGE // 6)])
def test_a_message_that_fits_is_left_alone(text: str) -> None:
    assert fit(text) == text
