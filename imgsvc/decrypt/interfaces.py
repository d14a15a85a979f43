"""Contracts of layer decryption: unwrapping a key and running the bulk cipher are two seams.

Source: ocicrypt; containerd's stream processor contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from imgsvc.oci import Descriptor


@dataclass(frozen=True, slots=True, repr=False)
class LayerKey:
    """An unwrapped layer key. secret: what the worker's cipher stage needs, opaque to everybody else.

    fingerprint: salted hash of key and nonce, safe to store; equal for equal keys on this node.
    scheme: which wrapping opened it, e.g. "jwe".  media_type: of the decrypted bytes.
    """

    secret: bytes
    fingerprint: str
    scheme: str
    media_type: str

    def __repr__(self) -> str:
        return f"LayerKey(scheme={self.scheme!r}, media_type={self.media_type!r})"


class StreamTransform(Protocol):
    """Ciphertext in, plaintext out; nothing that came out may be trusted before finalize returned."""

    def update(self, data: bytes | memoryview) -> bytes:
        """Transform a chunk. Runs in a worker process."""

    def finalize(self) -> bytes:
        """The rest. Raises: DataLoss when the MAC does not match."""


class KeyWrapper(Protocol):
    """One wrapping scheme (JWE, PKCS7, PGP, PKCS11, a key provider)."""

    @property
    def annotation_id(self) -> str:
        """Annotation that carries its packets, e.g. org.opencontainers.image.enc.keys.jwe."""

    def unwrap(self, packet: bytes) -> bytes | None:
        """The private options JSON, or None when no key here opens this packet. Blocking. Never raises for bad packets."""


class Decryptor(Protocol):
    """What the use cases see."""

    def encrypted(self, descriptor: Descriptor) -> bool:
        """Whether the layer's media type says it is encrypted."""

    async def unwrap(self, descriptor: Descriptor) -> LayerKey:
        """Find the layer key. Raises: PermissionDenied naming schemes and recipients tried; InvalidArgument; Unimplemented."""
