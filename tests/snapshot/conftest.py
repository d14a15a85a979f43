"""A bench per module, on tmpfs where there is one: thousands of small files are made here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.snapshot.bench import Bench


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="imgsvc-test-", dir=shared if shared.is_dir() else None) as root:
        made = Bench(Path(root))
        yield made
        made.close()
