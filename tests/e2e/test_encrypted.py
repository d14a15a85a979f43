"""Encrypted images through the daemon: what skopeo, tokens, key providers and stream processors bring is pulled and runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from imgsvc.api import cri_pb2
from imgsvc.base.oci import MIB
from tests.decrypt.foreign import Foreign
from tests.decrypt.providers import COMMAND, Server, reverse
from tests.decrypt.softhsm import PIN, make_token, uri
from tests.decrypt.vectors import GZIP, TAR, pkcs11
from tests.e2e.conftest import Node
from tests.fakes.registry import FakeRegistry
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon, below
from tests.support.encrypted import encrypted, wrap_jwe
from tests.support.images import BuiltDocument, Compression, Entry
from tests.support.registries import RealRegistry

PACKAGE_ROOT = str(Path(__file__).parents[2])
KEY_FILES = {"jwe-rsa": "rsa.pem", "jwe-ec": "ec.pem", "pkcs7": "rsa.pem", "pgp": "pgp.key"}
COMPRESSIONS: Sequence[Compression] = ("plain", "gzip", "zstd")


def two_layers(text: str, compression: Compression = "gzip") -> BuiltDocument:
    base = images.layer([Entry("etc", kind="dir"), Entry("etc/base", b"base " * 100_000)], compression)
    return images.image([base, images.layer([Entry("etc/text", text.encode())], compression)], Cmd=["none"])


def unpacked(daemon: Daemon) -> list[str]:
    """Contents of every unpacked etc/text; what is in the trash is removed already."""
    found = (p for p in below(daemon.root / "snapshots") if p.parts[-2:] == ("etc", "text") and "trash" not in p.parts)
    return sorted(p.read_text() for p in found)


def diff_ids(document: BuiltDocument) -> list[str]:
    return list(json.loads(document.blobs[document.config_digest])["rootfs"]["diff_ids"])


def schemes(node: Node, name: str) -> list[list[str]]:
    """Per layer, for which schemes `imgsvc inspect` says it is encrypted."""
    layers = node.inspect(name)["layers"]
    assert all(layer["encrypted"] == bool(layer["recipients"]) for layer in layers)
    return [sorted({r["scheme"] for r in layer["recipients"]}) for layer in layers]


def run_to_its_end(node: Node, image: str, script: str) -> list[str]:
    """Run a shell script in a container of an image. Returns its lines."""
    runtime = node.daemon.runtime()
    pod = cri.pod_config(node.daemon)
    sandbox = cri.run_pod(runtime, pod)
    container = cri.create(runtime, sandbox, cri.container_config(image, ["sh", "-c", script]), pod)
    cri.start(runtime, container)
    ended = cri.wait_for_exit(runtime, container)
    assert ended.exit_code == 0
    return [line.text for line in cri.read_log(Path(ended.log_path))]


@pytest.mark.compat
@pytest.mark.parametrize("scheme", [*KEY_FILES, "together"])
def test_what_skopeo_encrypts_is_pulled_with_the_right_files(
    make_node: Callable[..., Node], outside: Foreign, registry: RealRegistry, scheme: str, tmp_path: Path
) -> None:
    node = make_node()
    wanted = list(KEY_FILES) if scheme == "together" else [scheme]
    recipients = [recipient for name in wanted for recipient in outside.recipients()[name]]
    # Of many recipients one is enough.
    shutil.copy(outside.keys / KEY_FILES[wanted[-1]], node.keys / "the-key")
    for compression in COMPRESSIONS:
        made = two_layers(f"{scheme} {compression}", compression)
        images.write_layout(made, tmp_path / compression, "t")
        outside.encrypt_layout(tmp_path / compression, tmp_path / f"{compression}-encrypted", recipients)
        name = f"encrypted/{scheme}-{compression}"
        outside.push(tmp_path / f"{compression}-encrypted", f"{registry.address}/{name}:latest")
        assert cri.pull(node.daemon.images(), name)
        assert [layer["diffID"] for layer in node.inspect(name)["layers"]] == diff_ids(made)
        assert schemes(node, name) == [sorted({n.partition("-")[0] for n in wanted})] * 2
    assert unpacked(node.daemon) == sorted(f"{scheme} {compression}" for compression in COMPRESSIONS)


@pytest.mark.root
@pytest.mark.compat
def test_an_encrypted_image_of_skopeo_runs(
    make_node: Callable[..., Node], outside: Foreign, registry: RealRegistry, tmp_path: Path
) -> None:
    node = make_node(network=True)
    shutil.copy(outside.keys / "ec.pem", node.keys)
    images.write_layout(images.busybox(images.layer([Entry("secret", b"for ec.pem only\n")])), tmp_path / "plain", "t")
    outside.encrypt_layout(tmp_path / "plain", tmp_path / "sealed", outside.recipients()["jwe-ec"])
    outside.push(tmp_path / "sealed", f"{registry.address}/encrypted/runs:latest")
    cri.pull(node.daemon.images(), "encrypted/runs")
    assert run_to_its_end(node, "encrypted/runs", "cat /secret") == ["for ec.pem only"]


@pytest.mark.compat
def test_one_layer_may_be_plain_and_another_encrypted(
    make_node: Callable[..., Node], outside: Foreign, registry: RealRegistry, tmp_path: Path
) -> None:
    node = make_node()
    shutil.copy(outside.keys / "rsa.pem", node.keys)
    made = two_layers("mixed")
    images.write_layout(made, tmp_path / "plain", "t")
    for layer, shown in ((0, [["jwe"], []]), (1, [[], ["jwe"]])):
        target, name = tmp_path / f"sealed-{layer}", f"encrypted/mixed-{layer}"
        outside.encrypt_layout(tmp_path / "plain", target, outside.recipients()["jwe-rsa"], "--encrypt-layer", str(layer))
        outside.push(target, f"{registry.address}/{name}:latest")
        cri.pull(node.daemon.images(), name)
        assert schemes(node, name) == shown
        status = node.daemon.images().ImageStatus(
            cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=name), verbose=True), timeout=RPC_TIMEOUT
        )
        verbose = json.loads(status.info["info"])["layers"]
        assert [[r["scheme"] for r in entry["recipients"]] for entry in verbose] == shown
        assert verbose[layer]["recipients"] == [{"scheme": "jwe", "name": verbose[layer]["recipients"][0]["name"]}]
        assert verbose[layer]["recipients"][0]["name"]
    assert unpacked(node.daemon) == ["mixed", "mixed"]


@pytest.mark.compat
def test_a_token_opens_an_image(
    make_node: Callable[..., Node], registry: RealRegistry, tmp_path_factory: pytest.TempPathFactory, rsa_key: rsa.RSAPrivateKey
) -> None:
    env = make_token(tmp_path_factory.mktemp("hsm"), {"first": rsa_key})
    node = make_node()
    made = two_layers("from a token")
    registry.push(encrypted(made, lambda options: {"pkcs11": pkcs11(options, rsa_key.public_key(), "sha1")}), "encrypted/token")
    code, text = cri.refusal(lambda: cri.pull(node.daemon.images(), "encrypted/token"))
    assert (code, "pkcs11" in text) == (grpc.StatusCode.PERMISSION_DENIED, True), text
    (node.keys / "token.yaml").write_text(json.dumps({"pkcs11": {"uri": uri()}, "module": {"env": env}}))
    assert cri.pull(node.daemon.images(), "encrypted/token") == str(made.config_digest)
    assert unpacked(node.daemon) == ["from a token"]
    assert PIN not in node.daemon.log


@pytest.fixture
def provider() -> Iterator[Server]:
    server = Server(reverse)
    yield server
    server.stop()


def for_provider(options: bytes) -> dict[str, bytes]:
    return {"provider_test": options[::-1]}


def test_a_key_provider_command_opens_an_image(make_node: Callable[..., Node], registry: RealRegistry, tmp_path: Path) -> None:
    config, parameter, seen = (tmp_path / name for name in ("providers.json", "parameter", "seen"))
    command = {"path": sys.executable, "args": ["-c", COMMAND, str(seen)]}
    config.write_text(json.dumps({"key-providers": {"test": {"cmd": command}}}))
    parameter.write_text("account 7")
    settings = f'keyprovider_config = "{config}"\n[decrypt.provider_parameters]\ntest = "{parameter}"'
    node = make_node(decrypt=settings)
    made = two_layers("from a command")
    registry.push(encrypted(made, for_provider), "encrypted/command")
    assert cri.pull(node.daemon.images(), "encrypted/command") == str(made.config_digest)
    assert unpacked(node.daemon) == ["from a command"]
    assert json.loads(seen.read_text())["keyunwrapparams"]["dc"] == {"Parameters": {"test": ["YWNjb3VudCA3"]}}
    assert "account 7" not in node.daemon.cli("config", "dump", "--running").stdout + node.daemon.log


def test_a_key_provider_service_opens_an_image(
    make_node: Callable[..., Node], registry: RealRegistry, tmp_path: Path, provider: Server
) -> None:
    (tmp_path / "providers.json").write_text(json.dumps({"key-providers": {"test": {"grpc": provider.address}}}))
    node = make_node(decrypt=f'keyprovider_config = "{tmp_path / "providers.json"}"')
    made = two_layers("from a service")
    registry.push(encrypted(made, for_provider), "encrypted/service")
    assert cri.pull(node.daemon.images(), "encrypted/service") == str(made.config_digest)
    assert unpacked(node.daemon) == ["from a service"]
    assert len(provider.requests) == 2  # one per layer


def processors(keys: Path, packs: Sequence[str] = ("", "+gzip", "+zstd")) -> str:
    """[stream_processors] with our ctd-decoder for each layer type."""
    arguments = ["-m", "imgsvc.decrypt.ctd_decoder", "--decryption-keys-path", str(keys)]
    return "".join(
        f'[stream_processors."io.containerd.ocicrypt.decoder.v1.tar{pack.replace("+", ".")}"]\n'
        f'accepts = ["{TAR}{pack}+encrypted"]\nreturns = "{TAR}{pack}"\npath = "{sys.executable}"\n'
        f'args = {json.dumps(arguments)}\nenv = ["PYTHONPATH={PACKAGE_ROOT}"]\n'
        for pack in packs
    )


def test_stream_processors_decrypt_with_our_decoder(
    make_node: Callable[..., Node], registry: RealRegistry, tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    decoder_keys = tmp_path / "decoder-keys"
    decoder_keys.mkdir()
    node = make_node(settings=processors(decoder_keys))
    made = {compression: two_layers(f"piped {compression}", compression) for compression in COMPRESSIONS}
    for compression, document in made.items():
        registry.push(encrypted(document, wrap_jwe(rsa_key)), f"encrypted/piped-{compression}")
    node.key("unused.pem", rsa_key)  # the keys are the processor's business
    before = node.snapshots()
    code, text = cri.refusal(lambda: cri.pull(node.daemon.images(), "encrypted/piped-gzip"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "no key of this node opens it" in text  # from the decoder's stderr
    assert node.snapshots() == before
    shutil.copy(node.keys / "unused.pem", decoder_keys)
    for compression, document in made.items():
        assert cri.pull(node.daemon.images(), f"encrypted/piped-{compression}") == str(document.config_digest)
    assert unpacked(node.daemon) == sorted(f"piped {compression}" for compression in COMPRESSIONS)

    (decoder_keys / "unused.pem").unlink()
    assert cri.refusal(lambda: cri.pull(node.daemon.images(), "encrypted/piped-zstd"))[0] == grpc.StatusCode.FAILED_PRECONDITION


def test_processors_work_while_the_layer_comes_in(make_node: Callable[..., Node], tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    keys, seen = tmp_path / "decoder-keys", tmp_path / "seen"
    keys.mkdir()
    decoder = f"tee {seen} | exec {sys.executable} -m imgsvc.decrypt.ctd_decoder --decryption-keys-path {keys}"
    node = make_node(
        settings=f'[stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]\naccepts = ["{GZIP}+encrypted"]\nreturns = "{GZIP}"\n'
        f'path = "sh"\nargs = {json.dumps(["-c", decoder])}\nenv = ["PYTHONPATH={PACKAGE_ROOT}"]\n'
    )
    node.key("k", rsa_key).rename(keys / "k")
    made = encrypted(images.image([images.layer([Entry("big", os.urandom(8 * MIB))])]), wrap_jwe(rsa_key))
    with FakeRegistry(rate=2 * MIB) as slow, ThreadPoolExecutor(1) as caller:
        slow.add(made, "slow")
        node.daemon.map_host("slow.example", slow.address)
        pull = caller.submit(cri.pull, node.daemon.images(), "slow.example/slow")
        while not (seen.exists() and seen.stat().st_size) and not pull.done():
            time.sleep(0.01)
        assert slow.sent < 7 * MIB
        assert pull.result() == str(made.config_digest)
    assert seen.stat().st_size > 8 * MIB


def test_a_chain_of_processors_may_end_in_the_built_in_stages(
    make_node: Callable[..., Node], registry: RealRegistry, tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    keys = tmp_path / "decoder-keys"
    keys.mkdir()
    inflate = f'[stream_processors."inflate"]\naccepts = ["{GZIP}"]\nreturns = "{TAR}"\npath = "gzip"\nargs = ["-dc"]\n'
    node = make_node(settings=processors(keys, ("+gzip",)) + inflate)
    node.key("k", rsa_key).rename(keys / "k")
    made = two_layers("through two programs")
    registry.push(encrypted(made, wrap_jwe(rsa_key)), "encrypted/chain")
    assert cri.pull(node.daemon.images(), "encrypted/chain") == str(made.config_digest)
    assert unpacked(node.daemon) == ["through two programs"]


@pytest.mark.parametrize(
    "table, problem",
    [
        (f'[stream_processors."loop"]\naccepts = ["{GZIP}"]\nreturns = "{GZIP}"\npath = "cat"\n', "never ends"),
        (f'[stream_processors."nowhere"]\naccepts = ["{GZIP}+encrypted"]\nreturns = "x/y"\npath = "cat"\n', "cannot be unpacked"),
        (f'[stream_processors."pathless"]\naccepts = ["{GZIP}"]\nreturns = "{TAR}"\n', "path is missing"),
    ],
)
def test_processors_that_cannot_work_are_refused_where_the_configuration_is_read(
    make_daemon: Callable[..., Daemon], table: str, problem: str
) -> None:
    daemon = make_daemon(settings=table)
    line = daemon.config.read_text().splitlines().index(table.splitlines()[0]) + 1
    checked = daemon.cli("config", "check", str(daemon.config))
    assert checked.returncode == 1
    assert problem in checked.stderr
    assert f"{daemon.config}:{line}" in checked.stderr
    with pytest.raises(AssertionError, match="the daemon ended with 1"):
        daemon.start()
    daemon.process = None
    assert problem in daemon.log
    assert "Traceback" not in daemon.log


def test_a_bad_table_changes_nothing_on_reload(image_daemon: Daemon, registry: RealRegistry) -> None:
    config = image_daemon.config
    config.write_text(config.read_text() + f'[stream_processors."loop"]\naccepts = ["{GZIP}"]\nreturns = "{GZIP}"\npath = "cat"\n')
    os.kill(image_daemon.pid, signal.SIGHUP)
    deadline = time.monotonic() + 60
    while "configuration not reloaded" not in image_daemon.log:
        assert time.monotonic() < deadline, image_daemon.log
        time.sleep(0.05)
    registry.push(two_layers("plain"), "encrypted/plain")
    assert cri.pull(image_daemon.images(), "encrypted/plain")


def test_key_providers_that_are_badly_configured_hide_no_key(
    make_node: Callable[..., Node], registry: RealRegistry, tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    (tmp_path / "providers.json").write_text('{"key-providers": {"test": {}}}')
    node = make_node(decrypt=f'keyprovider_config = "{tmp_path / "providers.json"}"')
    node.key("rsa.pem", rsa_key)
    assert "key providers are off" in node.daemon.log
    checked = node.daemon.cli("config", "check", str(node.daemon.config))
    assert (checked.returncode, "providers.json" in checked.stderr) == (1, True)
    made = two_layers("both")
    registry.push(encrypted(made, lambda o: {**for_provider(o), **wrap_jwe(rsa_key)(o)}), "encrypted/both")
    assert cri.pull(node.daemon.images(), "encrypted/both") == str(made.config_digest)
