"""Encrypted images, made of plain ones: every layer sealed and its key wrapped as a test says, or tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from imgsvc.base.oci import Digest
from tests.decrypt.vectors import Sealed, jwe, seal
from tests.support.images import BuiltDocument, descriptor

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
Wrap = Callable[[bytes], Mapping[str, bytes | Sequence[bytes]]]  # private options → packets by scheme, as Sealed.descriptor takes them


def wrap_jwe(*keys: PrivateKey) -> Wrap:
    """For each of these keys."""
    recipients = [(key.public_key(), "RSA-OAEP" if isinstance(key, rsa.RSAPrivateKey) else "ECDH-ES+A256KW") for key in keys]
    return lambda options: {"jwe": jwe(options, recipients)}


def pem(key: PrivateKey) -> bytes:
    """The private key, as a key directory takes it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def encrypted(
    plain: BuiltDocument,
    wrap: Wrap,
    *,
    only: Collection[int] | None = None,
    sealer: Callable[[bytes, str], Sealed] = seal,
    public: Mapping[str, Any] | None = None,
) -> BuiltDocument:
    """The image with its layers encrypted. Config, diff IDs and so the image ID stay as they are.

    only: positions of the layers to encrypt, all by default. sealer: turns (layer, media type) into what is served.
    public: replaces members of the public options; None takes one out.
    """
    manifest = json.loads(plain.data)
    blobs = {plain.config_digest: plain.blobs[plain.config_digest]}
    for position, layer in enumerate(manifest["layers"]):
        blob = plain.blobs[Digest(layer["digest"])]
        if only is None or position in only:
            sealed = sealer(blob, layer["mediaType"])
            changed = {**sealed.public, **(public or {})}
            sealed.public = {name: value for name, value in changed.items() if value is not None}
            manifest["layers"][position] = sealed.descriptor(**wrap(sealed.options)).to_json()
            blob = sealed.blob
        blobs[Digest.of(blob)] = blob
    return BuiltDocument(plain.media_type, json.dumps(manifest).encode(), blobs)


def disguised(image: BuiltDocument, diff_ids: Sequence[Digest]) -> BuiltDocument:
    """The image with a config that claims these diff IDs."""
    manifest = json.loads(image.data)
    config = json.loads(image.blobs[image.config_digest])
    config["rootfs"]["diff_ids"] = list(diff_ids)
    raw = json.dumps(config).encode()
    manifest["config"] = descriptor(manifest["config"]["mediaType"], raw)
    blobs = {digest: blob for digest, blob in image.blobs.items() if digest != image.config_digest}
    return BuiltDocument(image.media_type, json.dumps(manifest).encode(), {**blobs, Digest.of(raw): raw})
