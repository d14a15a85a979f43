"""PKCS#7: strict CMS by openssl, the loose kind by skopeo (test_skopeo), and damage to both."""

from __future__ import annotations

import random

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from imgsvc.decrypt.interfaces import NotOpened
from imgsvc.decrypt.keys import KeyRing, PrivateKey
from imgsvc.decrypt.packets import wrapped_keys
from imgsvc.decrypt.pkcs7 import Pkcs7Wrapper
from tests.decrypt.foreign import Foreign

pytestmark = pytest.mark.compat
OPTIONS = b'{"symkey":"AAAA"}'


def wrapper(*keys: rsa.RSAPrivateKey) -> Pkcs7Wrapper:
    return Pkcs7Wrapper(KeyRing(tuple(PrivateKey("key", k) for k in keys)))


@pytest.fixture
def key(outside: Foreign) -> rsa.RSAPrivateKey:
    loaded = load_pem_private_key((outside.keys / "rsa.pem").read_bytes(), None)
    assert isinstance(loaded, rsa.RSAPrivateKey)
    return loaded


@pytest.fixture
def skopeo_packet(outside: Foreign) -> bytes:
    image = outside.encrypt("pkcs7+gzip", "+gzip", outside.recipients()["pkcs7"])
    (item,) = wrapped_keys(image.layer)
    assert item.packet is not None
    return item.packet


@pytest.mark.parametrize("cipher", ["aes-128-cbc", "aes-192-cbc", "aes-256-cbc"])
@pytest.mark.parametrize("padding", ["pkcs1", "oaep", "oaep-sha256"])
def test_documents_of_openssl_open(outside: Foreign, key: rsa.RSAPrivateKey, cipher: str, padding: str) -> None:
    oaep = {"pkcs1": [], "oaep": ["-keyopt", "rsa_padding_mode:oaep"]}
    options = oaep.get(padding, ["-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256"])
    command = ["openssl", "cms", "-encrypt", "-binary", f"-{cipher}", "-outform", "DER", "-recip", str(outside.keys / "rsa.crt"), *options]
    packet = outside.run(*command, data=OPTIONS)

    assert wrapper(key).unwrap(packet) == OPTIONS
    assert wrapper().recipients(packet)[0].startswith("issuer O=Example,CN=images serial ")


def test_a_recipient_of_another_kind_does_not_hide_ours(outside: Foreign, key: rsa.RSAPrivateKey) -> None:
    certificate = outside.root / "ec.crt"
    outside.run("openssl", "req", "-x509", "-key", str(outside.keys / "ec.pem"), "-subj", "/CN=ec", "-out", str(certificate))
    command = [
        "openssl",
        "cms",
        "-encrypt",
        "-binary",
        "-aes-128-cbc",
        "-outform",
        "DER",
        "-recip",
        str(certificate),
        "-recip",
        f"{outside.keys}/rsa.crt",
    ]

    assert wrapper(key).unwrap(outside.run(*command, data=OPTIONS)) == OPTIONS


def test_another_key_does_not_open_it(other_rsa_key: rsa.RSAPrivateKey, skopeo_packet: bytes) -> None:
    with pytest.raises(NotOpened, match="none of 1"):
        wrapper(other_rsa_key).unwrap(skopeo_packet)


def test_a_good_key_is_found_behind_others(key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey, skopeo_packet: bytes) -> None:
    assert wrapper(other_rsa_key, key).unwrap(skopeo_packet).startswith(b"{")


def test_damage_anywhere_opens_nothing_else(key: rsa.RSAPrivateKey, skopeo_packet: bytes) -> None:
    good = wrapper(key).unwrap(skopeo_packet)
    chance = random.Random(7)
    for _ in range(400):
        damaged = bytearray(skopeo_packet)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        packet = bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        wrapper().recipients(packet)
        try:
            assert wrapper(key).unwrap(packet) == good  # the flip hit a byte that says nothing, such as the serial
        except NotOpened:
            continue
