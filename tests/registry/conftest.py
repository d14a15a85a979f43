"""Who fetches blobs in a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.registry.support import APART


@pytest.fixture(params=[False, True], ids=["here", "apart"])
def either_sender(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with a client that fetches blobs itself and once with one that has a process for it, as the daemon's has."""
    token = APART.set(request.param)
    yield
    APART.reset(token)
