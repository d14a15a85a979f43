"""Who may use an image that is decrypted already, and what tampered layers leave behind: nothing.

Anybody can wrap a layer key to a public key and can claim any diff ID, so neither may be enough.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from imgsvc.api import cri_pb2
from imgsvc.base.oci import Digest, Platform
from tests.decrypt.vectors import Sealed, b64, seal
from tests.e2e.conftest import BUSYBOX, Node
from tests.e2e.test_encrypted import diff_ids, two_layers, unpacked
from tests.support import cri, images
from tests.support.daemon import below
from tests.support.encrypted import PrivateKey, Wrap, disguised, encrypted, pem, wrap_jwe
from tests.support.images import BuiltDocument, Entry
from tests.support.registries import RealRegistry

DENIED = grpc.StatusCode.PERMISSION_DENIED
SECRET = "for those with the key only"


def refused(node: Node, name: str) -> tuple[grpc.StatusCode, str]:
    """PullImage is refused, and nothing of it is there."""
    before = node.snapshots()
    answer = cri.refusal(lambda: cri.pull(node.daemon.images(), name))
    # Good layers of a refused image stay until the next collection.
    assert node.snapshots() == before or (node.daemon.cli("gc").returncode, node.snapshots()) == (0, before)
    return answer


def start(node: Node, config: cri_pb2.ContainerConfig, pod: str) -> tuple[str, Callable[[str], str]]:
    """A pod with a running container. Returns the container, and a function that creates one more by name."""
    runtime = node.daemon.runtime()
    pod_config = cri.pod_config(node.daemon, pod)
    sandbox = cri.run_pod(runtime, pod_config)

    def create(name: str) -> str:
        more = cri_pb2.ContainerConfig()
        more.CopyFrom(config)
        more.metadata.name, more.log_path = name, f"{name}.log"
        return cri.create(node.daemon.runtime(), sandbox, more, pod_config)

    container = create("first")
    cri.start(runtime, container)
    return container, create


@pytest.mark.root
def test_c_e1_without_the_key_an_image_that_is_here_makes_no_new_container(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey
) -> None:
    node = make_node(network=True)
    key = node.key("rsa.pem", rsa_key)
    made = encrypted(images.busybox(), wrap_jwe(rsa_key))
    registry.push(made, "use/running")
    cri.pull(node.daemon.images(), "use/running")
    container, create = start(node, cri.container_config("use/running", ["sleep", "600"]), "pod")
    create("second")

    key.rename(node.keys.parent / "away")
    assert refused(node, "use/running")[0] == DENIED
    code, text = cri.refusal(lambda: create("third"))
    assert (code, "rsa" in text.lower(), str(node.keys) in text) == (DENIED, True, True), text
    assert cri.status(node.daemon.runtime(), container).state == cri_pb2.CONTAINER_RUNNING

    # A restart forgets verdicts, not rules.
    node.daemon.kill()
    node.daemon.start()
    assert cri.status(node.daemon.runtime(), container).state == cri_pb2.CONTAINER_RUNNING
    assert cri.refusal(lambda: create("third"))[0] == DENIED

    (node.keys.parent / "away").rename(key)
    assert cri.pull(node.daemon.images(), "use/running") == str(made.config_digest)
    assert create("third")
    node.daemon.remove_all_pods()


@pytest.mark.root
def test_c_e1_image_volumes_need_the_key_too(
    make_node: Callable[..., Node], registry: RealRegistry, busybox: str, rsa_key: rsa.RSAPrivateKey
) -> None:
    node = make_node(network=True)
    key = node.key("rsa.pem", rsa_key)
    registry.push(encrypted(images.image([images.layer([Entry("secret", SECRET.encode())])]), wrap_jwe(rsa_key)), "use/volume")
    for name in (BUSYBOX, "use/volume"):
        cri.pull(node.daemon.images(), name)
    config = cri.container_config(BUSYBOX, ["cat", "/data/secret"])
    config.mounts.add(container_path="/data", readonly=True, image=cri_pb2.ImageSpec(image="use/volume"))
    container, create = start(node, config, "pod")
    ended = cri.wait_for_exit(node.daemon.runtime(), container)
    assert [line.text for line in cri.read_log(Path(ended.log_path))] == [SECRET]
    key.unlink()
    assert cri.refusal(lambda: create("second"))[0] == DENIED
    node.daemon.remove_all_pods()


def test_c_e1_the_selected_manifest_of_an_index_decides(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey, other_key: rsa.RSAPrivateKey
) -> None:
    ours, other = str(Platform.host()), "linux/s390x" if Platform.host().architecture != "s390x" else "linux/amd64"
    foreign = images.image([images.layer([Entry("a", b"plain, and first in the index")])], platform=other)
    mine = encrypted(two_layers(SECRET), wrap_jwe(rsa_key))
    index = images.index({other: foreign, ours: mine})
    registry.push(index, "use/index")
    registry.push(images.index({other: encrypted(foreign, wrap_jwe(other_key)), ours: two_layers("open")}), "use/open-here")
    node = make_node()
    key = node.key("rsa.pem", rsa_key)
    cri.pull(node.daemon.images(), "use/index")
    key.unlink()
    for name in ("use/index", f"use/index@{index.digest}", f"use/index@{mine.digest}"):
        assert refused(node, name)[0] == DENIED, name
    # What is encrypted for another platform does not matter here.
    assert cri.pull(node.daemon.images(), "use/open-here")


@pytest.mark.parametrize("key_there", [True, False], ids=["with-the-key", "key-removed"])
def test_c_e1_a_squatted_diff_id_never_reuses_decrypted_layers(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey, key_there: bool
) -> None:
    node = make_node()
    key = node.key("rsa.pem", rsa_key)
    honest = two_layers(SECRET)
    registry.push(encrypted(honest, wrap_jwe(rsa_key)), "use/honest")
    cri.pull(node.daemon.images(), "use/honest")
    if not key_there:
        key.unlink()
    claimed = [Digest(d) for d in diff_ids(honest)]
    junk = images.image([images.layer([Entry("junk", b"1")]), images.layer([Entry("junk", b"2")])], Cmd=["cat", "/etc/text"])
    plain = disguised(junk, claimed)
    registry.push(plain, "use/squat")
    registry.push(encrypted(plain, wrap_jwe(rsa_key)), "use/squat-encrypted")  # the public key is public
    code, text = refused(node, "use/squat")
    assert (code, claimed[0] in text or claimed[1] in text) == (grpc.StatusCode.DATA_LOSS, True), text
    assert refused(node, "use/squat-encrypted")[0] == (grpc.StatusCode.DATA_LOSS if key_there else DENIED)
    # Only the top layer is junk: what is below it is the attacker's own too.
    base = next(blob for blob in honest.blobs.values() if blob[:2] == b"\x1f\x8b")
    mixed = images.image([images.Layer(images.layer([]).media_type, base, claimed[0]), images.layer([Entry("junk", b"3")])])
    registry.push(disguised(mixed, claimed), "use/squat-top")
    assert refused(node, "use/squat-top")[0] == grpc.StatusCode.DATA_LOSS
    assert [tag for image in node.daemon.images().ListImages(cri_pb2.ListImagesRequest()).images for tag in image.repo_tags] == [
        "docker.io/use/honest:latest"
    ]


def test_c_e1_a_forged_wrap_around_a_stolen_blob_is_no_proof(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey
) -> None:
    """The blob and the diff IDs are known to everybody; the attacker wraps a key of his own for this node."""
    node = make_node()
    node.key("rsa.pem", rsa_key)
    kept: dict[bytes, Sealed] = {}

    def keep(blob: bytes, media_type: str) -> Sealed:
        kept[blob] = seal(blob, media_type)
        return kept[blob]

    def forge(blob: bytes, media_type: str) -> Sealed:
        stolen = kept[blob]
        return replace(stolen, private={**stolen.private, "symkey": b64(os.urandom(32))})

    made = two_layers(SECRET)
    registry.push(encrypted(made, wrap_jwe(rsa_key), sealer=keep), "use/stolen-from")
    registry.push(encrypted(made, wrap_jwe(rsa_key), sealer=forge), "use/forged")
    cri.pull(node.daemon.images(), "use/stolen-from")
    code, text = refused(node, "use/forged")
    assert (code, "authentication failed" in text) == (grpc.StatusCode.DATA_LOSS, True), text


def test_c_e1_the_same_files_under_another_layer_key_are_decrypted_again(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey
) -> None:
    node = make_node()
    node.key("rsa.pem", rsa_key)
    made = two_layers(SECRET)
    tops = []
    for name in ("use/one", "use/two"):
        registry.push(encrypted(made, wrap_jwe(rsa_key)), name)
        cri.pull(node.daemon.images(), name)
        tops.append(node.inspect(name)["layers"][-1]["snapshot"])
    registry.push(made, "use/plain")
    cri.pull(node.daemon.images(), "use/plain")
    tops.append(node.inspect("use/plain")["layers"][-1]["snapshot"])
    assert len(set(tops)) == 3


def test_c_e1_one_more_recipient_needs_no_second_decryption(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey, other_key: rsa.RSAPrivateKey
) -> None:
    """Wrapping the same layer key again is what `skopeo copy` does for a new recipient."""
    node = make_node()
    node.key("rsa.pem", rsa_key)
    sealed: dict[bytes, Sealed] = {}

    def once(blob: bytes, media_type: str) -> Sealed:
        return sealed.setdefault(blob, seal(blob, media_type))

    made = two_layers(SECRET)
    registry.push(encrypted(made, wrap_jwe(rsa_key), sealer=once), "use/one-recipient")
    registry.push(encrypted(made, wrap_jwe(rsa_key, other_key), sealer=once), "use/two-recipients")
    cri.pull(node.daemon.images(), "use/one-recipient")
    before = node.snapshots()
    cri.pull(node.daemon.images(), "use/two-recipients")
    assert node.snapshots() == before


def flipped(blob: bytes, media_type: str) -> Sealed:
    sealed = seal(blob, media_type)
    middle = len(sealed.blob) // 2
    return replace(sealed, blob=sealed.blob[:middle] + bytes([sealed.blob[middle] ^ 1]) + sealed.blob[middle + 1 :])


def truncated(blob: bytes, media_type: str) -> Sealed:
    sealed = seal(blob, media_type)
    return replace(sealed, blob=sealed.blob[:-1])


def swapped_nonce(blob: bytes, media_type: str) -> Sealed:
    """The MAC does not cover the nonce."""
    sealed = seal(blob, media_type)
    return replace(sealed, private={**sealed.private, "cipheroptions": {"nonce": b64(os.urandom(16))}})


def without_nonce(blob: bytes, media_type: str) -> Sealed:
    return replace(seal(blob, media_type), private={**seal(blob, media_type).private, "cipheroptions": {}})


TAMPERED: Mapping[str, tuple[Callable[[bytes, str], Sealed], Mapping[str, Any], tuple[str, ...]]] = {
    "flipped": (flipped, {}, ("authentication failed",)),
    "truncated": (truncated, {}, ("authentication failed",)),
    "nonce-swapped": (swapped_nonce, {}, ("said to be gzip, but is neither", "unpacks to")),
    "nonce-missing": (without_nonce, {}, ("nonce",)),
    "public-nonce": (seal, {"cipheroptions": {"nonce": b64(bytes(16))}}, ("nonce",)),
    "wrong-hmac": (seal, {"hmac": b64(bytes(32))}, ("authentication failed",)),
    "short-hmac": (seal, {"hmac": b64(bytes(16))}, ("hmac",)),
    "hmac-missing": (seal, {"hmac": None}, ("hmac",)),
    "other-cipher": (seal, {"cipher": "AES_256_CTR"}, ("cipher",)),
}


def test_c_e2_a_tampered_layer_leaves_nothing_behind(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey
) -> None:
    node = make_node()
    node.key("rsa.pem", rsa_key)
    made = two_layers(SECRET)
    for name, (sealer, public, expected) in TAMPERED.items():
        bad = encrypted(made, wrap_jwe(rsa_key), only=[1], sealer=sealer, public=public)
        registry.push(bad, f"use/{name}")
        code, text = refused(node, f"use/{name}")
        assert code in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.INVALID_ARGUMENT), (name, code, text)
        assert any(part in text.lower() for part in expected), (name, text)
        assert json.loads(bad.data)["layers"][1]["digest"] in text, (name, text)
        assert not node.daemon.images().ListImages(cri_pb2.ListImagesRequest()).images, name
    assert unpacked(node.daemon) == []
    assert node.daemon.cli("gc").returncode == 0
    assert list((node.daemon.root / "content" / "blobs").glob("*/*")) == []
    assert [p for p in below(node.daemon.root / "content" / "ingest") if p.is_file()] == []
    registry.push(encrypted(made, wrap_jwe(rsa_key)), "use/good")
    assert cri.pull(node.daemon.images(), "use/good") == str(made.config_digest)


@pytest.mark.parametrize("snapshotter", ["auto", "native"])
def test_c_e2_a_large_layer_is_removed_when_only_its_last_byte_is_wrong(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey, snapshotter: str
) -> None:
    """Here nearly all files are on disk before the MAC is judged."""

    def last_byte(blob: bytes, media_type: str) -> Sealed:
        sealed = seal(blob, media_type)
        return replace(sealed, blob=sealed.blob[:-1] + bytes([sealed.blob[-1] ^ 1]))

    node = make_node(settings=f'[images]\nsnapshotter = "{snapshotter}"\n')
    node.key("rsa.pem", rsa_key)
    # Behind the end of the archive nothing is needed for the files or, uncompressed, shows in them.
    tar = images.tar([Entry(f"f{n}", os.urandom(1_000_000)) for n in range(20)]) + bytes(1024 * 1024)
    made = images.image([images.layer(tar, "plain")])
    registry.push(encrypted(made, wrap_jwe(rsa_key), sealer=last_byte), "use/late")
    assert "authentication failed" in refused(node, "use/late")[1]
    deadline = time.monotonic() + 60  # what is removed is deleted in the background
    while left := [p for p in below(node.daemon.root / "snapshots") if re.fullmatch("f[0-9]+", p.name)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def protected(key: PrivateKey, password: bytes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))


def test_c_e3_refusals_say_what_is_missing_and_show_no_secret(
    make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey, other_key: rsa.RSAPrivateKey
) -> None:
    node = make_node()
    secrets: list[str] = []

    def remember(blob: bytes, media_type: str) -> Sealed:
        sealed = seal(blob, media_type)
        raw = base64.b64decode(sealed.private["symkey"])
        secrets.extend([sealed.private["symkey"], raw.hex(), repr(raw)[2:-1]])
        return sealed

    curve = ec.generate_private_key(ec.SECP256R1())
    wrap: Wrap = lambda o: {**wrap_jwe(rsa_key, curve)(o), "provider_vault": b"opaque"}  # noqa: E731
    made = two_layers(SECRET)
    bad = encrypted(made, wrap, only=[1], sealer=remember)
    registry.push(bad, "use/refused")
    name, layer = "use/refused", json.loads(bad.data)["layers"][1]["digest"]

    code, empty = refused(node, name)
    assert code == DENIED
    for part in (layer, "jwe", "RSA", "provider.vault", "not configured", f"{node.keys} (keys there now: 0"):
        assert part in empty, (part, empty)

    node.key("wrong.pem", other_key)
    (node.keys / "README").write_text("put keys here")
    (node.keys / "locked.pem").write_bytes(protected(rsa_key, b"correct horse"))
    (node.keys / "locked.pem").chmod(0o644)
    code, text = refused(node, name)
    assert code == DENIED
    for part in (layer, "keys there now: 1", "locked.pem", "README"):
        assert part in text, (part, text)

    (node.keys / "locked.pem.password").write_text("correct horse\n")
    assert cri.pull(node.daemon.images(), name) == str(made.config_digest)
    assert "locked.pem has mode 0644" in node.daemon.log
    body = pem(rsa_key).decode().splitlines()[1]
    for secret in (*secrets, body, "correct horse"):
        assert secret not in node.daemon.log + empty + text
    assert all(secret.encode() not in p.read_bytes() for secret in secrets for p in node.daemon.root.rglob("*.mdb"))


def test_decryption_can_be_switched_off(make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey) -> None:
    node = make_node(decrypt='key_model = ""')
    node.key("rsa.pem", rsa_key)
    registry.push(encrypted(two_layers("off"), wrap_jwe(rsa_key)), "use/off")
    code, text = refused(node, "use/off")
    assert (code, "key_model" in text) == (grpc.StatusCode.UNIMPLEMENTED, True), text


def test_the_layers_of_an_image_are_unwrapped_side_by_side(make_node: Callable[..., Node], registry: RealRegistry, tmp_path: Path) -> None:
    """A provider that takes a second per layer must not make six layers take six."""
    script = (
        "import base64, json, sys, time; time.sleep(1); "
        'p = base64.b64decode(json.load(sys.stdin)["keyunwrapparams"]["annotation"]); '
        'print(json.dumps({"keyunwrapresults": {"optsdata": base64.b64encode(p[::-1]).decode()}}))'
    )
    command = {"path": "python3", "args": ["-c", script]}
    (tmp_path / "providers.json").write_text(json.dumps({"key-providers": {"slow": {"cmd": command}}}))
    node = make_node(decrypt=f'keyprovider_config = "{tmp_path / "providers.json"}"')
    six = images.image([images.layer([Entry(f"f{n}", b"x")]) for n in range(6)])
    registry.push(encrypted(six, lambda options: {"provider_slow": options[::-1]}), "use/slow")
    pulled = node.daemon.cli("pull", "--timings", "use/slow")
    assert pulled.returncode == 0, pulled.stderr
    (seconds,) = [float(line.split()[1]) for line in pulled.stdout.splitlines() if line.startswith("unwrap")]
    assert 1 <= seconds < 5


def test_a_thousand_keys_are_no_burden(make_node: Callable[..., Node], registry: RealRegistry, rsa_key: rsa.RSAPrivateKey) -> None:
    node = make_node()
    for number in range(1000):
        node.key(f"{number:04}.pem", ec.generate_private_key(ec.SECP256R1()))
    node.key("zz.pem", rsa_key)
    made: BuiltDocument = two_layers("the last of many")
    registry.push(encrypted(made, wrap_jwe(rsa_key)), "use/thousand")
    assert cri.pull(node.daemon.images(), "use/thousand") == str(made.config_digest)
