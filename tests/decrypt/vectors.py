"""Writes encrypted layers for what skopeo cannot make: other algorithms, PKCS#11, key providers, and damaged ones."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes, padding
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

from imgsvc.base.oci import Descriptor, Digest

TAR = "application/vnd.oci.image.layer.v1.tar"
GZIP = TAR + "+gzip"
ENC = "org.opencontainers.image.enc."
Public = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class Sealed:
    """A layer encrypted but not yet wrapped for anybody."""

    plain: bytes
    blob: bytes
    private: dict[str, Any]
    public: dict[str, Any]
    media_type: str

    @property
    def options(self) -> bytes:
        """What wrappers wrap."""
        return json.dumps(self.private).encode()

    def descriptor(self, **packets: bytes | Sequence[bytes]) -> Descriptor:
        """`jwe=packet` or `jwe=[packet, …]`; `provider_x` becomes provider.x."""
        annotations = {ENC + "pubopts": b64(json.dumps(self.public).encode())}
        for scheme, value in packets.items():
            items = [value] if isinstance(value, bytes) else value
            annotations[ENC + "keys." + scheme.replace("provider_", "provider.")] = ",".join(map(b64, items))
        return Descriptor(self.media_type, Digest.of(self.blob), len(self.blob), annotations)


def seal(plain: bytes, media_type: str = GZIP, *, nonce: bytes | None = None) -> Sealed:
    key, nonce = os.urandom(32), nonce or os.urandom(16)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()
    blob = encryptor.update(plain) + encryptor.finalize()
    mac = hmac.digest(key, blob, hashlib.sha256)
    private = {"symkey": b64(key), "digest": "sha256:" + "0" * 64, "cipheroptions": {"nonce": b64(nonce)}}
    public = {"cipher": "AES_256_CTR_HMAC_SHA256", "hmac": b64(mac), "cipheroptions": {}}
    return Sealed(plain, blob, private, public, media_type + "+encrypted")


def jwe(options: bytes, recipients: Sequence[tuple[Public, str]], enc: str = "A256GCM", header: Mapping[str, Any] | None = None) -> bytes:
    """A JWE as go-jose writes it: flattened for one (public key, alg), general with a stray encrypted_key for several."""
    sizes = {"A128GCM": 16, "A192GCM": 24, "A256GCM": 32, "A128CBC-HS256": 32, "A192CBC-HS384": 48, "A256CBC-HS512": 64}
    content_key = os.urandom(sizes[enc])
    made = [_recipient(public, alg, content_key) for public, alg in recipients]
    shared = {"enc": enc, **(header or {})} | (made[0][0] if len(made) == 1 else {})
    protected = b64url(json.dumps(shared).encode())
    iv, ciphertext, tag = _content(enc, content_key, options, protected.encode())
    value: dict[str, Any] = {"protected": protected, "iv": b64url(iv), "ciphertext": b64url(ciphertext), "tag": b64url(tag)}
    value["encrypted_key"] = b64url(made[0][1])
    if len(made) > 1:
        value["recipients"] = [{"header": own, "encrypted_key": b64url(key)} for own, key in made]
    return json.dumps(value).encode()


def _recipient(public: Public, alg: str, content_key: bytes) -> tuple[dict[str, Any], bytes]:
    if isinstance(public, rsa.RSAPublicKey):
        digest: hashes.HashAlgorithm = hashes.SHA256() if alg.endswith("256") else hashes.SHA1()
        return {"alg": alg}, public.encrypt(content_key, OAEP(MGF1(digest), digest, None))
    own = ec.generate_private_key(public.curve)
    size = (public.curve.key_size + 7) // 8
    point = own.public_key().public_numbers()
    epk = {"kty": "EC", "crv": CURVES[public.curve.name], "x": b64url(point.x.to_bytes(size)), "y": b64url(point.y.to_bytes(size))}
    length = {"A128": 16, "A192": 24, "A256": 32}[alg[8:12]]
    info = len(alg).to_bytes(4) + alg.encode() + bytes(8) + (length * 8).to_bytes(4)
    wrapping = ConcatKDFHash(hashes.SHA256(), length, info).derive(own.exchange(ec.ECDH(), public))
    return {"alg": alg, "epk": epk}, aes_key_wrap(wrapping, content_key)


def _content(enc: str, key: bytes, plain: bytes, aad: bytes) -> tuple[bytes, bytes, bytes]:
    if enc.endswith("GCM"):
        iv = os.urandom(12)
        sealed = AESGCM(key).encrypt(iv, plain, aad)
        return iv, sealed[:-16], sealed[-16:]
    iv, half = os.urandom(16), len(key) // 2
    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(key[half:]), modes.CBC(iv)).encryptor()
    body = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
    digest = {16: hashlib.sha256, 24: hashlib.sha384, 32: hashlib.sha512}[half]
    return iv, body, hmac.digest(key[:half], aad + iv + body + (len(aad) * 8).to_bytes(8), digest)[:half]


def pkcs11(options: bytes, public: rsa.RSAPublicKey, digest: str) -> bytes:
    """A PKCS#11 packet: RSA-OAEP right over the options."""
    algorithm: hashes.HashAlgorithm = hashes.SHA256() if digest == "sha256" else hashes.SHA1()
    blob = public.encrypt(options, OAEP(MGF1(algorithm), algorithm, None))
    return json.dumps({"version": 0, "recipients": [{"version": 0, "blob": b64(blob), "hash": digest}]}).encode()
