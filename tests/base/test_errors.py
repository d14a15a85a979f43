from __future__ import annotations

import errno
import inspect
import string

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.base import errors
from imgsvc.base.errors import ImgsvcError, NotFound, from_os_error, printable

CATEGORIES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ImgsvcError) and c is not ImgsvcError]


def test_one_class_per_grpc_status() -> None:
    # UNKNOWN says nothing, and OK is no error.
    assert {c.code for c in CATEGORIES} == {s.name for s in grpc.StatusCode} - {"OK", "UNKNOWN"}
    assert len({c.code for c in CATEGORIES}) == len(CATEGORIES)


def test_only_what_may_pass_by_itself_is_retryable() -> None:
    assert {c.__name__ for c in CATEGORIES if c.retryable} == {"Unavailable", "Aborted", "DeadlineExceeded"}


@pytest.mark.parametrize(
    "error, text",
    [
        (NotFound("no such image"), "no such image"),
        (NotFound("no such image", where="hosts.toml:3"), "hosts.toml:3: no such image"),
        (NotFound("no such image", hint="pull it"), "no such image; pull it"),
        (NotFound("no such image", where="a:1", hint="pull it"), "a:1: no such image; pull it"),
    ],
)
def test_text_is_where_what_hint(error: ImgsvcError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize(
    "number, code",
    [
        (errno.ENOSPC, "RESOURCE_EXHAUSTED"),
        (errno.EDQUOT, "RESOURCE_EXHAUSTED"),
        (errno.EMFILE, "RESOURCE_EXHAUSTED"),
        (errno.ENFILE, "RESOURCE_EXHAUSTED"),
        (errno.ENOENT, "NOT_FOUND"),
        (errno.EACCES, "PERMISSION_DENIED"),
        (errno.EPERM, "PERMISSION_DENIED"),
        (errno.EIO, "DATA_LOSS"),
        (errno.EXDEV, "INTERNAL"),
    ],
)
def test_os_errors_have_a_category(number: int, code: str) -> None:
    error = from_os_error(OSError(number, "reason"), "writing a blob", where="/var/lib")
    assert error.code == code
    assert str(error).startswith("/var/lib: writing a blob: reason")


@given(st.text(max_size=2000), st.integers(1, 600))
def test_c_r16_foreign_text_is_one_bounded_printable_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= 10 * limit + 1  # \U0010ffff is the longest escape
    assert shown.startswith(text) or not text.isprintable() or len(text) > limit


def test_c_r16_terminal_escapes_and_half_characters_are_spelled_out() -> None:
    assert printable("a\x1b[31m\r\n\ud800b") == "a\\x1b[31m\\r\\n\\ud800b"
    assert printable(string.ascii_letters, 3) == "abc…"
