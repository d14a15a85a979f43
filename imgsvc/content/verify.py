"""Digest and size checks: hashing while bytes arrive, in any order, and reading small blobs back with proof.

hashlib releases the GIL for anything but tiny chunks, so all of this belongs on a pool thread.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import DataLoss, ResourceExhausted
from imgsvc.base.oci import MIB, Descriptor, Digest
from imgsvc.content.interfaces import Provider

CHUNK: Final = MIB  # [bytes] per read: large enough for full hashing speed, small enough to stop quickly


class DigestMismatch(DataLoss):
    """The bytes are not those the digest names."""

    def __init__(self, expected: Digest, actual: Digest, where: str) -> None:
        super().__init__(f"digest mismatch: expected {expected}, got {actual}", where=where, hint="the bytes were dropped; pull again")
        self.expected = expected
        self.actual = actual


class SizeMismatch(DataLoss):
    """More or fewer bytes than announced. Sizes in bytes."""

    def __init__(self, expected: int, actual: int, where: str) -> None:
        got = f"more than {expected}" if actual > expected else f"{actual}"
        super().__init__(f"size mismatch: expected {expected} bytes, got {got}", where=where)
        self.expected = expected
        self.actual = actual


class PrefixHash:
    """Digest of the first `hashed` bytes of a growing file. Not thread-safe."""

    def __init__(self, algorithm: str) -> None:
        self._hash = hashlib.new(algorithm)
        self.algorithm = algorithm
        self.hashed = 0

    def feed(self, data: bytes | memoryview) -> None:
        """The bytes at offset `hashed`."""
        self._hash.update(data)
        self.hashed += len(data)

    def catch_up(self, fd: int, end: int) -> None:
        """Read and hash up to offset `end`, or to the end of a file that is shorter. Raises: OSError."""
        while self.hashed < end and (data := os.pread(fd, min(CHUNK, end - self.hashed), self.hashed)):
            self.feed(data)

    def digest(self) -> Digest:
        """Of what was hashed so far."""
        return Digest.from_hash(self.algorithm, self._hash.hexdigest())


def digest_of(fd: int, algorithm: str, cancel: CancelToken | None = None) -> Digest:
    """Digest of a whole file. Raises: OSError, Cancelled."""
    prefix = PrefixHash(algorithm)
    while data := os.pread(fd, CHUNK, prefix.hashed):
        prefix.feed(data)
        if cancel is not None:
            cancel.check()
    return prefix.digest()


def wrong_size(store: Provider, descriptor: Descriptor) -> str:
    """The fault when a stored blob has another size than its descriptor says; "" when there is none or the blob is not stored. Blocking.

    A digest alone does not prove the size that a manifest claims, and nothing else looks at it when nothing has to be fetched.
    """
    info = store.info(descriptor.digest)
    if info is None or info.size == descriptor.size:
        return ""
    return f"blob {descriptor.digest} has {info.size} bytes, its descriptor says {descriptor.size}"


def read_verified(store: Provider, digest: Digest, limit: int) -> bytes:
    """A small blob (manifest, config) in memory, hashed as it is read. Blocking.

    Raises: NotFound; DataLoss when it is not what its digest says; ResourceExhausted beyond `limit` [bytes].
    """
    with store.reader(digest) as reader:
        if reader.size > limit:
            raise ResourceExhausted(f"blob {digest} has {reader.size} bytes, more than the limit of {limit}")
        data = reader.read_at(0, reader.size)
    actual = Digest.of(data, digest.algorithm)
    if actual != digest:
        raise DigestMismatch(digest, actual, str(digest))
    return data
