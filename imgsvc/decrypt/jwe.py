"""Keys wrapped as JWE in JSON form. Source: RFC 7516, RFC 7518; what ocicrypt's JWE writer (go-jose) makes.

Several recipients come with a top-level `encrypted_key` as well, a copy of the first one's; it is ignored then.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, padding
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from imgsvc.base.errors import ImgsvcError, printable
from imgsvc.base.oci import load_json_object
from imgsvc.decrypt.interfaces import KeyWrapper, NotOpened
from imgsvc.decrypt.keys import KeyRing, PrivateKey
from imgsvc.decrypt.packets import MAX_OPTIONS

MAX_RECIPIENTS: Final = 256  # per packet; each costs a private key operation per key

_OAEP: Final[dict[str, hashes.HashAlgorithm]] = {"RSA-OAEP": hashes.SHA1(), "RSA-OAEP-256": hashes.SHA256()}  # noqa: S303 - SHA-1 is what the name means
_ECDH: Final = {"ECDH-ES+A128KW": 16, "ECDH-ES+A192KW": 24, "ECDH-ES+A256KW": 32}  # length of the wrapping key [bytes]
_GCM: Final = {"A128GCM": 16, "A192GCM": 24, "A256GCM": 32}  # length of the content key [bytes]
_CBC: Final = {"A128CBC-HS256": (32, hashlib.sha256), "A192CBC-HS384": (48, hashlib.sha384), "A256CBC-HS512": (64, hashlib.sha512)}
_CURVES: Final[dict[str, ec.EllipticCurve]] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


@dataclass(frozen=True, slots=True)
class _Recipient:
    header: Mapping[str, Any]  # protected, shared and own members together
    encrypted_key: bytes


@dataclass(frozen=True, slots=True)
class _Message:
    recipients: tuple[_Recipient, ...]
    aad: bytes
    iv: bytes
    ciphertext: bytes
    tag: bytes


class JweWrapper:
    """Tries every private key on every recipient; key IDs are not relied on, writers rarely set them."""

    scheme: Final = "jwe"

    def __init__(self, ring: KeyRing) -> None:
        self._keys = ring.private

    def unwrap(self, packet: bytes) -> bytes:
        """See KeyWrapper."""
        try:
            message = _parse(packet)
        except (ValueError, ImgsvcError) as error:
            raise NotOpened("not a JWE JSON document") from error
        for recipient in message.recipients:
            for content_key in _content_keys(recipient, self._keys):
                plain = _decrypt_content(message, recipient, content_key)
                if plain is not None:
                    return plain
        raise NotOpened(f"none of {len(self._keys)} private keys fits")

    def recipients(self, packet: bytes) -> list[str]:
        """See KeyWrapper."""
        try:
            return [_describe(r) for r in _parse(packet).recipients]
        except (ValueError, ImgsvcError):
            return []


def wrapper(ring: KeyRing) -> KeyWrapper:
    """The wrapper, as its protocol."""
    return JweWrapper(ring)


def _parse(packet: bytes) -> _Message:
    """Flattened or general JSON. Raises: ValueError, ImgsvcError."""
    value = load_json_object(packet, "JWE", limit=16 * MAX_OPTIONS)
    protected_text = value.get("protected", "")
    shared = load_json_object(_decode(protected_text) or b"{}", "JWE header", limit=MAX_OPTIONS) | _object(value.get("unprotected") or {})
    entries = value.get("recipients") or [{"header": value.get("header"), "encrypted_key": value.get("encrypted_key")}]
    if not isinstance(entries, list) or len(entries) > MAX_RECIPIENTS:
        raise ValueError("recipients")
    recipients = tuple(
        _Recipient(shared | _object(e.get("header") or {}), _decode(e.get("encrypted_key") or "")) for e in map(_object, entries)
    )
    if any("crit" in r.header or "zip" in r.header for r in recipients):
        raise ValueError("crit and zip are not understood")
    aad = protected_text + (f".{value['aad']}" if value.get("aad") else "")
    return _Message(recipients, aad.encode("ascii"), *(_decode(value.get(name, "")) for name in ("iv", "ciphertext", "tag")))


def _content_keys(recipient: _Recipient, keys: Sequence[PrivateKey]) -> Iterator[bytes]:
    """Content keys that some private key yields; whether one is right shows when the content opens."""
    algorithm = str(recipient.header.get("alg"))
    for key in keys:
        try:
            if algorithm in _OAEP and isinstance(key.key, rsa.RSAPrivateKey):
                if len(recipient.encrypted_key) == (key.key.key_size + 7) // 8:
                    digest = _OAEP[algorithm]
                    yield key.key.decrypt(recipient.encrypted_key, OAEP(MGF1(digest), digest, None))
            elif algorithm in _ECDH and isinstance(key.key, ec.EllipticCurvePrivateKey):
                yield aes_key_unwrap(_agree(recipient.header, key.key), recipient.encrypted_key)
        except (ValueError, InvalidUnwrap):
            continue


def _agree(header: Mapping[str, Any], key: ec.EllipticCurvePrivateKey) -> bytes:
    """The wrapping key of ECDH-ES. Raises: ValueError, also for a point that is not on the curve. Source: RFC 7518 4.6."""
    epk, algorithm = _object(header.get("epk")), header["alg"]
    curve = _CURVES.get(str(epk.get("crv")))
    if curve is None or curve.name != key.curve.name:
        raise ValueError("another curve")
    x, y = (int.from_bytes(_decode(epk.get(name, ""))) for name in ("x", "y"))
    shared = key.exchange(ec.ECDH(), ec.EllipticCurvePublicNumbers(x, y, curve).public_key())
    length = _ECDH[algorithm]
    parties = [algorithm.encode(), *(_decode(header.get(name, "")) for name in ("apu", "apv"))]
    info = b"".join(len(p).to_bytes(4) + p for p in parties) + (length * 8).to_bytes(4)
    return ConcatKDFHash(hashes.SHA256(), length, info).derive(shared)


def _decrypt_content(message: _Message, recipient: _Recipient, key: bytes) -> bytes | None:
    encryption = recipient.header.get("enc")
    try:
        if _GCM.get(str(encryption)) == len(key):
            if len(message.tag) != 16 or len(message.iv) != 12:
                return None
            return AESGCM(key).decrypt(message.iv, message.ciphertext + message.tag, message.aad)
        length, digest = _CBC.get(str(encryption), (0, hashlib.sha256))
        return _decrypt_cbc(message, key, digest) if length == len(key) else None
    except (InvalidTag, ValueError):
        return None


def _decrypt_cbc(message: _Message, key: bytes, digest: Any) -> bytes:
    """AES_CBC_HMAC_SHA2, RFC 7518 5.2. Raises: InvalidTag, ValueError."""
    half = len(key) // 2
    covered = message.aad + message.iv + message.ciphertext + (len(message.aad) * 8).to_bytes(8)
    if not hmac.compare_digest(hmac.digest(key[:half], covered, digest)[:half], message.tag):
        raise InvalidTag
    decryptor = Cipher(algorithms.AES(key[half:]), modes.CBC(message.iv)).decryptor()
    unpadder = padding.PKCS7(128).unpadder()
    return unpadder.update(decryptor.update(message.ciphertext) + decryptor.finalize()) + unpadder.finalize()


def _describe(recipient: _Recipient) -> str:
    header = recipient.header
    words = [str(header.get("alg", "unknown algorithm"))]
    epk = header.get("epk")
    if isinstance(epk, dict):
        words.append(str(epk.get("crv", "")))
    elif words[0] in _OAEP:
        words.append(f"RSA {len(recipient.encrypted_key) * 8} bit")
    if header.get("kid"):
        words.append(f"kid {header['kid']}")
    return printable(" ".join(words), 120)


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _decode(text: object) -> bytes:
    """Unpadded base64url. Raises: ValueError."""
    if not isinstance(text, str):
        raise ValueError("not a string")
    try:
        return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("not base64url") from error
