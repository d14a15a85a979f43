"""OpenPGP framing and secret keys: what is needed to open a session key, and no more.

Version 4 keys with RSA, ECDH on NIST curves or Curve25519; the rest of a keyring (signing keys, user IDs) is passed over.
Source: RFC 4880, RFC 6637, draft-ietf-openpgp-rfc4880bis for Curve25519.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

AES_KEY_SIZES: Final = {7: 16, 8: 24, 9: 32}  # cipher ID -> key length [bytes]
HASHES: Final = {1: hashlib.md5, 2: hashlib.sha1, 8: hashlib.sha256, 9: hashlib.sha384, 10: hashlib.sha512, 11: hashlib.sha224}
RSA_IDS: Final = (1, 2)  # encrypt-or-sign, encrypt only
ECDH_ID: Final = 18
CURVE25519_OID: Final = bytes.fromhex("2b060104019755010501")

_CURVES: Final[dict[bytes, ec.EllipticCurve]] = {
    bytes.fromhex("2a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("2b81040022"): ec.SECP384R1(),
    bytes.fromhex("2b81040023"): ec.SECP521R1(),
}
_SECRET_KEY_TAGS: Final = (5, 7)  # primary and subkey


class Malformed(ValueError):
    """Not OpenPGP, cut short, or of an unsupported kind."""


class WrongPassphrase(Exception):
    """A secret key that no given passphrase unlocks."""


@dataclass(frozen=True, slots=True, repr=False)
class PgpKey:
    """One secret key that can decrypt. public: the curve OID and KDF parameters of an ECDH key, empty for RSA."""

    key_id: bytes
    fingerprint: bytes
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | x25519.X25519PrivateKey
    curve_oid: bytes = b""
    kdf_hash: int = 0
    kdf_cipher: int = 0


class Reader:
    """A cursor over bytes; every read past the end raises Malformed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.offset = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count < 0 or self.offset + count > len(self._data):
            raise Malformed("cut short")
        self.offset += count
        return self._data[self.offset - count : self.offset]

    def number(self, count: int) -> int:
        """A big-endian number of `count` bytes."""
        return int.from_bytes(self.take(count))

    def mpi(self) -> bytes:
        """A multiprecision integer, as bytes."""
        return self.take((self.number(2) + 7) // 8)

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self.offset)

    @property
    def done(self) -> bool:
        """Nothing is left."""
        return self.offset == len(self._data)


def packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(tag, body) of every packet, old and new headers, partial lengths joined. Raises: Malformed."""
    reader = Reader(data)
    while not reader.done:
        header = reader.number(1)
        if not header & 0x80:
            raise Malformed("not an OpenPGP packet")
        if header & 0x40:
            yield header & 0x3F, _new_body(reader)
        else:
            kind = header & 3
            yield (header >> 2) & 0x0F, reader.rest() if kind == 3 else reader.take(reader.number(1 << kind))


def _new_body(reader: Reader) -> bytes:
    body = []
    while True:
        first = reader.number(1)
        if 224 <= first < 255:
            body.append(reader.take(1 << (first & 0x1F)))
            continue
        if first < 192:
            length = first
        elif first < 224:
            length = ((first - 192) << 8) + reader.number(1) + 192
        else:
            length = reader.number(4)
        body.append(reader.take(length))
        return b"".join(body)


def dearmor(text: bytes) -> bytes:
    """The binary form of the first armored block; its checksum is left to what is inside. Raises: Malformed."""
    lines = text.decode("ascii", "replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("-----BEGIN PGP ")), None)
    if start is None:
        raise Malformed("no armor")
    end = next((i for i, line in enumerate(lines) if i > start and line.startswith("-----END PGP ")), len(lines))
    block = [line.strip() for line in lines[start + 1 : end]]
    body = block[block.index("") + 1 :] if "" in block else block
    try:
        return base64.b64decode("".join(line for line in body if not line.startswith("=")), validate=True)
    except binascii.Error as error:
        raise Malformed("broken armor") from error


def secret_keys(data: bytes, passphrases: Sequence[bytes]) -> list[PgpKey]:
    """Every decryption key of a binary secret keyring.

    Raises: Malformed; WrongPassphrase when keys are there but all of them stay locked.
    """
    found: list[PgpKey] = []
    locked = False
    for tag, body in packets(data):
        if tag in _SECRET_KEY_TAGS:
            try:
                key = _secret_key(body, passphrases)
            except WrongPassphrase:
                locked = True
            except ValueError:  # a damaged subkey never hides a good one
                continue
            else:
                found += [key] if key else []
    if locked and not found:
        raise WrongPassphrase
    return found


def _secret_key(body: bytes, passphrases: Sequence[bytes]) -> PgpKey | None:
    """One secret (sub)key; None for what cannot decrypt."""
    reader = Reader(body)
    version, _created, algorithm = reader.number(1), reader.take(4), reader.number(1)
    if version != 4 or algorithm not in (*RSA_IDS, ECDH_ID):
        return None
    oid, kdf = b"", b"\0\0\0"
    if algorithm == ECDH_ID:
        oid = reader.take(reader.number(1))
        reader.mpi()  # the public point; the private scalar gives it
        kdf = reader.take(max(3, reader.number(1)))
        numbers = []
    else:
        numbers = [int.from_bytes(reader.mpi()) for _ in range(2)]  # modulus, public exponent
    public = body[: reader.offset]
    fingerprint = hashlib.sha1(b"\x99" + len(public).to_bytes(2) + public, usedforsecurity=False).digest()
    secret = Reader(_unlock(reader, passphrases))
    key = _build_ecdh(oid, secret.mpi()) if algorithm == ECDH_ID else _build_rsa(numbers, secret)
    return PgpKey(fingerprint[-8:], fingerprint, key, oid, kdf[1], kdf[2]) if key else None


def _build_rsa(public: list[int], secret: Reader) -> rsa.RSAPrivateKey:
    d, p, q = (int.from_bytes(secret.mpi()) for _ in range(3))
    numbers = rsa.RSAPublicNumbers(public[1], public[0])
    # OpenPGP keeps p^-1 mod q; the library wants q^-1 mod p.
    crt = (rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q))
    return rsa.RSAPrivateNumbers(p, q, d, *crt, numbers).private_key()


def _build_ecdh(oid: bytes, scalar: bytes) -> ec.EllipticCurvePrivateKey | x25519.X25519PrivateKey | None:
    if oid == CURVE25519_OID:
        return x25519.X25519PrivateKey.from_private_bytes(scalar.rjust(32, b"\0")[::-1])
    curve = _CURVES.get(oid)
    return ec.derive_private_key(int.from_bytes(scalar), curve) if curve else None


def _unlock(reader: Reader, passphrases: Sequence[bytes]) -> bytes:
    """The secret numbers, decrypted if need be. Raises: WrongPassphrase, Malformed. Source: RFC 4880 5.5.3."""
    usage = reader.number(1)
    if usage == 0:
        return reader.rest()
    if usage not in (254, 255):
        raise Malformed("a secret key protection from before 1999")
    cipher = reader.number(1)
    derive = _string_to_key(reader)
    if cipher not in AES_KEY_SIZES or derive is None:
        raise WrongPassphrase  # a key on a smart card, or one this program cannot unlock
    iv, sealed = reader.take(16), reader.rest()
    for passphrase in passphrases:
        plain = aes_cfb(derive(passphrase, AES_KEY_SIZES[cipher]), iv, sealed)
        if usage == 254:
            body, check = plain[:-20], plain[-20:]
            good = hashlib.sha1(body, usedforsecurity=False).digest() == check
        else:
            body, check = plain[:-2], plain[-2:]
            good = (sum(body) & 0xFFFF).to_bytes(2) == check
        if good:
            return body
    raise WrongPassphrase


def _string_to_key(reader: Reader) -> Callable[[bytes, int], bytes] | None:
    """Passphrase and length to key; None for a kind that has no secret here. Source: RFC 4880 3.7."""
    kind, digest = reader.number(1), HASHES.get(reader.number(1))
    if kind not in (0, 1, 3) or digest is None:
        return None
    salt = reader.take(8) if kind else b""
    count = 0
    if kind == 3:
        coded = reader.number(1)
        count = (16 + (coded & 15)) << ((coded >> 4) + 6)

    def derive(passphrase: bytes, length: int) -> bytes:
        unit = salt + passphrase
        total = max(count, len(unit))
        key, preload = b"", 0
        while len(key) < length:
            repeated = unit * (total // len(unit) + 1) if unit else b""
            key += digest(b"\0" * preload + repeated[:total]).digest()
            preload += 1
        return key[:length]

    return derive


def aes_cfb(key: bytes, iv: bytes, data: bytes) -> bytes:
    """Decrypt AES in CFB mode, OpenPGP's only bulk mode here."""
    decryptor = Cipher(algorithms.AES(key), CFB(iv)).decryptor()
    return decryptor.update(data) + decryptor.finalize()
