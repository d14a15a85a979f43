"""Images that skopeo encrypts are decrypted to the right diff IDs."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from imgsvc.base.oci import Descriptor, Digest
from imgsvc.decrypt.aesctr import open_transform
from imgsvc.decrypt.decryptor import LayerDecryptor, Settings, recipients
from imgsvc.decrypt.interfaces import KeyMissing, LayerKey
from tests.decrypt.foreign import PACKINGS, EncryptedImage, Foreign, unpack

pytestmark = pytest.mark.compat

KEY_OF = {"jwe-rsa": "rsa.pem", "jwe-ec": "ec.pem", "pkcs7": "rsa.pem", "pgp": "pgp.key"}


def unwrap(layer: Descriptor, keys: Path) -> LayerKey:
    return asyncio.run(LayerDecryptor(Settings(keys, b"salt")).unwrap(layer))


def diff_id(image: EncryptedImage, key: LayerKey) -> Digest:
    assert key.secret is not None
    transform = open_transform(key.secret)
    plain = b"".join(transform.update(image.blob[i : i + 70_000]) for i in range(0, len(image.blob), 70_000))
    return Digest.of(unpack(plain + transform.finalize()))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("scheme", KEY_OF)
def test_every_scheme_and_packing_opens_with_its_key(outside: Foreign, tmp_path: Path, scheme: str, packing: str) -> None:
    image = outside.encrypt(f"{scheme}{packing}", packing, outside.recipients()[scheme])
    shutil.copy(outside.keys / KEY_OF[scheme], tmp_path / "key")

    key = unwrap(image.layer, tmp_path)

    assert image.layer.media_type.endswith("+encrypted")
    assert key.scheme == scheme.partition("-")[0]
    assert key.media_type == image.layer.media_type.removesuffix("+encrypted")
    assert diff_id(image, key) == image.diff_id


@pytest.mark.parametrize("key_file", ["rsa.pem", "ec.pem", "pgp.key"])
def test_any_one_key_opens_an_image_wrapped_for_all(outside: Foreign, tmp_path: Path, key_file: str) -> None:
    every = [r for values in outside.recipients().values() for r in values]
    image = outside.encrypt("all", "+gzip", every)
    shutil.copy(outside.keys / key_file, tmp_path / "key")

    assert diff_id(image, unwrap(image.layer, tmp_path)) == image.diff_id


def test_without_a_key_the_error_names_schemes_and_recipients(outside: Foreign, tmp_path: Path) -> None:
    every = [r for values in outside.recipients().values() for r in values]
    image = outside.encrypt("all", "+gzip", every)

    with pytest.raises(KeyMissing) as caught:
        unwrap(image.layer, tmp_path)

    text = str(caught.value)
    assert {t.scheme for t in caught.value.trials} == {"jwe", "pkcs7", "pgp"}
    for word in (image.layer.digest, "P-256", "RSA 2048 bit", "O=Example,CN=images", "key ID ", str(tmp_path)):
        assert word in text


def test_recipients_are_listed_without_keys(outside: Foreign) -> None:
    every = [r for values in outside.recipients().values() for r in values]
    listed = recipients(outside.encrypt("all", "+gzip", every).layer)

    assert sorted(r.scheme for r in listed) == ["jwe", "jwe", "pgp", "pkcs7"]
