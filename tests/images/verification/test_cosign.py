"""cosign's formats against vectors that another program signed."""

from __future__ import annotations

import base64
import contextlib
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.oci import Digest
from imgsvc.images.verification import cosign
from imgsvc.images.verification.cosign import Claim
from tests.images.verification import vectors

KEY = cosign.load_key(vectors.PUBLIC_KEY, "k")
OTHER = cosign.load_key(
    ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "other"
)
SLSA = "https://slsa.dev/provenance/v1"


def dsse(statement: bytes = vectors.STATEMENT, signature: str = vectors.STATEMENT_SIGNATURE) -> bytes:
    envelope = {
        "payloadType": "application/vnd.in-toto+json",
        "payload": base64.b64encode(statement).decode(),
        "signatures": [{"keyid": "", "sig": signature}],
    }
    return json.dumps(envelope).encode()


def test_a_simple_signing_payload() -> None:
    claim = cosign.simple_signing(vectors.PAYLOAD, vectors.PAYLOAD_SIGNATURE, [OTHER, KEY], vectors.IMAGE)

    assert claim == Claim("k", "", "registry.example/team/app")


def test_a_good_signature_of_another_image_says_nothing() -> None:
    other = Digest.of(b"another manifest")

    assert cosign.simple_signing(vectors.PAYLOAD, vectors.PAYLOAD_SIGNATURE, [KEY], other) is None
    assert cosign.envelope(dsse(), [KEY], other) is None


def test_another_key_says_nothing() -> None:
    assert cosign.simple_signing(vectors.PAYLOAD, vectors.PAYLOAD_SIGNATURE, [OTHER], vectors.IMAGE) is None
    assert cosign.envelope(dsse(), [OTHER], vectors.IMAGE) is None


@pytest.mark.parametrize("position", range(0, len(vectors.PAYLOAD), 17))
def test_no_byte_of_a_payload_can_be_changed(position: int) -> None:
    changed = bytearray(vectors.PAYLOAD)
    changed[position] ^= 1

    assert cosign.simple_signing(bytes(changed), vectors.PAYLOAD_SIGNATURE, [KEY], vectors.IMAGE) is None


def test_an_attestation_alone_and_in_a_bundle() -> None:
    assert cosign.envelope(dsse(), [KEY], vectors.IMAGE) == Claim("k", SLSA)
    bundle = json.dumps({"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": json.loads(dsse())}).encode()
    assert cosign.bundle(bundle, [KEY], vectors.IMAGE) == Claim("k", SLSA)


def test_a_bundle_over_the_manifest_itself() -> None:
    raw = json.dumps({"messageSignature": {"signature": vectors.MANIFEST_SIGNATURE}}).encode()

    assert cosign.bundle(raw, [KEY], vectors.IMAGE) == Claim("k")
    assert cosign.bundle(raw, [KEY], Digest.of(b"x")) is None


def test_a_statement_cannot_be_passed_off_as_a_signature_payload() -> None:
    assert cosign.simple_signing(vectors.STATEMENT, vectors.STATEMENT_SIGNATURE, [KEY], vectors.IMAGE) is None
    assert cosign.envelope(dsse(vectors.PAYLOAD, vectors.PAYLOAD_SIGNATURE), [KEY], vectors.IMAGE) is None


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b'{"a":1,"a":2}', b"{}" * 2, b'{"payloadType":1}', b'{"dsseEnvelope":[]}', b'{"signatures":{}}']
)
def test_nonsense_is_no_claim(raw: bytes) -> None:
    for check in (cosign.envelope, cosign.bundle):
        with contextlib.suppress(InvalidArgument):
            assert check(raw, [KEY], vectors.IMAGE) is None


def test_rsa_ed25519_and_large_curves() -> None:
    data, payload = b"manifest", vectors.PAYLOAD
    rsa_key, edwards, curve = (
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP384R1()),
    )
    for private, signature in (
        (rsa_key, rsa_key.sign(payload, padding.PKCS1v15(), hashes.SHA256())),
        (edwards, edwards.sign(payload)),
        (curve, curve.sign(payload, ec.ECDSA(hashes.SHA256()))),
        (curve, curve.sign(payload, ec.ECDSA(hashes.SHA384()))),
    ):
        pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        key = cosign.load_key(pem, "any")
        assert cosign.simple_signing(payload, base64.b64encode(signature).decode(), [key], Digest.of(data)) is not None


def test_a_file_that_is_no_key_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        cosign.load_key(b"nonsense", "/etc/key.pub")
    assert caught.value.where == "/etc/key.pub"
