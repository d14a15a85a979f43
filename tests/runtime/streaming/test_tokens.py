from __future__ import annotations

import pytest

from imgsvc.base.errors import ResourceExhausted
from imgsvc.runtime.streaming.tokens import MAX_OUTSTANDING, TTL_S, Tokens


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_c_c10_a_token_is_used_once() -> None:
    tokens: Tokens[str] = Tokens()
    token = tokens.issue("value")
    assert tokens.peek(token) == "value"
    assert tokens.use(token) == "value"
    assert tokens.use(token) is None


def test_c_c10_a_token_has_128_bits_and_is_new_every_time() -> None:
    tokens: Tokens[int] = Tokens()
    issued = {tokens.issue(n) for n in range(MAX_OUTSTANDING)}
    assert len(issued) == MAX_OUTSTANDING
    assert {len(token) for token in issued} == {22}  # base64 of 16 bytes


def test_c_c10_a_token_lives_for_a_minute() -> None:
    clock = Clock()
    tokens: Tokens[str] = Tokens(clock)
    token = tokens.issue("value")
    clock.now = TTL_S - 0.001
    assert tokens.peek(token) == "value"
    clock.now = TTL_S
    assert tokens.use(token) is None


def test_c_c10_outstanding_tokens_are_bounded_and_expire() -> None:
    clock = Clock()
    tokens: Tokens[int] = Tokens(clock)
    for n in range(MAX_OUTSTANDING):
        tokens.issue(n)
    with pytest.raises(ResourceExhausted):
        tokens.issue(0)
    clock.now = TTL_S
    tokens.issue(0)


def test_c_c10_guessed_tokens_stand_for_nothing() -> None:
    tokens: Tokens[str] = Tokens()
    tokens.issue("value")
    for guess in ("", "x", "A" * 22):
        assert tokens.use(guess) is None
