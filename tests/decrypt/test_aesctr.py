"""The layer cipher: right over any chunking, and no verdict but "failed" on anything that was changed."""

from __future__ import annotations

import base64
import os

import pytest

from imgsvc.base.errors import DataLoss, InvalidArgument
from imgsvc.decrypt.aesctr import AuthenticationFailed, open_transform, pack_secret
from imgsvc.decrypt.packets import LayerOptions
from tests.decrypt.vectors import Sealed, seal

CHUNKS = (1, 15, 16, 17, 4096, 65_537, 1 << 20)


def secret(sealed: Sealed) -> bytes:
    key, mac = (base64.b64decode(v) for v in (sealed.private["symkey"], sealed.public["hmac"]))
    return pack_secret(LayerOptions(key, base64.b64decode(sealed.private["cipheroptions"]["nonce"]), mac))


def decrypt(sealed: Sealed, blob: bytes, chunk: int = 4096) -> bytes:
    transform = open_transform(secret(sealed))
    plain = b"".join(transform.update(memoryview(blob)[i : i + chunk]) for i in range(0, len(blob), chunk))
    return plain + transform.finalize()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("size", [0, 1, 16, 100_001])
def test_any_chunking_gives_the_plaintext(size: int, chunk: int) -> None:
    plain = os.urandom(size)
    sealed = seal(plain)

    assert decrypt(sealed, sealed.blob, chunk) == plain


@pytest.mark.parametrize("nonce", [b"\xff" * 16, bytes(8) + b"\xff" * 8, b"\xff" * 15 + b"\xfe"])
def test_the_counter_is_the_whole_nonce_and_wraps(nonce: bytes) -> None:
    plain = os.urandom(1000)
    sealed = seal(plain, nonce=nonce)

    # One block at a time, so that the carry happens in our calls and in the library's.
    assert decrypt(sealed, sealed.blob, 16) == decrypt(sealed, sealed.blob, 1000) == plain


def flipped(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


@pytest.mark.parametrize("damage", [flipped, lambda b: b[:-1], lambda b: b[:0], lambda b: b + b"\0", lambda b: b[16:] + b[:16]])
def test_c_e2_changed_ciphertext_fails_authentication(damage: object) -> None:
    assert callable(damage)
    sealed = seal(os.urandom(1000))

    with pytest.raises(AuthenticationFailed, match="authentication failed") as caught:
        decrypt(sealed, damage(sealed.blob))
    assert isinstance(caught.value, DataLoss)


def test_c_e2_a_wrong_mac_fails_authentication() -> None:
    sealed = seal(b"x" * 100)
    wrong = secret(sealed)[:-1] + bytes([secret(sealed)[-1] ^ 1])
    transform = open_transform(wrong)
    transform.update(sealed.blob)

    with pytest.raises(AuthenticationFailed):
        transform.finalize()


@pytest.mark.parametrize("value", [b"", b"\x01" * 80, b"\x01" * 82, b"\x02" + bytes(80)])
def test_a_secret_of_another_shape_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        open_transform(value)
