"""The parts tests stand on, shown to work without any code of the daemon."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from imgsvc.base.oci import Index, Manifest, Platform, parse_document
from tests.support import images
from tests.support.images import Compression, Entry
from tests.support.registries import RealRegistry, ScriptedRegistry


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("docker", [False, True])
def test_a_built_image_is_one_our_parser_accepts(compression: Compression, docker: bool) -> None:
    made = images.image([images.layer([Entry("a", b"1")], compression, docker=docker)], docker=docker, Cmd=["x"], User="me")
    manifest = parse_document(made.data, made.media_type, "test")
    assert isinstance(manifest, Manifest)
    config = manifest.read_config(made.blobs[manifest.config.digest], "test")
    assert config
    assert (config.cmd, config.user, len(config.diff_ids)) == (("x",), "me", 1)


def test_an_index_offers_its_platforms() -> None:
    arm, amd = (images.image([], platform=p) for p in ("linux/arm64", "linux/amd64"))
    made = images.index({"linux/arm64": arm, "linux/amd64": amd})
    index = parse_document(made.data, made.media_type, "test")
    assert isinstance(index, Index)
    assert [entry.digest for entry in index.candidates(Platform.parse("linux/arm64"))] == [arm.digest]


@pytest.mark.compat
def test_skopeo_copies_a_layout_into_the_registry(registry: RealRegistry, tmp_path: Path) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    made = images.busybox(images.layer([Entry("hello", b"there")], "zstd"))
    images.write_layout(made, tmp_path / "layout")
    target = f"docker://{registry.address}/support/skopeo:1"
    command = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{tmp_path}/layout:latest", target]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    fetched = httpx.get(f"{registry.url}/v2/support/skopeo/manifests/1", headers={"Accept": made.media_type})
    assert fetched.content == made.data


def test_push_gives_the_registry_every_blob(registry: RealRegistry) -> None:
    made = images.index({"linux/amd64": images.image([images.layer([Entry("a", b"1")])])})
    digest = registry.push(made, "support/pushed")
    assert httpx.get(f"{registry.url}/v2/support/pushed/manifests/{digest}", headers={"Accept": made.media_type}).content == made.data
    for blob in made.children[0].blobs:
        assert httpx.head(f"{registry.url}/v2/support/pushed/blobs/{blob}").status_code == 200


def test_a_scripted_registry_lies_as_told(scripted: ScriptedRegistry) -> None:
    made = images.image([images.layer([Entry("a", b"1")])])
    victim = next(iter(made.blobs))
    scripted.serve(made, "lies", instead={victim: b"other"})
    assert httpx.get(f"http://{scripted.address}/v2/lies/blobs/{victim}").content == b"other"
    assert httpx.get(f"http://{scripted.address}/v2/lies/blobs/sha256:00").status_code == 404
