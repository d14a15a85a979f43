"""Keys wrapped as OpenPGP messages: session keys for RSA and ECDH, one AES-CFB packet with modification detection.

Source: RFC 4880 5.1, 5.13; RFC 6637 for ECDH.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from imgsvc.decrypt.interfaces import KeyWrapper, NotOpened
from imgsvc.decrypt.keys import KeyRing
from imgsvc.decrypt.pgp_packets import AES_KEY_SIZES, ECDH_ID, HASHES, RSA_IDS, Malformed, PgpKey, Reader, aes_cfb, packets

MAX_RECIPIENTS: Final = 256  # per message; each costs a private key operation per key that could fit

_SESSION_KEY_TAG: Final = 1
_SEALED_TAG: Final = 18
_LITERAL_TAG: Final = 11
_ANY_KEY_ID: Final = bytes(8)  # a hidden recipient


@dataclass(frozen=True, slots=True)
class _SessionKey:
    key_id: bytes
    algorithm: int
    body: bytes


class PgpWrapper:
    """Tries the keys whose ID a session key names, and every key on hidden recipients."""

    scheme: Final = "pgp"

    def __init__(self, ring: KeyRing) -> None:
        self._keys = ring.pgp

    def unwrap(self, packet: bytes) -> bytes:
        """See KeyWrapper."""
        try:
            session_keys, sealed = _parse(packet)
        except Malformed as error:
            raise NotOpened("not an OpenPGP message of the kind written for images") from error
        for wrapped in session_keys:
            for key in self._keys:
                if wrapped.key_id in (key.key_id, _ANY_KEY_ID):
                    for cipher, session_key in _open_session_key(wrapped, key):
                        plain = _unseal(sealed, cipher, session_key)
                        if plain is not None:
                            return plain
        raise NotOpened(f"none of {len(self._keys)} OpenPGP secret keys fits")

    def recipients(self, packet: bytes) -> list[str]:
        """See KeyWrapper."""
        try:
            return [f"key ID {k.key_id.hex().upper()}" if any(k.key_id) else "hidden key ID" for k in _parse(packet)[0]]
        except Malformed:
            return []


def wrapper(ring: KeyRing) -> KeyWrapper:
    """The wrapper, as its protocol."""
    return PgpWrapper(ring)


def _parse(data: bytes) -> tuple[list[_SessionKey], bytes]:
    """Session keys and the sealed body. Raises: Malformed."""
    found, sealed = [], b""
    for tag, body in packets(data):
        if tag == _SESSION_KEY_TAG:
            reader = Reader(body)
            if reader.number(1) == 3:
                found.append(_SessionKey(reader.take(8), reader.number(1), reader.rest()))
        elif tag == _SEALED_TAG:
            sealed = body
    if not found or sealed[:1] != b"\x01" or len(found) > MAX_RECIPIENTS:
        raise Malformed("no session key or no sealed data")
    return found, sealed[1:]


def _open_session_key(wrapped: _SessionKey, key: PgpKey) -> Iterator[tuple[int, bytes]]:
    """(cipher ID, session key) if `key` opens it and the checksum is right."""
    try:
        if wrapped.algorithm in RSA_IDS and isinstance(key.key, rsa.RSAPrivateKey):
            size = (key.key.key_size + 7) // 8
            plain = key.key.decrypt(Reader(wrapped.body).mpi().rjust(size, b"\0"), PKCS1v15())
        elif wrapped.algorithm == ECDH_ID and not isinstance(key.key, rsa.RSAPrivateKey):
            plain = _open_ecdh(wrapped.body, key, key.key)
        else:
            return
    except (ValueError, InvalidUnwrap):
        return
    cipher, session_key, check = plain[:1], plain[1:-2], plain[-2:]
    if cipher and AES_KEY_SIZES.get(cipher[0]) == len(session_key) and (sum(session_key) & 0xFFFF).to_bytes(2) == check:
        yield cipher[0], session_key


def _open_ecdh(body: bytes, key: PgpKey, secret: ec.EllipticCurvePrivateKey | x25519.X25519PrivateKey) -> bytes:
    """Raises: ValueError, InvalidUnwrap. Source: RFC 6637 7 and 8."""
    reader = Reader(body)
    point = reader.mpi()
    wrapped = reader.take(reader.number(1))
    if isinstance(secret, x25519.X25519PrivateKey):
        shared = secret.exchange(x25519.X25519PublicKey.from_public_bytes(point[1:]))  # 0x40, then the native form
    else:
        shared = secret.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(secret.curve, point))
    if key.kdf_hash not in HASHES or key.kdf_cipher not in AES_KEY_SIZES:
        raise ValueError("unknown KDF")
    kdf = bytes((3, 1, key.kdf_hash, key.kdf_cipher))
    parameters = bytes((len(key.curve_oid),)) + key.curve_oid + bytes((ECDH_ID,)) + kdf + b"Anonymous Sender    " + key.fingerprint
    derived = HASHES[key.kdf_hash](b"\0\0\0\1" + shared + parameters).digest()
    padded = aes_key_unwrap(derived[: AES_KEY_SIZES[key.kdf_cipher]], wrapped)
    return padded[: -padded[-1]]


def _unseal(sealed: bytes, cipher: int, session_key: bytes) -> bytes | None:
    """The literal data, if the modification detection code is right. Source: RFC 4880 5.13, 5.14."""
    if AES_KEY_SIZES.get(cipher) != len(session_key):
        return None
    plain = aes_cfb(session_key, bytes(16), sealed)
    body, check = plain[:-20], plain[-20:]
    digest = hashlib.sha1(body, usedforsecurity=False).digest()
    # The first block is random and repeats its last two bytes; the last two bytes of the body announce the code.
    if plain[14:16] != plain[16:18] or body[-2:] != b"\xd3\x14" or not hmac.compare_digest(digest, check):
        return None
    try:
        return next((_literal(content) for tag, content in packets(body[18:-2]) if tag == _LITERAL_TAG), None)
    except Malformed:
        return None


def _literal(body: bytes) -> bytes:
    reader = Reader(body)
    reader.take(1)  # binary or text: no line ends are touched either way
    reader.take(reader.number(1))  # file name
    reader.take(4)  # date
    return reader.rest()
