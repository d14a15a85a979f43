"""Errors as plain data, for messages between the daemon and its own processes. Pure.

An error arrives as its category: a subclass would need fields that text does not carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from imgsvc.base import errors
from imgsvc.base.errors import ImgsvcError, Internal

_CATEGORIES: Final = {c.code: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ImgsvcError)}
_MAX_TEXT: Final = 2048  # [characters] of each text; JSON may make six bytes of one


def error_to_plain(error: ImgsvcError) -> dict[str, str]:
    """For error_from_plain; JSON can carry it."""
    return {"code": error.code, "what": error.what[:_MAX_TEXT], "where": error.where[:_MAX_TEXT], "hint": error.hint[:_MAX_TEXT]}


def error_from_plain(plain: Mapping[str, str]) -> ImgsvcError:
    """What error_to_plain was given, as its category; Internal for a code that is not known."""
    category = _CATEGORIES.get(plain["code"], Internal)
    return category(plain["what"], where=plain["where"], hint=plain["hint"])
