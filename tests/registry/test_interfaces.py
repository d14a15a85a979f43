"""What a failed pull says of its attempts."""

from __future__ import annotations

from imgsvc.registry.interfaces import Attempt, CredentialKind, CredentialUse, PullFailed


def test_attempts_that_went_the_same_way_are_told_once() -> None:
    refused = [Attempt("http://m/v2", "connect", 0, seconds, CredentialUse(), "refused") for seconds in (0.1, 0.2, 0.4)]
    denied = Attempt("http://r/v2", "resolve", 403, 0.5, CredentialUse(CredentialKind.STORED, "file"), "DENIED")

    error = PullFailed("no", [refused[0], denied, *refused[1:]], "UNAVAILABLE", retryable=True)

    assert error.what == (
        "no (tried: http://m/v2 [connect] no answer, credential none: refused | http://r/v2 [resolve] 403, credential file: DENIED)"
    )
    assert len(error.attempts) == 4
