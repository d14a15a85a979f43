"""ctd-decoder run as containerd runs it: stdin, stdout, stderr, the payload on descriptor 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from google.protobuf.any_pb2 import Any

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.oci import Descriptor
from imgsvc.decrypt import payload
from imgsvc.decrypt.ctd_decoder import CHUNK
from imgsvc.decrypt.decryptor import LayerDecryptor, Settings
from imgsvc.decrypt.external import ProcessorFailed
from imgsvc.decrypt.processors import Processor
from tests.decrypt.test_decryptor import through_chain, wrapped, write_key
from tests.decrypt.test_keys import dump
from tests.decrypt.vectors import GZIP, Sealed, b64, seal

ROOT = str(Path(__file__).parents[2])
PLAIN = os.urandom(3 * CHUNK + 7)


def decode(blob: bytes, given: bytes | None, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, bytes, str]:
    """(exit status, stdout, stderr). A shell puts the payload on descriptor 3."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as stream:
        stream.write(given or b"")
    redirect = f"<&{reader}" if given is not None else "<&-"
    command = [sys.executable, "-m", "imgsvc.decrypt.ctd_decoder", *arguments]
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" 3{redirect}', "sh", *command],
        input=blob,
        capture_output=True,
        timeout=120,
        pass_fds=[reader],
        env={**os.environ, "PYTHONPATH": ROOT, **(env or {})},
    )
    os.close(reader)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.fixture
def keys(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> Path:
    directory = tmp_path / "keys"
    directory.mkdir()
    write_key(directory, rsa_key)
    return directory


@pytest.fixture
def sealed() -> Sealed:
    return seal(PLAIN)


@pytest.fixture
def layer(sealed: Sealed, rsa_key: rsa.RSAPrivateKey) -> Descriptor:
    return sealed.descriptor(jwe=wrapped(sealed, rsa_key))


def test_a_layer_comes_out(sealed: Sealed, layer: Descriptor, keys: Path) -> None:
    assert decode(sealed.blob, payload.encode(layer), "--decryption-keys-path", str(keys)) == (0, PLAIN, "")


def test_an_empty_layer_comes_out(keys: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    empty = seal(b"")
    given = payload.encode(empty.descriptor(jwe=wrapped(empty, rsa_key)))

    assert decode(b"", given, "--decryption-keys-path", str(keys)) == (0, b"", "")


@pytest.mark.parametrize("size", [10_000, len(PLAIN)])
def test_c_e2_a_bad_mac_fails_and_the_end_never_comes_out(keys: Path, rsa_key: rsa.RSAPrivateKey, size: int) -> None:
    sealed = seal(PLAIN[:size])
    given = payload.encode(sealed.descriptor(jwe=wrapped(sealed, rsa_key)))
    status, output, errors = decode(sealed.blob[:-1] + b"x", given, "--decryption-keys-path", str(keys))

    assert status == 1
    assert "authentication failed" in errors
    # A tar's end lies in its last blocks, so what did come out is no whole layer.
    assert len(output) <= max(0, size - 7)
    assert output == PLAIN[: len(output)]
    assert size > CHUNK or output == b""


def test_c_e3_a_missing_key_is_one_line_that_names_it(sealed: Sealed, layer: Descriptor, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    status, output, errors = decode(sealed.blob, payload.encode(layer), "--decryption-keys-path", str(tmp_path / "none"))

    assert (status, output) == (1, b"")
    assert errors.count("\n") == 1
    assert layer.digest in errors
    assert "RSA 2048 bit" in errors


@pytest.mark.parametrize("given", [None, b"", b"\xff\xff", Any(type_url="other", value=b"{}").SerializeToString()])
def test_without_a_payload_the_error_says_so(sealed: Sealed, keys: Path, given: bytes | None) -> None:
    status, output, errors = decode(sealed.blob, given, "--decryption-keys-path", str(keys))

    assert (status, output) == (1, b"")
    assert "descriptor 3" in errors
    assert "Traceback" not in errors


def test_a_missing_directory_is_an_error(sealed: Sealed, layer: Descriptor) -> None:
    assert "/no/such/dir" in decode(sealed.blob, payload.encode(layer), "--decryption-keys-path", "/no/such/dir")[2]


def test_keys_may_come_in_the_payload(sealed: Sealed, layer: Descriptor, rsa_key: rsa.RSAPrivateKey) -> None:
    parameters = {
        "privkeys": [b64(b"junk"), b64(dump(rsa_key, "PEM", "PKCS8", b"password"))],
        "privkeys-passwords": [b64(b""), b64(b"password")],
        "x509s": [b64(b"ignored")],
    }
    value = json.dumps({"DecryptConfig": {"Parameters": parameters}, "Descriptor": layer.to_json()}).encode()
    given = Any(type_url=payload.TYPE_URL, value=value).SerializeToString()

    assert decode(sealed.blob, given) == (0, PLAIN, "")


def test_a_key_provider_of_the_environment_is_asked(sealed: Sealed, tmp_path: Path) -> None:
    from tests.decrypt.test_decryptor import COUNTING, provider_config

    config = provider_config(tmp_path / "config", COUNTING, f"{tmp_path}/calls")
    given = payload.encode(sealed.descriptor(provider_test=sealed.options))

    assert decode(sealed.blob, given, env={"OCICRYPT_KEYPROVIDER_CONFIG": str(config)}) == (0, PLAIN, "")


def test_our_own_processor_table_can_use_it(sealed: Sealed, layer: Descriptor, keys: Path, tmp_path: Path) -> None:
    entry = Processor(
        "own",
        (layer.media_type,),
        GZIP,
        sys.executable,
        ("-m", "imgsvc.decrypt.ctd_decoder", "--decryption-keys-path", str(keys)),
        (f"PYTHONPATH={ROOT}",),
    )
    decryptor = LayerDecryptor(Settings(None, b"salt", processors=(entry,)))
    (tmp_path / "blob").write_bytes(sealed.blob)

    assert through_chain(decryptor, layer, tmp_path / "blob") == (PLAIN, GZIP)
    (keys / "key.pem").unlink()
    with pytest.raises(ProcessorFailed, match="no key of this node opens it"):
        through_chain(decryptor, layer, tmp_path / "blob")


@pytest.mark.parametrize(
    "value",
    [
        b"[]",
        b"{}",
        b'{"Descriptor": 5}',
        b'{"DecryptConfig": {"Parameters": 5}, "Descriptor": {}}',
        b'{"DecryptConfig": {"Parameters": {"a": ["***"]}}, "Descriptor": {}}',
        b'{"DecryptConfig": {"Parameters": {"a": [5]}}, "Descriptor": {}}',
    ],
)
def test_damaged_payloads_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        payload.decode(Any(type_url=payload.TYPE_URL, value=value).SerializeToString())
