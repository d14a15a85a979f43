"""The decryptor as use cases see it: C-E1 at this level, C-E2's options, C-E3's keys, verdicts and stream processors."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from imgsvc.base.errors import Cancelled, DataLoss, FailedPrecondition, InvalidArgument, Unimplemented
from imgsvc.base.oci import Descriptor
from imgsvc.decrypt.aesctr import AuthenticationFailed, open_transform
from imgsvc.decrypt.decryptor import LayerDecryptor, Settings, layer_decryptor, recipients
from imgsvc.decrypt.interfaces import Decryptor, KeyMissing, LayerKey, Recipient
from imgsvc.decrypt.processors import Processor
from tests.decrypt.test_keyprovider import wait_gone, wait_written
from tests.decrypt.test_keys import dump
from tests.decrypt.vectors import ENC, GZIP, TAR, Sealed, b64, jwe, seal

SALT = b"salt of this node"
PLAIN = os.urandom(50_000)


def write_key(directory: Path, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, name: str = "key.pem") -> Path:
    path = directory / name
    path.write_bytes(dump(key, "PEM", "PKCS8"))
    path.chmod(0o600)
    return path


def wrapped(sealed: Sealed, key: rsa.RSAPrivateKey) -> bytes:
    return jwe(sealed.options, [(key.public_key(), "RSA-OAEP")])


def unwrap(decryptor: LayerDecryptor, layer: Descriptor) -> LayerKey:
    return asyncio.run(decryptor.unwrap(layer))


def decrypt(key: LayerKey, blob: bytes) -> bytes:
    assert key.secret is not None
    transform = open_transform(key.secret)
    return transform.update(blob) + transform.finalize()


@pytest.fixture
def decryptor(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> LayerDecryptor:
    write_key(tmp_path, rsa_key)
    return LayerDecryptor(Settings(tmp_path, SALT))


def test_a_layer_is_decrypted_and_its_key_stays_out_of_sight(decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey) -> None:
    sealed = seal(PLAIN)
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key))
    key = unwrap(decryptor, layer)

    assert decryptor.encrypted(layer)
    assert not decryptor.processed(layer)
    assert decrypt(key, sealed.blob) == PLAIN
    assert (key.scheme, key.media_type) == ("jwe", GZIP)
    assert repr(key) == f"LayerKey(scheme='jwe', media_type='{GZIP}')"
    assert b64(base64.b64decode(sealed.private["symkey"])) not in f"{key} {key.fingerprint}"


def test_a_bad_item_or_scheme_never_hides_a_good_one(
    decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey
) -> None:
    sealed = seal(PLAIN)
    useless = jwe(b'{"symkey": "AAAA"}', [(rsa_key.public_key(), "RSA-OAEP")])
    items = [b"junk", wrapped(sealed, other_rsa_key), useless, wrapped(sealed, rsa_key)]
    layer = sealed.descriptor(pkcs7=b"junk", pgp=b"\xff\xff", pkcs11=b"{}", provider_gone=b"x", new=b"y", jwe=items)
    damaged = replace(layer, annotations={**layer.annotations, ENC + "keys.jwe": "***," + layer.annotations[ENC + "keys.jwe"]})

    assert decrypt(unwrap(decryptor, damaged), sealed.blob) == PLAIN


def test_broken_configuration_of_helpers_never_hides_a_key(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    write_key(keys, rsa_key)
    (keys / "token.yaml").write_text("pkcs11: {uri: nonsense}")
    (tmp_path / "broken").write_text("{")
    decryptor = LayerDecryptor(Settings(keys, SALT, keyprovider_config=tmp_path / "broken", ocicrypt_config=str(tmp_path / "broken")))
    sealed = seal(PLAIN)
    others = {"pkcs11": b'{"recipients": []}', "provider_vault": b"x"}

    assert decrypt(unwrap(decryptor, sealed.descriptor(**others, jwe=wrapped(sealed, rsa_key))), sealed.blob) == PLAIN
    with pytest.raises(KeyMissing) as caught:
        unwrap(decryptor, sealed.descriptor(**others))
    assert str(caught.value).count(f"{tmp_path}/broken") == 2


def test_c_e3_the_error_names_schemes_recipients_and_skipped_files(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    sealed = seal(PLAIN)
    (tmp_path / "locked.pem").write_bytes(dump(rsa_key, "PEM", "PKCS8", b"password"))
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key), provider_vault=b"x", pgp=b"junk")
    with pytest.raises(KeyMissing) as caught:
        unwrap(LayerDecryptor(Settings(tmp_path, SALT)), layer)

    text = str(caught.value)
    for words in (
        layer.digest,
        "RSA-OAEP RSA 2048 bit",
        "provider.vault",
        "not configured",
        "locked.pem: encrypted, and no passphrase",
        str(tmp_path),
    ):
        assert words in text
    assert "\n" not in text
    assert caught.value.code == "PERMISSION_DENIED"
    assert {t.scheme for t in caught.value.trials} == {"jwe", "provider.vault", "pgp"}


def test_c_e3_no_keys_at_all_says_where_they_belong(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    sealed = seal(PLAIN)
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key))
    for path, words in ((tmp_path, f"{tmp_path} (keys there now: 0)"), (tmp_path / "no", "does not exist"), (None, "keys_path")):
        with pytest.raises(KeyMissing) as caught:
            unwrap(LayerDecryptor(Settings(path, SALT)), layer)
        assert words in str(caught.value)


def test_c_e3_a_thousand_keys_and_recipients_stay_fast(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ec_keys: dict[str, ec.EllipticCurvePrivateKey]
) -> None:
    for number in range(999):
        write_key(tmp_path, ec.generate_private_key(ec.SECP256R1()), f"{number:04}.pem")
    write_key(tmp_path, rsa_key, "9999.pem")
    decryptor = LayerDecryptor(Settings(tmp_path, SALT))
    sealed = seal(PLAIN)
    mine, other = (
        jwe(sealed.options, [(rsa_key.public_key(), "RSA-OAEP")]),
        jwe(sealed.options, [(ec_keys["secp256r1"].public_key(), "ECDH-ES+A256KW")] * 3),
    )

    started = time.process_time()  # a busy machine is not our doing
    assert unwrap(decryptor, sealed.descriptor(jwe=[other, mine])).scheme == "jwe"
    first = time.process_time() - started
    started = time.process_time()
    unwrap(decryptor, sealed.descriptor(jwe=[other, mine]))
    again = time.process_time() - started
    assert first < 20
    assert again < 1


def test_c_e2_nonce_rules(decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey) -> None:
    sealed = seal(PLAIN)
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key))
    for public in (
        sealed.public | {"cipheroptions": {"nonce": b64(bytes(16))}},  # overrides the wrapped one in the reference
        {k: v for k, v in sealed.public.items() if k != "hmac"},
        sealed.public | {"hmac": b64(bytes(31))},
    ):
        tampered = replace(layer, annotations={**layer.annotations, ENC + "pubopts": b64(json.dumps(public).encode())})
        with pytest.raises(InvalidArgument):
            unwrap(decryptor, tampered)


def test_c_e2_a_forged_wrap_opens_but_never_authenticates(decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey) -> None:
    # Anyone can wrap a key of their own to our public key.
    sealed, forged = seal(PLAIN), seal(PLAIN)
    key = unwrap(decryptor, sealed.descriptor(jwe=wrapped(forged, rsa_key)))

    with pytest.raises(AuthenticationFailed) as caught:
        decrypt(key, sealed.blob)
    assert isinstance(caught.value, DataLoss)


def test_c_e2_a_swapped_nonce_changes_the_plaintext_and_the_fingerprint(decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey) -> None:
    # The MAC does not cover the nonce, so only diff ID and fingerprint tell.
    sealed = seal(PLAIN)
    swapped = replace(sealed, private=sealed.private | {"cipheroptions": {"nonce": b64(bytes(16))}})
    good, bad = (unwrap(decryptor, s.descriptor(jwe=wrapped(s, rsa_key))) for s in (sealed, swapped))

    assert decrypt(bad, sealed.blob) != PLAIN
    assert good.fingerprint != bad.fingerprint


def test_c_e1_a_present_image_needs_its_key_again(tmp_path: Path, decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey) -> None:
    sealed = seal(PLAIN)
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key))
    first = unwrap(decryptor, layer)

    (tmp_path / "key.pem").unlink()
    with pytest.raises(KeyMissing):
        unwrap(decryptor, layer)
    write_key(tmp_path, rsa_key)
    assert unwrap(decryptor, layer).fingerprint == first.fingerprint


def test_c_e1_another_wrap_of_the_same_layer_is_judged_on_its_own(
    tmp_path: Path, decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey
) -> None:
    sealed = seal(PLAIN)
    unwrap(decryptor, sealed.descriptor(jwe=wrapped(sealed, rsa_key)))
    for_another = sealed.descriptor(jwe=wrapped(sealed, other_rsa_key))

    # Same blob digest, other annotations: the verdict on the first must not answer for it.
    with pytest.raises(KeyMissing):
        unwrap(decryptor, for_another)


def test_c_e1_the_fingerprint_tells_a_forged_wrap_from_the_real_one(decryptor: LayerDecryptor, rsa_key: rsa.RSAPrivateKey) -> None:
    sealed = seal(PLAIN)
    real, again = (unwrap(decryptor, sealed.descriptor(jwe=wrapped(sealed, rsa_key))) for _ in range(2))
    forged = unwrap(decryptor, sealed.descriptor(jwe=wrapped(seal(PLAIN), rsa_key)))

    assert real.fingerprint == again.fingerprint
    assert real.fingerprint != forged.fingerprint


def test_a_fingerprint_depends_on_the_node(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    write_key(tmp_path, rsa_key)
    sealed = seal(PLAIN)
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key))

    assert len({unwrap(LayerDecryptor(Settings(tmp_path, salt)), layer).fingerprint for salt in (b"a", b"b")}) == 2


COUNTING = """
import base64, json, sys
open(sys.argv[1], "a").write("x")
packet = base64.b64decode(json.load(sys.stdin)["keyunwrapparams"]["annotation"])
print(json.dumps({"keyunwrapresults": {"optsdata": base64.b64encode(packet).decode()}}))
"""


def provider_config(path: Path, script: str, *arguments: str) -> Path:
    command = {"path": sys.executable, "args": ["-c", script, *arguments]}
    path.write_text(json.dumps({"key-providers": {"test": {"cmd": command}}}))
    return path


def test_answers_are_remembered_and_shared_until_the_configuration_changes(tmp_path: Path) -> None:
    config = provider_config(tmp_path / "config", COUNTING, f"{tmp_path}/calls")
    decryptor = LayerDecryptor(Settings(None, SALT, keyprovider_config=config))
    sealed = seal(PLAIN)
    layer = sealed.descriptor(provider_test=sealed.options)

    async def many() -> Sequence[LayerKey]:
        return await asyncio.gather(*(decryptor.unwrap(layer) for _ in range(20)))

    keys = [*asyncio.run(many()), unwrap(decryptor, layer)]
    assert {k.fingerprint for k in keys} == {keys[0].fingerprint}
    assert (tmp_path / "calls").read_text() == "x"

    provider_config(config, "import sys; sys.exit('withdrawn')")
    for _ in range(2):
        with pytest.raises(KeyMissing, match="withdrawn"):
            unwrap(decryptor, layer)


def test_c_e3_a_hanging_provider_is_left_when_the_caller_leaves(tmp_path: Path) -> None:
    config = provider_config(tmp_path / "config", f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(600)")
    decryptor = LayerDecryptor(Settings(None, SALT, keyprovider_config=config))
    sealed = seal(PLAIN)

    pid = tmp_path / "pid"

    async def leave() -> None:
        asking = asyncio.ensure_future(decryptor.unwrap(sealed.descriptor(provider_test=b"x")))
        await asyncio.to_thread(wait_written, pid)
        asking.cancel()
        await asking

    with pytest.raises((asyncio.CancelledError, Cancelled)):
        asyncio.run(asyncio.wait_for(leave(), 60))
    wait_gone(pid.read_text())


def test_decryption_that_is_switched_off_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unimplemented, match="no decoder"):
        unwrap(LayerDecryptor(Settings(tmp_path, SALT, key_model="")), seal(PLAIN).descriptor(jwe=b"x"))


def test_recipients_of_everything(rsa_key: rsa.RSAPrivateKey) -> None:
    sealed = seal(PLAIN)
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key), pgp=b"junk", provider_vault=b"x", new=b"y")

    assert set(recipients(layer)) == {
        Recipient("jwe", "RSA-OAEP RSA 2048 bit"),
        Recipient("pgp", "unreadable packet"),
        Recipient("provider.vault", "key provider vault"),
        Recipient("new", "unreadable packet"),
    }
    assert recipients(replace(layer, media_type=GZIP)) == []


def test_recipients_without_number_are_said_to_be_too_many() -> None:
    """Such a layer is refused, unless a stream processor takes it: then it is shown."""
    layer = seal(b"x").descriptor(jwe=[b"x"] * 1000)
    assert [(r.scheme, "1000 wrapped keys" in r.name) for r in recipients(layer)] == [("", True)]


# Stream processors


def through_chain(decryptor: Decryptor, layer: Descriptor, blob: Path) -> tuple[bytes, str]:
    """(output, its media type) of the chain for a layer."""

    async def run(source: int) -> tuple[bytes, str]:
        chain = await decryptor.open_chain(layer, source)
        try:
            output = b""
            while chunk := await asyncio.to_thread(os.read, chain.output, 1 << 20):
                output += chunk
            await chain.wait()
            return output, chain.media_type
        finally:
            await chain.kill()

    with blob.open("rb") as stream:
        return asyncio.run(run(stream.fileno()))


def processor(*args: str, accepts: str = GZIP + "+encrypted", path: str = "sh") -> Processor:
    return Processor("test", (accepts,), TAR, path, args)


def test_a_configured_processor_serves_instead_of_the_built_in(tmp_path: Path) -> None:
    decryptor = layer_decryptor(Settings(None, SALT, processors=(processor("-c", "cat >/dev/null; printf plain"),)))
    sealed = seal(PLAIN)
    layer = sealed.descriptor(jwe=b"x")
    (tmp_path / "blob").write_bytes(sealed.blob)

    key = asyncio.run(decryptor.unwrap(layer))
    assert (key.secret, key.scheme, key.media_type) == (None, "stream processor test", TAR)
    assert through_chain(decryptor, layer, tmp_path / "blob") == (b"plain", TAR)
    assert decryptor.processed(layer)
    assert decryptor.encrypted(layer)


def test_types_without_a_processor_stay_with_the_built_in(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    write_key(tmp_path, rsa_key)
    decryptor = LayerDecryptor(Settings(tmp_path, SALT, processors=(processor("-c", "exit 1"),)))
    sealed = seal(PLAIN, TAR + "+zstd")
    layer = sealed.descriptor(jwe=wrapped(sealed, rsa_key))

    assert decrypt(unwrap(decryptor, layer), sealed.blob) == PLAIN
    with pytest.raises(FailedPrecondition):
        asyncio.run(decryptor.open_chain(layer, 0))


def test_a_processor_may_take_plain_types() -> None:
    decryptor = LayerDecryptor(Settings(None, SALT, processors=(processor(accepts="application/x-own"),)))
    layer = replace(seal(PLAIN).descriptor(), media_type="application/x-own")

    assert decryptor.processed(layer)
    assert not decryptor.encrypted(layer)


def test_a_table_that_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgument):
        LayerDecryptor(Settings(None, SALT, processors=(replace(processor(), returns=GZIP + "+encrypted"),)))


def test_c_e1_a_processors_fingerprint_changes_with_the_keys_it_is_given(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "a").write_text("a")
    decryptor = LayerDecryptor(Settings(None, SALT, processors=(processor("--decryption-keys-path", str(keys)),)))
    layer = seal(PLAIN).descriptor(jwe=b"x")
    fingerprints = [unwrap(decryptor, layer).fingerprint for _ in range(2)]
    (keys / "a").unlink()
    fingerprints += [unwrap(decryptor, layer).fingerprint, unwrap(decryptor, seal(b"other").descriptor(jwe=b"x")).fingerprint]

    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3
