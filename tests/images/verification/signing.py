"""Signing images the way cosign does, and putting the result where it puts it."""

from __future__ import annotations

import base64
import json
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from imgsvc.base import oci
from imgsvc.base.oci import Digest
from imgsvc.images.verification import cosign
from tests.support.images import BuiltDocument, descriptor
from tests.support.registries import ScriptedRegistry

EMPTY = b"{}"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


class Signer:
    """A key pair."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.pem = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, data: bytes) -> str:
        """As base64."""
        return base64.b64encode(self._key.sign(data, ec.ECDSA(hashes.SHA256()))).decode()

    def signature(self, image: Digest, name: str = "127.0.0.1/app") -> BuiltDocument:
        """The manifest under the tag `sha256-….sig`."""
        critical = {
            "identity": {"docker-reference": name},
            "image": {"docker-manifest-digest": image},
            "type": "cosign container image signature",
        }
        payload = json.dumps({"critical": critical, "optional": None}).encode()
        return attachment(cosign.SIMPLE_SIGNING, payload, annotations={cosign.SIGNATURE_ANNOTATION: self.sign(payload)})

    def envelope(self, image: Digest, predicate: str) -> bytes:
        """A DSSE envelope around an in-toto statement."""
        statement = {"_type": "https://in-toto.io/Statement/v1", "subject": [{"digest": {"sha256": image.hex}}], "predicateType": predicate}
        raw = json.dumps(statement).encode()
        kind = b"application/vnd.in-toto+json"
        signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(raw), raw)
        envelope = {"payloadType": kind.decode(), "payload": base64.b64encode(raw).decode(), "signatures": [{"sig": self.sign(signed)}]}
        return json.dumps(envelope).encode()

    def bundle(self, image: BuiltDocument, predicate: str = cosign.SIGN_PREDICATE) -> BuiltDocument:
        """The manifest that refers to its image, as cosign 3 writes it."""
        raw = json.dumps({"mediaType": BUNDLE, "dsseEnvelope": json.loads(self.envelope(image.digest, predicate))}).encode()
        return attachment(BUNDLE, raw, artifactType=BUNDLE, subject=descriptor(image.media_type, image.data))


def attachment(media_type: str, payload: bytes, *, annotations: dict[str, str] | None = None, **extra: Any) -> BuiltDocument:
    """A manifest with one layer."""
    entry = {**descriptor(media_type, payload), **({"annotations": annotations} if annotations else {})}
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": descriptor(oci.OCI_EMPTY, EMPTY),
        "layers": [entry],
        **extra,
    }
    return BuiltDocument(oci.OCI_MANIFEST, json.dumps(manifest).encode(), {Digest.of(payload): payload, Digest.of(EMPTY): EMPTY})


def tag_for(image: Digest, suffix: str) -> str:
    """Where cosign puts it."""
    return f"{image.replace(':', '-')}.{suffix}"


def refer(registry: ScriptedRegistry, repository: str, image: BuiltDocument, *attached: BuiltDocument) -> None:
    """Offer manifests through the referrers API."""
    for document in attached:
        registry.serve(document, repository, str(document.digest))
    entries = [{**descriptor(d.media_type, d.data), "artifactType": json.loads(d.data)["artifactType"]} for d in attached]
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries}
    registry.answers[f"/v2/{repository}/referrers/{image.digest}"] = (oci.OCI_INDEX, json.dumps(index).encode())
