"""The layer cipher AES_256_CTR_HMAC_SHA256 as a stream.

Encrypt-then-MAC with one key for both, the MAC over the ciphertext only, the nonce being the whole initial counter
block. The verdict comes at the end, so callers treat all output as hostile until finalize() returned, and the diff ID
still decides. Source: ocicrypt's block cipher; NIST SP 800-38A for CTR.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from imgsvc.decrypt.interfaces import StreamTransform
from imgsvc.decrypt.packets import LayerOptions
from imgsvc.errors import DataLoss, InvalidArgument

_VERSION: Final = b"\x01"
_SECRET_SIZE: Final = 1 + 32 + 16 + 32
_SLACK: Final = 15  # [bytes] cryptography wants beyond the input: one block less one


class AuthenticationFailed(DataLoss):
    """The MAC of a layer does not match."""

    def __init__(self) -> None:
        super().__init__(
            "authentication failed: the HMAC of the encrypted layer does not match",
            hint="the blob or its annotations were changed, or the wrapped key belongs to another layer",
        )


def pack_secret(options: LayerOptions) -> bytes:
    """What travels to the worker, by pipe only."""
    return _VERSION + options.symkey + options.nonce + options.hmac


def open_transform(secret: bytes) -> StreamTransform:
    """The cipher stage for a LayerKey.secret. Raises: InvalidArgument."""
    if len(secret) != _SECRET_SIZE or secret[:1] != _VERSION:
        raise InvalidArgument("not a layer secret of this version")
    return AesCtrHmac(LayerOptions(secret[1:33], secret[33:49], secret[49:]))


class AesCtrHmac:
    """One pass over one layer. Not thread-safe. Both halves release the GIL."""

    def __init__(self, options: LayerOptions) -> None:
        self._cipher = Cipher(algorithms.AES(options.symkey), modes.CTR(options.nonce)).decryptor()
        self._mac = hmac.new(options.symkey, digestmod=hashlib.sha256)
        self._expected = options.hmac
        # One buffer for the whole layer: fresh megabytes per chunk cost page faults.
        self._buffer = bytearray()

    def update(self, data: bytes | memoryview) -> memoryview:
        """Decrypt a chunk of any size; the result is valid until the next call."""
        if len(self._buffer) < len(data) + _SLACK:
            self._buffer = bytearray(len(data) + _SLACK)
        self._mac.update(data)
        written = self._cipher.update_into(data, self._buffer)
        return memoryview(self._buffer)[:written]

    def finalize(self) -> bytes:
        """Judge the MAC; CTR itself holds nothing back. Raises: AuthenticationFailed."""
        if not hmac.compare_digest(self._mac.digest(), self._expected):
            raise AuthenticationFailed
        return b""
