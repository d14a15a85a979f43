"""JWE beyond what skopeo writes: every algorithm, curve and content encryption, many recipients, hostile documents."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from imgsvc.decrypt.interfaces import NotOpened
from imgsvc.decrypt.jwe import MAX_RECIPIENTS, JweWrapper
from imgsvc.decrypt.keys import KeyRing, PrivateKey
from tests.decrypt.vectors import jwe

OPTIONS = b'{"symkey":"AAAA"}'
ENCRYPTIONS = ("A128GCM", "A192GCM", "A256GCM", "A128CBC-HS256", "A192CBC-HS384", "A256CBC-HS512")
Keys = dict[str, ec.EllipticCurvePrivateKey]


def wrapper(*keys: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> JweWrapper:
    return JweWrapper(KeyRing(tuple(PrivateKey("key", k) for k in keys)))


@pytest.mark.parametrize("enc", ENCRYPTIONS)
@pytest.mark.parametrize("alg", ["RSA-OAEP", "RSA-OAEP-256"])
def test_rsa(rsa_key: rsa.RSAPrivateKey, alg: str, enc: str) -> None:
    assert wrapper(rsa_key).unwrap(jwe(OPTIONS, [(rsa_key.public_key(), alg)], enc)) == OPTIONS


@pytest.mark.parametrize("enc", ["A256GCM", "A256CBC-HS512"])
@pytest.mark.parametrize("alg", ["ECDH-ES+A128KW", "ECDH-ES+A192KW", "ECDH-ES+A256KW"])
@pytest.mark.parametrize("curve", ["secp256r1", "secp384r1", "secp521r1"])
def test_every_curve(ec_keys: Keys, curve: str, alg: str, enc: str) -> None:
    packet = jwe(OPTIONS, [(ec_keys[curve].public_key(), alg)], enc)

    assert wrapper(*ec_keys.values()).unwrap(packet) == OPTIONS


def test_each_of_many_recipients_opens_it(rsa_key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey, ec_keys: Keys) -> None:
    keys: list[rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = [rsa_key, *ec_keys.values(), other_rsa_key]
    algorithms = ["RSA-OAEP" if isinstance(k, rsa.RSAPrivateKey) else "ECDH-ES+A256KW" for k in keys]
    packet = jwe(OPTIONS, [(k.public_key(), a) for k, a in zip(keys, algorithms, strict=True)])

    # The document has a top-level encrypted_key as well, which belongs to the first recipient only.
    assert "encrypted_key" in json.loads(packet)
    for key in keys:
        assert wrapper(key).unwrap(packet) == OPTIONS


def test_recipients_are_described(rsa_key: rsa.RSAPrivateKey, ec_keys: Keys) -> None:
    several = jwe(OPTIONS, [(rsa_key.public_key(), "RSA-OAEP"), (ec_keys["secp384r1"].public_key(), "ECDH-ES+A256KW")])
    with_id = jwe(OPTIONS, [(rsa_key.public_key(), "RSA-OAEP-256")], header={"kid": "node\x1b[31m"})

    assert wrapper().recipients(several) == ["RSA-OAEP RSA 2048 bit", "ECDH-ES+A256KW P-384"]
    assert wrapper().recipients(with_id) == ["RSA-OAEP-256 RSA 2048 bit kid node\\x1b[31m"]


def test_another_key_does_not_open_it(rsa_key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey) -> None:
    with pytest.raises(NotOpened, match="none of 1"):
        wrapper(other_rsa_key).unwrap(jwe(OPTIONS, [(rsa_key.public_key(), "RSA-OAEP")]))


@pytest.mark.parametrize("name", ["protected", "iv", "ciphertext", "tag", "encrypted_key"])
def test_nothing_of_a_message_can_be_changed(rsa_key: rsa.RSAPrivateKey, name: str) -> None:
    value = json.loads(jwe(OPTIONS, [(rsa_key.public_key(), "RSA-OAEP")]))
    value[name] = ("B" if value[name][0] == "A" else "A") + value[name][1:]

    with pytest.raises(NotOpened):
        wrapper(rsa_key).unwrap(json.dumps(value).encode())


@pytest.mark.parametrize("header", [{"crit": ["x"]}, {"zip": "DEF"}, {"enc": "none"}, {"enc": ["A256GCM"]}])
def test_headers_that_are_not_understood_are_refused(rsa_key: rsa.RSAPrivateKey, header: dict[str, object]) -> None:
    with pytest.raises(NotOpened):
        wrapper(rsa_key).unwrap(jwe(OPTIONS, [(rsa_key.public_key(), "RSA-OAEP")], header=header))


@pytest.mark.parametrize("alg", ["RSA1_5", "dir", "none", "ECDH-ES", "PBES2-HS256+A128KW", ["RSA-OAEP"], None])
def test_only_the_known_algorithms_are_tried(rsa_key: rsa.RSAPrivateKey, alg: object) -> None:
    value = json.loads(jwe(OPTIONS, [(rsa_key.public_key(), "RSA-OAEP")] * 2))
    for recipient in value["recipients"]:
        recipient["header"]["alg"] = alg

    with pytest.raises(NotOpened):
        wrapper(rsa_key).unwrap(json.dumps(value).encode())


def test_a_point_off_the_curve_is_refused(ec_keys: Keys) -> None:
    # Answering such points would give the private key away, little by little.
    key = ec_keys["secp256r1"]
    value = json.loads(jwe(OPTIONS, [(key.public_key(), "ECDH-ES+A256KW")] * 2))
    for recipient in value["recipients"]:
        recipient["header"]["epk"]["y"] = recipient["header"]["epk"]["x"]

    with pytest.raises(NotOpened):
        wrapper(key).unwrap(json.dumps(value).encode())


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"[]",
        b"{}",
        b"a.b.c.d.e",  # the compact form
        b'{"protected": 5}',
        b'{"protected": "' + b"W" * 100_000 + b'"}',
        b'{"recipients": {}}',
        b'{"recipients": [5]}',
        b'{"recipients": [{"header": 5}]}',
        json.dumps({"recipients": [{}] * (MAX_RECIPIENTS + 1)}).encode(),
        b'{"header": {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "epk": {"crv": "P-256", "x": 5}}}',
        b'{"header": {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "epk": 7}}',
        '{"protected": "é", "aad": 5}'.encode(),
        b"[" * 100_000,
    ],
)
def test_damaged_documents_open_nothing_and_break_nothing(rsa_key: rsa.RSAPrivateKey, ec_keys: Keys, packet: bytes) -> None:
    with pytest.raises(NotOpened):
        wrapper(rsa_key, ec_keys["secp256r1"]).unwrap(packet)
    wrapper().recipients(packet)


TEXT = st.sampled_from(["", "AAAA", "e30", "***", "eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ"])
VALUES = st.recursive(st.none() | st.integers() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=5)
NAMES = st.sampled_from(["protected", "unprotected", "header", "recipients", "encrypted_key", "iv", "ciphertext", "tag", "aad"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES))
def test_no_document_raises_anything_else(value: dict[str, object]) -> None:
    packet = json.dumps(value).encode()
    with pytest.raises(NotOpened):
        wrapper().unwrap(packet)
    wrapper().recipients(packet)
