"""Hashing as bytes arrive, and reading small blobs with proof."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import Cancelled, NotFound, ResourceExhausted
from imgsvc.base.oci import Digest
from imgsvc.content.verify import CHUNK, DigestMismatch, PrefixHash, digest_of, read_verified
from tests.fakes.store import MemoryStore

DATA = os.urandom(3 * CHUNK + 17)


@pytest.fixture
def file(tmp_path: Path) -> int:
    (tmp_path / "f").write_bytes(DATA)
    return os.open(tmp_path / "f", os.O_RDONLY)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_digest_of_a_file(file: int, algorithm: str) -> None:
    assert digest_of(file, algorithm) == Digest.of(DATA, algorithm)


def test_hashing_a_file_can_be_stopped(file: int) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        digest_of(file, "sha256", token)


def test_fed_and_caught_up_is_the_same_digest(file: int) -> None:
    prefix = PrefixHash("sha256")
    prefix.feed(DATA[:100])
    prefix.catch_up(file, CHUNK + 5)
    prefix.feed(memoryview(DATA)[CHUNK + 5 : 2 * CHUNK])
    prefix.catch_up(file, len(DATA) + 1000)
    assert prefix.hashed == len(DATA)
    assert prefix.digest() == Digest.of(DATA)


def test_read_verified_proves_what_it_returns() -> None:
    store = MemoryStore()
    digest = Digest.of(b"manifest")
    with pytest.raises(NotFound):
        read_verified(store, digest, 100)
    store.publish(digest, b"manifest", {})
    assert read_verified(store, digest, 8) == b"manifest"
    with pytest.raises(ResourceExhausted):
        read_verified(store, digest, 7)
    store.publish(digest, b"Manifest", {})
    with pytest.raises(DigestMismatch) as caught:
        read_verified(store, digest, 100)
    assert caught.value.actual == Digest.of(b"Manifest")
