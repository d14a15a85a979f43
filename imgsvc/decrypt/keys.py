"""The bytes of a key file -> keys. Content decides what a file is; names and extensions do not.

Reads PKCS#8 (also encrypted), PKCS#1 and SEC1 as PEM or DER, legacy encrypted PEM, private JWK, OpenPGP secret keyrings
binary or armored, and the YAML file that points to a key in a PKCS#11 token. Certificates and public keys are passed over.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.oci import load_json_object
from imgsvc.decrypt.pgp_packets import Malformed, PgpKey, WrongPassphrase, dearmor, secret_keys

_PEM_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_CURVES: Final[dict[str, ec.EllipticCurve]] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
_MAX_JWK: Final = 256 * 1024  # [bytes]


class KeyFileError(Exception):
    """The file holds no key that can be used. The text says why, without key material."""


@dataclass(frozen=True, slots=True, repr=False)
class PrivateKey:
    """An RSA or EC private key. source: the file it came from, for logs."""

    source: str
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A PKCS#11 key file, not yet read: YAML text with a URI, and where it came from."""

    source: str
    text: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, repr=False)
class KeyRing:
    """All keys at hand. skipped: "file: reason" of files that gave none. source: where they came from, for errors."""

    private: tuple[PrivateKey, ...] = ()
    pgp: tuple[PgpKey, ...] = ()
    tokens: tuple[TokenFile, ...] = ()
    skipped: tuple[str, ...] = ()
    source: str = ""

    @classmethod
    def join(cls, rings: Iterable[KeyRing], *, skipped: Sequence[str] = (), source: str = "") -> KeyRing:
        """Several rings as one."""
        parts = list(rings)
        return cls(
            tuple(k for r in parts for k in r.private),
            tuple(k for r in parts for k in r.pgp),
            tuple(t for r in parts for t in r.tokens),
            (*(s for r in parts for s in r.skipped), *skipped),
            source,
        )

    def __len__(self) -> int:
        return len(self.private) + len(self.pgp) + len(self.tokens)


def parse_key_file(data: bytes, source: str, passphrases: Sequence[bytes] = ()) -> KeyRing:
    """The keys in one file; an empty ring for an empty file, a certificate or a public key.

    Blocking: unlocking an OpenPGP key takes tens of milliseconds. Raises: KeyFileError.
    """
    text = data.strip()
    if not text:
        return KeyRing()
    if b"-----BEGIN PGP " in text:
        return _pgp_ring(_dearmored(text), passphrases)
    if b"-----BEGIN " in text:
        return KeyRing(private=_pem_keys(text, source, passphrases))
    if text[:1] == b"{" and b'"kty"' in text:
        return KeyRing(private=tuple(PrivateKey(source, k) for k in _json_web_keys(text)))
    if re.match(rb'(\A|.*\n)[{\s]*"?pkcs11"?:', text, re.DOTALL):
        return KeyRing(tokens=(TokenFile(source, data),))
    if data[:1] == b"\x30":
        return KeyRing(private=_der_keys(data, source, passphrases))
    if data[0] & 0x80:
        return _pgp_ring(data, passphrases)
    raise KeyFileError("unknown kind of key file")


def _pem_keys(text: bytes, source: str, passphrases: Sequence[bytes]) -> tuple[PrivateKey, ...]:
    blocks = [m[0] for m in _PEM_BLOCK.finditer(text) if m[1].endswith(b"PRIVATE KEY")]
    if not blocks and not _PEM_BLOCK.search(text):
        raise KeyFileError("broken PEM")
    return tuple(PrivateKey(source, _load_private(load_pem_private_key, block, passphrases)) for block in blocks)


def _der_keys(data: bytes, source: str, passphrases: Sequence[bytes]) -> tuple[PrivateKey, ...]:
    try:
        return (PrivateKey(source, _load_private(load_der_private_key, data, passphrases)),)
    except KeyFileError:
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_der_public_key

        for load in (x509.load_der_x509_certificate, load_der_public_key):
            try:
                load(data)
            except (ValueError, UnsupportedAlgorithm):
                continue
            return ()
        raise


def _load_private(load: Any, data: bytes, passphrases: Sequence[bytes]) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    """Without a passphrase first, then with each. Raises: KeyFileError."""
    locked = False
    for passphrase in (None, *passphrases):
        try:
            key = load(data, passphrase)
        except TypeError:  # "password was not given"
            locked = True
        except (ValueError, UnsupportedAlgorithm) as error:
            if not locked:
                raise KeyFileError("not a readable private key") from error.with_traceback(None)
        else:
            if isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
                return key
            raise KeyFileError(f"a {type(key).__name__.removesuffix('PrivateKey')} key cannot decrypt")
    raise KeyFileError("encrypted, and the given passphrase does not fit" if passphrases else "encrypted, and no passphrase is given")


def _json_web_keys(text: bytes) -> list[rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey]:
    """A JWK or a JWK set. Raises: KeyFileError. Source: RFC 7517, RFC 7518 6."""
    try:
        value = load_json_object(text, "JWK", limit=_MAX_JWK)
        entries = value["keys"] if isinstance(value.get("keys"), list) else [value]
        return [_json_web_key(entry) for entry in entries if "d" in entry]
    except (ImgsvcError, ValueError, TypeError, KeyError) as error:
        raise KeyFileError("not a JWK with an RSA or EC private key") from error.with_traceback(None)


def _json_web_key(jwk: dict[str, Any]) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    if jwk["kty"] == "EC":
        return ec.derive_private_key(_number(jwk["d"]), _CURVES[jwk["crv"]])
    if jwk["kty"] != "RSA":
        raise ValueError("kty")
    n, e, d = (_number(jwk[name]) for name in ("n", "e", "d"))
    p, q = (_number(jwk["p"]), _number(jwk["q"])) if "p" in jwk else rsa.rsa_recover_prime_factors(n, e, d)
    crt = (rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q))
    return rsa.RSAPrivateNumbers(p, q, d, *crt, rsa.RSAPublicNumbers(e, n)).private_key()


def _number(text: str) -> int:
    try:
        return int.from_bytes(base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except binascii.Error as error:
        raise ValueError("not base64url") from error


def _dearmored(text: bytes) -> bytes:
    try:
        return dearmor(text)
    except Malformed as error:
        raise KeyFileError("broken OpenPGP armor") from error


def _pgp_ring(data: bytes, passphrases: Sequence[bytes]) -> KeyRing:
    try:
        return KeyRing(pgp=tuple(secret_keys(data, passphrases)))
    except Malformed as error:
        raise KeyFileError("not a key file, or a broken OpenPGP keyring") from error
    except WrongPassphrase as error:
        reason = "the given passphrase does not fit" if passphrases else "no passphrase is given"
        raise KeyFileError(f"the OpenPGP keys are locked, and {reason}") from error
