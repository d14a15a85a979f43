"""Archives through the real daemon, and the tools that have to read what we write and write what we read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.support import images
from tests.support.daemon import Daemon
from tests.support.images import Compression, Entry
from tests.support.registries import RealRegistry

NAME = "docker.io/library/archived:1"


@pytest.fixture
def pulled(image_daemon: Daemon, registry: RealRegistry) -> str:
    """NAME, pulled. Returns the image ID."""
    made = images.image([images.layer([Entry("a", b"one")]), images.layer([Entry("b", b"two")])], Cmd=["/a"])
    registry.push(made, "library/archived", "1")
    result = image_daemon.cli("pull", NAME)
    assert result.returncode == 0, result.stderr
    return str(made.config_digest)


def exported(daemon: Daemon, *names: str) -> Path:
    target = daemon.directory / "out.tar"
    result = daemon.cli("export", *names, "-o", str(target))
    assert result.returncode == 0, result.stderr
    return target


def imported(daemon: Daemon, file: Path, *options: str) -> list[dict[str, str]]:
    result = daemon.cli("import", str(file), "--json", *options)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, str]] = json.loads(result.stdout)
    return found


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_what_is_exported_can_be_imported_with_name_and_id(image_daemon: Daemon, pulled: str) -> None:
    file = exported(image_daemon, NAME)
    assert image_daemon.cli("rmi", pulled).returncode == 0

    assert imported(image_daemon, file) == [{"reference": NAME, "id": pulled}]
    assert json.loads(image_daemon.cli("images", "--json").stdout)[0]["repoTags"] == [NAME]


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_layers_of_any_size_survive_the_trip(image_daemon: Daemon, registry: RealRegistry, compression: Compression) -> None:
    # Plain layers are whole tar blocks, so that nothing is padded.
    made = images.image([images.layer([Entry(f"f{n}", bytes([n]) * 1000 * n)], compression) for n in range(5)])
    registry.push(made, "library/archived", compression)
    name = f"docker.io/library/archived:{compression}"
    assert image_daemon.cli("pull", name).returncode == 0
    file = exported(image_daemon, name)
    assert image_daemon.cli("rmi", str(made.config_digest)).returncode == 0
    assert image_daemon.cli("gc").returncode == 0

    assert imported(image_daemon, file) == [{"reference": name, "id": str(made.config_digest)}]
    with tarfile.open(file) as archive:
        assert {f"blobs/sha256/{digest.hex}" for digest in made.blobs} < set(archive.getnames())


def test_an_export_of_one_image_under_two_names_and_of_two_images(image_daemon: Daemon, pulled: str, registry: RealRegistry) -> None:
    other = images.image([images.layer([Entry("c", b"three")])])
    registry.push(other, "library/other", "1")
    assert image_daemon.cli("pull", "docker.io/library/other:1").returncode == 0
    assert image_daemon.cli("tag", NAME, "second.example/name:2").returncode == 0

    file = exported(image_daemon, NAME, "second.example/name:2", "docker.io/library/other:1")
    for name in (pulled, str(other.config_digest)):
        assert image_daemon.cli("rmi", name).returncode == 0

    names = {(image["reference"], image["id"]) for image in imported(image_daemon, file)}
    second = ("second.example/name:2", pulled)
    assert names == {(NAME, pulled), second, ("docker.io/library/other:1", str(other.config_digest))}


def test_what_cannot_be_exported_or_imported_leaves_no_file_and_no_image(image_daemon: Daemon) -> None:
    target = image_daemon.directory / "out.tar"

    absent = image_daemon.cli("export", "docker.io/library/absent:1", "-o", str(target))
    assert absent.returncode == 1
    assert "docker.io/library/absent:1" in absent.stderr
    assert list(image_daemon.directory.glob("out.tar*")) == []

    (image_daemon.directory / "nonsense").write_bytes(b"nonsense" * 1000)
    broken = image_daemon.cli("import", str(image_daemon.directory / "nonsense"))
    assert broken.returncode == 1
    assert "nonsense" in broken.stderr
    assert json.loads(image_daemon.cli("images", "--json").stdout) == []


def test_layers_that_were_dropped_after_unpacking_are_fetched_again(make_daemon: Callable[..., Daemon], registry: RealRegistry) -> None:
    made = images.image([images.layer([Entry("a", b"dropped")])])
    registry.push(made, "library/archived", "dropped")
    daemon = make_daemon(settings="[images]\ndiscard_unpacked_layers = true\n")
    daemon.map_host("docker.io", registry.address)
    daemon.start()
    assert daemon.cli("pull", "docker.io/library/archived:dropped").returncode == 0
    assert daemon.cli("gc").returncode == 0
    layer = next(d for d in made.blobs if d != made.config_digest)
    assert not (daemon.root / "content" / "blobs" / "sha256" / layer.hex).exists()

    file = exported(daemon, "docker.io/library/archived:dropped")

    with tarfile.open(file) as archive:
        assert f"blobs/sha256/{layer.hex}" in archive.getnames()


@pytest.mark.parametrize("form", ["gz", "xz", "bz2", "zst", "directory"])
def test_compressed_archives_and_directories_are_read_as_well(image_daemon: Daemon, pulled: str, form: str) -> None:
    plain = exported(image_daemon, NAME)
    assert image_daemon.cli("rmi", pulled).returncode == 0
    file = image_daemon.directory / f"archive.{form}"
    if form == "directory":
        file.mkdir()
        subprocess.run(["tar", "-x", "-f", str(plain), "-C", str(file)], check=True, timeout=60)
    else:
        shut: dict[str, Callable[[bytes], bytes]] = {
            "gz": gzip.compress,
            "xz": lzma.compress,
            "bz2": bz2.compress,
            "zst": zstandard.ZstdCompressor().compress,
        }
        file.write_bytes(shut[form](plain.read_bytes()))

    assert imported(image_daemon, file) == [{"reference": NAME, "id": pulled}]


@pytest.mark.parametrize("spoil", ["cut", "flipped", "empty directory"])
def test_what_cannot_be_read_to_its_end_is_one_line(image_daemon: Daemon, pulled: str, spoil: str) -> None:
    file = image_daemon.directory / "spoiled"
    data = bytearray(gzip.compress(exported(image_daemon, NAME).read_bytes()))
    if spoil == "empty directory":
        file.mkdir()
    else:
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data if spoil == "flipped" else data[: len(data) // 2])
    assert image_daemon.cli("rmi", pulled).returncode == 0

    refused = image_daemon.cli("import", str(file))

    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert str(file) in line
    assert json.loads(image_daemon.cli("images", "--json").stdout) == []


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_skopeo_reads_what_we_write_and_we_what_it_writes(image_daemon: Daemon, pulled: str, registry: RealRegistry, kind: str) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    ours = exported(image_daemon, NAME)
    copied, theirs = image_daemon.directory / "copied", image_daemon.directory / "theirs.tar"
    run("skopeo", "copy", f"{kind}:{ours}", f"dir:{copied}")
    assert (copied / pulled.removeprefix("sha256:")).exists()

    run("skopeo", "copy", "--src-tls-verify=false", f"docker://{registry.address}/library/archived:1", f"{kind}:{theirs}:{NAME}")
    assert image_daemon.cli("rmi", pulled).returncode == 0
    assert imported(image_daemon, theirs) == [{"reference": NAME, "id": pulled}]


@pytest.mark.compat
def test_skopeos_archive_without_a_name_needs_one(image_daemon: Daemon, pulled: str, registry: RealRegistry) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    theirs = image_daemon.directory / "theirs.tar"
    run("skopeo", "copy", "--src-tls-verify=false", f"docker://{registry.address}/library/archived:1", f"oci-archive:{theirs}:v7")

    refused = image_daemon.cli("import", str(theirs))
    assert refused.returncode == 1
    assert "--name" in refused.stderr
    assert imported(image_daemon, theirs, "--name", "local.example/app") == [{"reference": "local.example/app:v7", "id": pulled}]


@pytest.mark.compat
@pytest.mark.root
def test_podman_loads_what_we_write_and_we_what_it_saves(image_daemon: Daemon, pulled: str) -> None:
    if not shutil.which("podman"):
        pytest.skip("podman is not installed")
    place = image_daemon.directory
    podman = ("podman", "--root", f"{place}/podman", "--runroot", f"{place}/podman-run", "--storage-driver", "vfs")
    ours = exported(image_daemon, NAME)
    run(*podman, "load", "-i", str(ours))
    found = json.loads(run(*podman, "image", "inspect", NAME))
    assert found[0]["Id"] == pulled.removeprefix("sha256:")

    assert image_daemon.cli("rmi", pulled).returncode == 0
    for kind in ("docker-archive", "oci-archive"):
        theirs = place / f"{kind}.tar"
        run(*podman, "save", "--format", kind, "-o", str(theirs), NAME)
        # Podman packs layers anew, so that only the config's digest can be the same, and in its own format is.
        assert imported(image_daemon, theirs) == [{"reference": NAME, "id": pulled}]
