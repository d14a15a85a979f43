"""C-E5: the same images through every path of a real daemon; the policy holds on all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from imgsvc.api import cri_pb2
from tests.fakes.registry import FakeRegistry, Reply
from tests.images.verification.signing import Signer, tag_for
from tests.support import cri, images
from tests.support.daemon import Daemon
from tests.support.images import BuiltDocument
from tests.support.registries import RealRegistry, free_port

REFUSED = "SignatureValidationFailed"


@dataclass(slots=True)
class Node:
    """A daemon with a policy: what is in docker.io/signed needs a signature, everything else is allowed."""

    daemon: Daemon
    registry: RealRegistry
    signer: Signer
    policy: Path
    mirror: int

    def push(self, name: str, *, signed: bool = False, by: Signer | None = None) -> BuiltDocument:
        made = images.busybox(Labels={"name": name})
        self.registry.push(made, f"signed/{name}", "1")
        if signed:
            self.registry.push(
                (by or self.signer).signature(made.digest, f"docker.io/signed/{name}"), f"signed/{name}", tag_for(made.digest, "sig")
            )
        return made

    def deny(self) -> None:
        """Change the policy under the running daemon."""
        self.policy.write_text('version = 1\ndefault = "deny"\n')


@pytest.fixture
def node(make_daemon: Callable[..., Daemon], registry: RealRegistry, tmp_path: Path) -> Node:
    signer, policy, mirror = Signer(), tmp_path / "policy.toml", free_port()
    (tmp_path / "k.pub").write_bytes(signer.pem)
    policy.write_text('version = 1\ndefault = "allow"\n[[rule]]\nprefix = "docker.io/signed"\ndecision = "signed"\nkeys = ["k.pub"]\n')
    (tmp_path / "prepull.d").mkdir()
    daemon = make_daemon(
        network=False,
        settings=(
            f'[verify]\npolicy = "{policy}"\nbin_dir = "{tmp_path}/bin"\n[mirror]\naddress = "127.0.0.1:{mirror}"\n'
            f'[prepull]\ndirectory = "{tmp_path}/prepull.d"\n'
        ),
    )
    # Its own upstream: whoever answers "no such signature" has the last word.
    hosts = daemon.directory / "hosts.d" / "docker.io"
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "http://{registry.address}"\n')
    daemon.start()
    return Node(daemon, registry, signer, policy, mirror)


def here(node: Node) -> list[str]:
    return [name for image in json.loads(node.daemon.cli("images", "--json").stdout) for name in image["repoTags"]]


@pytest.mark.parametrize("kind", ["unsigned", "wrongly signed"])
def test_c_e5_pull_through_cri_and_the_command_line(node: Node, kind: str) -> None:
    node.push("bad", signed=kind == "wrongly signed", by=Signer())
    node.push("good", signed=True)

    with pytest.raises(grpc.RpcError) as refused:
        cri.pull(node.daemon.images(), "docker.io/signed/bad:1")
    assert refused.value.code() is grpc.StatusCode.UNKNOWN, "the kubelet looks for the reason only then"
    assert (refused.value.details() or "").startswith(REFUSED)
    assert node.daemon.cli("pull", "docker.io/signed/bad:1").returncode == 1
    assert node.daemon.cli("prepull", "docker.io/signed/bad:1", "--retries", "0").returncode == 1

    cri.pull(node.daemon.images(), "docker.io/signed/good:1")
    assert here(node) == ["docker.io/signed/good:1"]


def test_c_e5_a_tag_that_moves_to_an_unsigned_image_and_a_signature_that_is_stripped(node: Node) -> None:
    good = node.push("app", signed=True)
    cri.pull(node.daemon.images(), "docker.io/signed/app:1")

    moved = images.busybox(Labels={"moved": "yes"})
    node.registry.push(moved, "signed/app", "1")
    assert REFUSED in node.daemon.cli("pull", "docker.io/signed/app:1").stderr
    image = cri.image_status(node.daemon.images(), "docker.io/signed/app:1")
    assert image is not None
    assert image.id == str(good.config_digest), "the tag still stands for the image that was signed"

    stripped = node.push("stripped", signed=True)
    empty = images.image([])
    node.registry.push(empty, "signed/stripped", tag_for(stripped.digest, "sig"))
    assert REFUSED in node.daemon.cli("pull", "docker.io/signed/stripped:1").stderr


def test_c_e5_import(node: Node) -> None:
    node.push("bad")
    node.registry.push(images.busybox(Labels={"name": "bad"}), "open/bad", "1")
    archive = node.daemon.directory / "bad.tar"
    assert node.daemon.cli("pull", "docker.io/open/bad:1").returncode == 0
    assert node.daemon.cli("tag", "docker.io/open/bad:1", "docker.io/signed/bad:1").returncode == 0
    assert node.daemon.cli("export", "docker.io/signed/bad:1", "-o", str(archive)).returncode == 0
    node.daemon.cli("rmi", str(images.busybox(Labels={"name": "bad"}).config_digest))

    result = node.daemon.cli("import", str(archive))

    assert result.returncode == 1
    assert REFUSED in result.stderr
    assert here(node) == []


def test_c_e5_the_daemons_own_pre_pull(node: Node, tmp_path: Path) -> None:
    node.push("bad")
    node.push("good", signed=True)
    text = "".join(f'[[image]]\nreference = "docker.io/signed/{name}:1"\n' for name in ("bad", "good"))
    (tmp_path / "prepull.d" / "a.toml").write_text(f"version = 1\n{text}")

    deadline = time.monotonic() + 30
    while True:
        status = json.loads(node.daemon.cli("prepull", "--status", "--json").stdout)
        states = {i["reference"]: i for f in status["files"] for i in f["images"]}
        if states and all(i["state"] in ("present", "failed") for i in states.values()):
            break
        assert time.monotonic() < deadline, status
        time.sleep(0.2)

    assert states["docker.io/signed/good:1"]["state"] == "present"
    assert "is refused" in states["docker.io/signed/bad:1"]["error"]
    assert here(node) == ["docker.io/signed/good:1"]


def test_c_e5_the_mirror_hands_on_nothing_that_the_policy_has_come_to_refuse(node: Node) -> None:
    node.push("good", signed=True)
    assert node.daemon.cli("pull", "docker.io/signed/good:1").returncode == 0
    url = f"http://127.0.0.1:{node.mirror}/v2/signed/good/manifests/1?ns=docker.io"
    assert httpx.get(url, trust_env=False).status_code == 200

    node.deny()

    assert httpx.get(url, trust_env=False).status_code == 403


@pytest.mark.root
def test_c_e5_a_container_from_an_image_that_is_here_already(daemon: Daemon, registry: RealRegistry, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('version = 1\ndefault = "allow"\n')
    registry.push(images.busybox(), "library/busybox")
    daemon.stop()
    with daemon.config.open("a") as stream:
        stream.write(f'\n[verify]\npolicy = "{policy}"\n')
    daemon.start()
    image, pod = "docker.io/library/busybox:latest", cri.pod_config(daemon)
    cri.pull(daemon.images(), image)
    runtime = daemon.runtime()
    sandbox = cri.run_pod(runtime, pod)
    first = cri.create(runtime, sandbox, cri.container_config(image, ["true"], "first"), pod)
    assert first

    policy.write_text('version = 1\ndefault = "deny"\n')

    with pytest.raises(grpc.RpcError) as refused:
        cri.create(runtime, sandbox, cri.container_config(image, ["true"], "second"), pod)
    assert REFUSED in (refused.value.details() or "")
    volume = cri.container_config("docker.io/library/busybox:latest", ["true"], "third")
    volume.mounts.append(cri_pb2.Mount(container_path="/v", image=cri_pb2.ImageSpec(image=image), readonly=True))
    with pytest.raises(grpc.RpcError):
        cri.create(runtime, sandbox, volume, pod)


def test_c_e5_signatures_that_cannot_be_looked_up_refuse_with_the_registrys_words(node: Node) -> None:
    made = images.busybox(Labels={"name": "dark"})
    with FakeRegistry() as registry:
        registry.add(made, "signed/dark", "1")
        registry.rule(registry.on(tag_for(made.digest, "sig"), Reply(503, body=b"down for the night")))
        hosts = node.daemon.directory / "hosts.d" / "docker.io" / "hosts.toml"
        hosts.write_text(f'server = "http://{registry.address}"\n')

        code, text = cri.refusal(lambda: cri.pull(node.daemon.images(), "docker.io/signed/dark:1"))

    assert text.startswith(f"{REFUSED}: docker.io/signed/dark:1 ({made.digest}) is refused")
    assert "answered 503" in text
    assert code is grpc.StatusCode.UNKNOWN
    assert registry.seen("/blobs/") == []
    assert here(node) == []
