"""Whole numbers in text from outside: image configurations, passwd files, HTTP headers, arguments. Pure.

int() alone is not for such text: it takes signs, underscores and digits of other scripts, and fails on very long text.
Cutting the text first makes another number of it.
"""

from __future__ import annotations


def whole_number(text: str, most: int) -> int | None:
    """The value of a text of ASCII digits, with any number of leading zeros; None for any other text.

    Every number above `most` comes back as `most` + 1, so that text of any length costs nothing and compares right.
    """
    if not text.isascii() or not text.isdigit():
        return None
    digits = text.lstrip("0") or "0"
    return min(int(digits), most + 1) if len(digits) <= len(str(most)) else most + 1
