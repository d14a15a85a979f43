"""What cosign writes, checked: simple signing payloads, DSSE envelopes, sigstore bundles, with a key pair's public half. Pure.

Key pairs only: certificates (keyless signing) and transparency logs are not supported, so nothing here needs a clock, a
network or a root of trust beyond the key.

Source: cosign specs/SIGNATURE_SPEC.md, BUNDLE_SPEC.md; DSSE protocol.md; in-toto statement v0.1 and v1.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.base.oci import MIB, Digest, load_json_object

SIMPLE_SIGNING: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_ANNOTATION: Final = "dev.cosignproject.cosign/signature"
SIGNATURE_ARTIFACT: Final = "application/vnd.dev.cosign.artifact.sig.v1+json"
DSSE: Final = "application/vnd.dsse.envelope.v1+json"
BUNDLE_PREFIX: Final = "application/vnd.dev.sigstore.bundle"  # followed by .v0.3+json or ;version=0.3 and so on
SIGN_PREDICATE: Final = "https://sigstore.dev/cosign/sign/v1"  # an attestation that is nothing but a signature
MAX_PAYLOAD: Final = 16 * MIB  # [bytes] of one payload, envelope or bundle; large SBOM attestations reach some MiB
_SIMPLE_TYPES: Final = ("cosign container image signature", "atomic container signature", SIGN_PREDICATE)
_IN_TOTO: Final = "application/vnd.in-toto+json"

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Key:
    """A public key. name: for messages, e.g. the file it came from."""

    name: str
    public: PublicKey


@dataclass(frozen=True, slots=True)
class Claim:
    """Something a key has said of an image. predicate: "" for a plain signature; name: the docker-reference it was signed under."""

    key: str
    predicate: str = ""
    name: str = ""


def load_key(pem: bytes, name: str) -> Key:
    """A PEM public key: EC, RSA or Ed25519. Raises: InvalidArgument."""
    try:
        public = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidArgument("not a PEM public key", where=name, hint="give the file cosign.pub of `cosign generate-key-pair`") from error
    if not isinstance(public, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise InvalidArgument(f"a key of type {type(public).__name__}", where=name, hint="use EC (P-256), RSA or Ed25519")
    return Key(name, public)


def simple_signing(payload: bytes, signature: str, keys: list[Key], image: Digest) -> Claim | None:
    """The claim of a simple signing payload, None when no key signed it or it is about another image."""
    key = _signer(keys, _base64(signature), payload)
    if key is None:
        return None
    critical = _object(load_json_object(payload, "signature payload", limit=MAX_PAYLOAD), "critical")
    if critical.get("type") not in _SIMPLE_TYPES or _object(critical, "image").get("docker-manifest-digest") != image:
        return None
    name = _object(critical, "identity").get("docker-reference")
    return Claim(key, "", name if isinstance(name, str) else "")


def envelope(raw: bytes, keys: list[Key], image: Digest) -> Claim | None:
    """The claim of a DSSE envelope with an in-toto statement, None when no key signed it or it is about another image."""
    return _envelope(load_json_object(raw, "attestation", limit=MAX_PAYLOAD), keys, image)


def bundle(raw: bytes, keys: list[Key], image: Digest) -> Claim | None:
    """The claim of a sigstore bundle: an envelope, or a signature over the image's manifest itself."""
    document = load_json_object(raw, "sigstore bundle", limit=MAX_PAYLOAD)
    if "dsseEnvelope" in document:
        return _envelope(_object(document, "dsseEnvelope"), keys, image)
    signature = _object(document, "messageSignature").get("signature")
    if not isinstance(signature, str):
        return None
    key = next((key.name for key in keys if _signed_digest(key.public, _base64(signature), image)), None)
    return Claim(key) if key else None


def _envelope(document: dict[str, Any], keys: list[Key], image: Digest) -> Claim | None:
    kind, payload = document.get("payloadType"), document.get("payload")
    signatures = document.get("signatures")
    if kind != _IN_TOTO or not isinstance(payload, str) or not isinstance(signatures, list):
        return None
    statement = _base64(payload)
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(statement), statement)
    found = [s.get("sig") for s in signatures[:16] if isinstance(s, dict)]
    key = next((k for s in found if isinstance(s, str) and (k := _signer(keys, _base64(s), signed))), None)
    if key is None:
        return None
    content = load_json_object(statement, "attestation statement", limit=MAX_PAYLOAD)
    predicate = content.get("predicateType")
    if not isinstance(predicate, str) or not _is_about(content, image):
        return None
    return Claim(key, "" if predicate == SIGN_PREDICATE else predicate)


def _is_about(statement: dict[str, Any], image: Digest) -> bool:
    subjects = statement.get("subject")
    digests = [_object(s, "digest") for s in subjects if isinstance(s, dict)] if isinstance(subjects, list) else []
    return any(digest.get(image.algorithm) == image.hex for digest in digests)


def _signer(keys: list[Key], signature: bytes, data: bytes) -> str | None:
    return next((key.name for key in keys if _signed(key.public, signature, data)), None)


def _signed(key: PublicKey, signature: bytes, data: bytes) -> bool:
    return any(_verifies(key, signature, data, algorithm) for algorithm in _hashes(key))


def _verifies(key: PublicKey, signature: bytes, data: bytes, algorithm: hashes.HashAlgorithm) -> bool:
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, data, ec.ECDSA(algorithm))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), algorithm)
        else:
            key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _signed_digest(key: PublicKey, signature: bytes, image: Digest) -> bool:
    """Whether the key signed the bytes that `image` is the digest of."""
    if image.algorithm != "sha256" or isinstance(key, ed25519.Ed25519PublicKey):
        return False
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, bytes.fromhex(image.hex), ec.ECDSA(Prehashed(hashes.SHA256())))
        else:
            key.verify(signature, bytes.fromhex(image.hex), padding.PKCS1v15(), Prehashed(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _hashes(key: PublicKey) -> list[hashes.HashAlgorithm]:
    """SHA-256 with every key as cosign had it first, and the hash that sigstore has paired with larger curves since."""
    size = key.key_size if isinstance(key, ec.EllipticCurvePublicKey) else 0
    larger: dict[int, list[hashes.HashAlgorithm]] = {384: [hashes.SHA384()], 521: [hashes.SHA512()]}
    return [hashes.SHA256(), *larger.get(size, [])]


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(f'a signature or payload is not base64: "{printable(text, 40)}"') from error


def _object(value: dict[str, Any], name: str) -> dict[str, Any]:
    """A member that is an object; an empty one where it is anything else, so that every comparison fails."""
    found = value.get(name)
    return found if isinstance(found, dict) else {}
