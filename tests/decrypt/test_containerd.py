"""Debian's containerd pulls an encrypted image with our ctd-decoder as its stream processor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2
from imgsvc.api.cri_pb2_grpc import ImageServiceStub
from tests.decrypt.foreign import LAYER, Foreign
from tests.support.registries import RealRegistry

pytestmark = [pytest.mark.root, pytest.mark.compat]
PACKAGE_ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Containerd:
    """A private containerd. keys: the directory its decoder is given."""

    address: str
    keys: Path

    def pull(self, reference: str) -> str:
        with grpc.insecure_channel(self.address) as channel:
            image = cri_pb2.ImageSpec(image=reference)
            return ImageServiceStub(channel).PullImage(cri_pb2.PullImageRequest(image=image), timeout=180).image_ref


@contextmanager
def running(directory: Path, program: str) -> Iterator[Containerd]:
    keys, socket = directory / "keys", directory / "s.sock"
    keys.mkdir()
    decoder = ["-m", "imgsvc.decrypt.ctd_decoder", "--decryption-keys-path", str(keys)]
    lines = [
        "version = 2",
        f'root = "{directory}/root"\nstate = "{directory}/state"\n[grpc]\naddress = "{socket}"',
        f'[ttrpc]\naddress = "{socket}.ttrpc"',
        '[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "native"',
        '[plugins."io.containerd.grpc.v1.cri".image_decryption]\nkey_model = "node"',
        f'[plugins."io.containerd.internal.v1.opt"]\npath = "{directory}/opt"',
    ]
    for name, pack in (("tar", ""), ("tar.gzip", "+gzip")):
        lines += [
            f'[stream_processors."io.containerd.ocicrypt.decoder.v1.{name}"]',
            f'accepts = ["{LAYER}{pack}+encrypted"]\nreturns = "{LAYER}{pack}"\npath = "{sys.executable}"',
            f"args = {json.dumps(decoder)}\nenv = {json.dumps([f'PYTHONPATH={PACKAGE_ROOT}'])}",
        ]
    (directory / "config.toml").write_text("\n".join(lines))
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen([program, "--config", f"{directory}/config.toml"], stdout=log, stderr=log) as process,
    ):
        try:
            _wait_until_up(f"unix://{socket}", process)
            yield Containerd(f"unix://{socket}", keys)
        finally:
            process.terminate()


def _wait_until_up(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with grpc.insecure_channel(address) as channel:
                ImageServiceStub(channel).ListImages(cri_pb2.ListImagesRequest(), timeout=2)
                return
        except grpc.RpcError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[Containerd]:
    program = shutil.which("containerd")
    if program is None:
        pytest.skip("containerd is not installed")
    with running(tmp_path, program) as started:
        yield started


@pytest.mark.parametrize("scheme, key", [("jwe-ec", "ec.pem"), ("pkcs7", "rsa.pem"), ("pgp", "pgp.key")])
def test_containerd_pulls_with_our_decoder(containerd: Containerd, outside: Foreign, registry: RealRegistry, scheme: str, key: str) -> None:
    image = outside.encrypt(f"{scheme}+gzip", "+gzip", outside.recipients()[scheme])
    reference = f"{registry.address}/encrypted/{scheme}:t"
    outside.push(image.layout, reference)

    # containerd checks the diff ID of what the decoder printed.
    with pytest.raises(grpc.RpcError) as refused:
        containerd.pull(reference)
    assert "no key of this node opens it" in (refused.value.details() or "")
    shutil.copy(outside.keys / key, containerd.keys / "key")
    assert containerd.pull(reference).startswith("sha256:")
