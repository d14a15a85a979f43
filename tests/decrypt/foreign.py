"""Images encrypted by skopeo, keys made by openssl and gpg."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zstandard

from imgsvc.base.oci import Descriptor, Digest, Manifest, parse_config, parse_document

LAYER = "application/vnd.oci.image.layer.v1.tar"
# How a layer is packed before skopeo sees it. skopeo gzips what is not compressed.
PACKINGS = ("", "+gzip", "+zstd")


@dataclass(frozen=True)
class EncryptedImage:
    """One layer of it: descriptor, ciphertext and the diff ID of the plain tar."""

    layout: Path
    layer: Descriptor
    blob: bytes
    diff_id: Digest


@dataclass(frozen=True)
class Foreign:
    """Everything below one directory. gpg_user is a recipient with an RSA subkey, without passphrase."""

    root: Path
    gpg_user: str

    @property
    def keys(self) -> Path:
        """rsa.pem, ec.pem (PKCS#8), rsa.pub, ec.pub, rsa.crt, pgp.key; no directory of keys: it has public ones too."""
        return self.root / "keys"

    def recipients(self) -> dict[str, list[str]]:
        """Scheme → the `--encryption-key` values of skopeo."""
        return {
            "jwe-rsa": [f"jwe:{self.keys}/rsa.pub"],
            "jwe-ec": [f"jwe:{self.keys}/ec.pub"],
            "pkcs7": [f"pkcs7:{self.keys}/rsa.crt"],
            "pgp": [f"pgp:{self.gpg_user}"],
        }

    def encrypt(self, name: str, packing: str, recipients: Sequence[str]) -> EncryptedImage:
        """Have skopeo encrypt the source image of that packing."""
        target = self.root / "images" / name
        if not target.exists():
            self.encrypt_layout(self.source(packing), target, recipients)
        return read_layout(target)

    def encrypt_layout(self, source: Path, target: Path, recipients: Sequence[str], *extra: str) -> None:
        """Have skopeo encrypt image "t" of an OCI layout into another one; `extra` are more options of it."""
        keys = [word for r in recipients for word in ("--encryption-key", r)]
        self.run("skopeo", "copy", "--quiet", *keys, *extra, f"oci:{source}:t", f"oci:{target}:t")

    def push(self, layout: Path, reference: str) -> None:
        """Have skopeo push image "t" of a layout over plain HTTP."""
        self.run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:t", f"docker://{reference}")

    def source(self, packing: str) -> Path:
        layout = self.root / "sources" / (packing or "plain")
        if not layout.exists():
            write_layout(layout, packing)
        return layout

    def run(self, *command: str, data: bytes | None = None) -> bytes:
        env = {**os.environ, "GNUPGHOME": str(self.root / "gpg"), "HOME": str(self.root)}
        done = subprocess.run(command, input=data, capture_output=True, timeout=60, env=env)
        assert done.returncode == 0, (command, done.stderr.decode())
        return done.stdout


@contextmanager
def foreign(root: Path) -> Iterator[Foreign]:
    made = Foreign(root, "image@example.test")
    for name in ("keys", "images", "sources"):
        (root / name).mkdir()
    (root / "gpg").mkdir(mode=0o700)
    k = str(made.keys)
    made.run("openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", f"{k}/rsa.pem")
    made.run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", f"{k}/ec.pem")
    for name in ("rsa", "ec"):
        made.run("openssl", "pkey", "-in", f"{k}/{name}.pem", "-pubout", "-out", f"{k}/{name}.pub")
    made.run("openssl", "req", "-x509", "-key", f"{k}/rsa.pem", "-subj", "/O=Example/CN=images", "-out", f"{k}/rsa.crt")
    try:
        make_gpg_key(made, "Key-Type: RSA\nKey-Length: 2048\nSubkey-Type: RSA\nSubkey-Length: 2048", made.gpg_user)
        (made.keys / "pgp.key").write_bytes(export_gpg_key(made, made.gpg_user))
        yield made
    finally:
        made.run("gpgconf", "--kill", "all")


def make_gpg_key(at: Foreign, kind: str, user: str, passphrase: str = "") -> None:
    secret = f"Passphrase: {passphrase}" if passphrase else "%no-protection"
    script = f"{kind}\nName-Email: {user}\n{secret}\n%commit\n"
    at.run("gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", "--gen-key", data=script.encode())


def export_gpg_key(at: Foreign, user: str, *extra: str) -> bytes:
    return at.run("gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", *extra, "--export-secret-keys", user)


def small_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, size in (("a", 200_000), ("b", 3)):
            entry = tarfile.TarInfo(name)
            entry.size = size
            archive.addfile(entry, io.BytesIO(os.urandom(size)))
    return stream.getvalue()


def pack(tar: bytes, packing: str) -> bytes:
    if packing == "+gzip":
        return gzip.compress(tar)
    return zstandard.compress(tar) if packing == "+zstd" else tar


def unpack(data: bytes) -> bytes:
    """By magic, since skopeo may compress what was not."""
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().decompressobj().decompress(data) if data[:4] == b"\x28\xb5\x2f\xfd" else data


def write_layout(root: Path, packing: str, layer: tuple[Descriptor, bytes] | None = None, tar: bytes | None = None) -> None:
    """An OCI layout with one image "t" of one layer: a new one, or the given descriptor and blob of that tar."""
    tar = tar or small_tar()
    blob = layer[1] if layer else pack(tar, packing)
    entry = layer[0].to_json() if layer else {"mediaType": LAYER + packing, "digest": Digest.of(blob), "size": len(blob)}
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [Digest.of(tar)]}}
    kind = "application/vnd.oci.image."
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind + "manifest.v1+json",
        "config": _put(root, config, kind + "config.v1+json"),
        "layers": [entry],
    }
    _put(root, blob, "")
    top = _put(root, manifest, kind + "manifest.v1+json") | {"annotations": {"org.opencontainers.image.ref.name": "t"}}
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _put(root: Path, value: object, media_type: str) -> dict[str, object]:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    digest = Digest.of(data)
    path = root / "blobs" / "sha256" / digest.hex
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def read_layout(root: Path) -> EncryptedImage:
    def blob(digest: str) -> bytes:
        return (root / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    index = json.loads((root / "index.json").read_text())
    manifest = parse_document(blob(index["manifests"][0]["digest"]), "", "layout")
    assert isinstance(manifest, Manifest)
    config = parse_config(blob(manifest.config.digest), "layout")
    return EncryptedImage(root, manifest.layers[0], blob(manifest.layers[0].digest), config.diff_ids[0])
