"""Key files of every kind, by content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from imgsvc.decrypt.keys import KeyFileError, parse_key_file
from tests.decrypt.foreign import Foreign
from tests.decrypt.vectors import b64url

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
PASSWORD = b"correct horse"


def dump(key: Key, encoding: str, form: str, password: bytes = b"") -> bytes:
    encryption: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(getattr(Encoding, encoding), getattr(PrivateFormat, form), encryption)


def numbers(key: Key) -> object:
    return key.private_numbers()


def jwk(key: Key) -> dict[str, str]:
    def number(value: int) -> str:
        return b64url(value.to_bytes((value.bit_length() + 7) // 8))

    if isinstance(key, rsa.RSAPrivateKey):
        own = key.private_numbers()
        parts = {"n": own.public_numbers.n, "e": own.public_numbers.e, "d": own.d, "p": own.p, "q": own.q}
        return {"kty": "RSA", "alg": "RSA-OAEP"} | {name: number(value) for name, value in parts.items()}
    return {"kty": "EC", "crv": "P-256", "d": number(key.private_numbers().private_value)}


@pytest.fixture(params=["rsa", "ec"])
def key(request: pytest.FixtureRequest, rsa_key: rsa.RSAPrivateKey, ec_keys: dict[str, ec.EllipticCurvePrivateKey]) -> Key:
    return rsa_key if request.param == "rsa" else ec_keys["secp256r1"]


@pytest.mark.parametrize("encoding", ["PEM", "DER"])
@pytest.mark.parametrize("form", ["PKCS8", "TraditionalOpenSSL"])  # the latter is PKCS#1 for RSA and SEC1 for EC
def test_plain_keys(key: Key, form: str, encoding: str) -> None:
    (found,) = parse_key_file(dump(key, encoding, form), "key").private

    assert numbers(found.key) == numbers(key)


@pytest.mark.parametrize("encoding, form", [("PEM", "PKCS8"), ("DER", "PKCS8"), ("PEM", "TraditionalOpenSSL")])
def test_encrypted_keys_need_the_right_password(key: Key, form: str, encoding: str) -> None:
    data = dump(key, encoding, form, PASSWORD)

    (found,) = parse_key_file(data, "key", [b"wrong", PASSWORD]).private
    assert numbers(found.key) == numbers(key)
    with pytest.raises(KeyFileError, match="does not fit"):
        parse_key_file(data, "key", [b"wrong"])
    with pytest.raises(KeyFileError, match="no passphrase"):
        parse_key_file(data, "key")


def test_a_plain_key_with_a_needless_password_is_read(key: Key) -> None:
    assert len(parse_key_file(dump(key, "PEM", "PKCS8"), "key", [PASSWORD])) == 1


def test_private_jwk_and_jwk_sets(key: Key) -> None:
    value = jwk(key)
    without_primes = {k: v for k, v in value.items() if k not in "pq"}

    for document in (value, without_primes, {"keys": [value, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}]}):
        (found,) = parse_key_file(json.dumps(document).encode(), "key").private
        assert numbers(found.key) == numbers(key)


def test_a_certificate_and_its_key_in_one_file(outside: Foreign) -> None:
    both = (
        (outside.keys / "rsa.crt").read_bytes() + b"\n" + (outside.keys / "rsa.pem").read_bytes() + (outside.keys / "ec.pem").read_bytes()
    )

    assert len(parse_key_file(both, "key")) == 2


def test_what_is_not_a_private_key_gives_none(key: Key, outside: Foreign, tmp_path: Path) -> None:
    public = key.public_key()
    der = tmp_path / "crt"
    outside.run("openssl", "x509", "-in", f"{outside.keys}/rsa.crt", "-outform", "DER", "-out", str(der))

    for encoding in (Encoding.PEM, Encoding.DER):
        assert len(parse_key_file(public.public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo), "key")) == 0
    for data in (b"", b" \n", (outside.keys / "rsa.crt").read_bytes(), der.read_bytes()):
        assert len(parse_key_file(data, "key")) == 0


def test_a_token_file_is_recognised() -> None:
    for text in (b"pkcs11:\n  uri: pkcs11:token=t\n", b"# note\nmodule: {}\npkcs11:\n  uri: x\n", b'{"pkcs11": {"uri": "x"}}'):
        assert len(parse_key_file(text, "key").tokens) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"Put keys here.",
        b"\x00\x01\x02",
        b"0\x82\x00",
        b"\xff" * 40,
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n",
        b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n***\n-----END PGP PRIVATE KEY BLOCK-----\n",
        b'{"kty": "RSA", "d": 5}',
        b'{"kty": "EC", "crv": "P-999", "d": "AA"}',
        b'{"kty": "oct", "d": "AA"}',
        b'{"kty": "RSA"',
    ],
)
def test_anything_else_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(KeyFileError):
        parse_key_file(data, "key")


def test_a_signing_key_is_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    with pytest.raises(KeyFileError, match="Ed25519"):
        parse_key_file(data, "key")
