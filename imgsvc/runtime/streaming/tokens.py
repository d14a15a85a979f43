"""One-time addresses: a token is the whole authorisation for one request.

128 random bits, used once, valid for a minute (the kubelet opens the address at once), a bounded number outstanding.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from imgsvc.base.errors import ResourceExhausted

TTL_S: Final = 60.0
MAX_OUTSTANDING: Final = 1000
_TOKEN_BYTES: Final = 16

T = TypeVar("T")


class Tokens(Generic[T]):
    """Tokens and their requests. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, tuple[float, T]] = {}  # in order of expiry, as all live equally long

    def issue(self, value: T) -> str:
        """A new token. Raises: ResourceExhausted."""
        self._expire()
        if len(self._entries) >= MAX_OUTSTANDING:
            raise ResourceExhausted(f"{MAX_OUTSTANDING} streaming addresses wait to be used", hint="use them, or try again in a minute")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._entries[token] = (self._clock() + TTL_S, value)
        return token

    def peek(self, token: str) -> T | None:
        """The request of a valid token, which stays valid."""
        self._expire()
        entry = self._entries.get(token)
        return entry[1] if entry else None

    def use(self, token: str) -> T | None:
        """As peek, but the token is gone afterwards."""
        value = self.peek(token)
        self._entries.pop(token, None)
        return value

    def _expire(self) -> None:
        now = self._clock()
        for token, (expires, _) in list(self._entries.items()):
            if expires > now:
                return
            del self._entries[token]
