"""What a bearer token says of itself, where it is a JWT.

Its signature is the registry's to verify: the key is the token service's, which a client does not know. So claims shorten the use of
a token and explain it; they never grant anything.

Source: RFC 7519 4.1; distribution docs/spec/auth/jwt.md.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import jwt

from imgsvc.base.errors import printable

_MAX_TOKEN: Final = 64 * 1024  # [characters] of what is looked into; real ones stay below 16 KiB
_LATEST: Final = 253402300799  # [seconds] the end of the year 9999, the last that a datetime can tell
_JWT = re.compile(r"eyJ[\w-]*\.[\w-]+\.[\w-]*", re.ASCII)  # base64url of `{"`


@dataclass(frozen=True, slots=True)
class Claims:
    """subject: whom the token service took us for, "" where it does not say. expires [seconds since 1970], None likewise.

    lifetime [seconds]: from its issue to its end, by one clock where the token tells both; may be negative.
    """

    subject: str
    expires: float | None
    lifetime: float | None

    def __str__(self) -> str:
        until = f"until {datetime.fromtimestamp(self.expires, UTC):%Y-%m-%dT%H:%M:%SZ}" if self.expires is not None else "without an end"
        return f'for "{self.subject}", {until}' if self.subject else f"without a subject, {until}"


def claims_of(token: str) -> Claims | None:
    """The claims of a JWT, not verified; None for any other token."""
    if len(token) > _MAX_TOKEN or not _JWT.fullmatch(token):
        return None
    try:
        plain = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None
    expires, issued = _seconds(plain.get("exp")), _seconds(plain.get("iat"))
    lifetime = None if expires is None else expires - (time.time() if issued is None else issued)
    subject = plain.get("sub")
    return Claims(printable(subject, 80) if isinstance(subject, str) else "", expires, lifetime)


def _seconds(value: Any) -> float | None:
    """A NumericDate, None for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= _LATEST else None
