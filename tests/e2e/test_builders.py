"""Images that other tools build come out of PullImage as GNU tar lays their layers down, with both snapshotters.

By hand, for images of any size: `python -m tests.e2e.test_builders OCI-LAYOUT:TAG…` compares those.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
import zstandard

from imgsvc.api import cri_pb2
from tests.e2e.attack import HANDLERS, SETTINGS, Node, Outcome
from tests.snapshot.layers import padded
from tests.snapshot.trees import Reference, read_tree
from tests.support.daemon import Daemon, new_daemon
from tests.support.registries import RealRegistry, real_registry

pytestmark = pytest.mark.root

UNLIMITED = SETTINGS.partition("[images.limits]")[0]
PATIENCE = 600.0  # [seconds] for one pull of an image of any size


def run(*command: str | Path, **environment: str) -> str:
    """Raises: AssertionError with what the program said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def layers_of(layout: Path, tag: str) -> list[bytes]:
    """The layers of an image in an OCI layout as tar streams, base layer first."""

    def blob(descriptor: dict[str, str]) -> bytes:
        return (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()

    index = json.loads((layout / "index.json").read_bytes())
    (found,) = [d for d in index["manifests"] if d.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag]
    return [padded(_inflated(blob(layer))) for layer in json.loads(blob(found))["layers"]]  # GNU tar wants whole blocks


def _inflated(data: bytes) -> bytes:
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def compare(node: Node, layout: Path, tag: str, scratch: Path, ways: Sequence[str] = tuple(HANDLERS)) -> int:
    """Through skopeo, a registry and PullImage. Returns: number of files."""
    repository = f"built/{tag}"
    target = f"docker://{node.registry.address}/{repository}:latest"
    run("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{layout}:{tag}", target)
    reference = Reference(scratch / f"reference-{tag}")
    for layer in layers_of(layout, tag):
        reference.apply(layer)
    unowned = frozenset(reference.unowned_times)
    expected = read_tree(reference.root, unowned_times=unowned)
    name = f"docker.io/{repository}:latest"
    for way in ways:
        spec = cri_pb2.ImageSpec(image=name, runtime_handler=HANDLERS[way])
        began = time.monotonic()
        node.daemon.images().PullImage(cri_pb2.PullImageRequest(image=spec), timeout=PATIENCE)
        took = time.monotonic() - began
        with node.shown(Outcome(way, name, grpc.StatusCode.OK, "")) as root:
            found = read_tree(root, unowned_times=unowned)
        assert found.keys() == expected.keys(), (way, sorted(found.keys() ^ expected.keys())[:10])
        different = [(path, expected[path], found[path]) for path in expected if found[path] != expected[path]]
        assert not different, (way, different[:10])
        print(f"{tag}, {way}: {len(expected)} files are the same, pulled in {took:.1f} s", flush=True)
    return len(expected)


def make(root: Path) -> None:
    """A tree with something of everything."""
    names = ["plain", "with space", "new\nline", "früh", os.fsdecode(b"latin-\xe9"), "n" * 255, "-dash", "back\\slash", ".hidden"]
    for number, name in enumerate(names):
        directory = root / f"d{number}" / name
        directory.mkdir(parents=True)
        (directory / name).write_bytes(os.urandom(100 * number))
        os.utime(directory / name, ns=(10**18 + number, 10**18 + number * 1_000_001))
    for path in ("etc", "usr/lib", "var/cache", "opt/old/deep"):
        (root / path).mkdir(parents=True)
    for path in ("etc/passwd", "etc/gone", "usr/lib/libc", "var/cache/a", "var/cache/b", "opt/old/deep/f", "opt/file"):
        (root / path).write_bytes(path.encode() * 50)
    (root / "lib").symlink_to("usr/lib")
    (root / "dangling").symlink_to("/nowhere")
    os.link(root / "usr/lib/libc", root / "usr/lib/libc-link")
    os.link(root / "usr/lib/libc", root / "opt/libc-too")
    (root / "etc/passwd").chmod(0o4711)
    os.chown(root / "etc", 70_000, 3_000_000)
    (root / "etc").chmod(0o2750)
    (root / "var/cache").chmod(0o1777)
    os.mkfifo(root / "pipe")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    os.setxattr(root / "usr/lib/libc", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    os.setxattr(root / "var/cache", "user.note", b"\0binary\xff")
    with (root / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 20)
        sparse.seek(500_000)
        sparse.write(b"in the middle")


def change(root: Path) -> None:
    """What a next layer does to it."""
    (root / "d0").rename(root / "renamed")
    (root / "etc/gone").unlink()
    shutil.rmtree(root / "var/cache")
    (root / "var/cache").mkdir()
    (root / "var/cache/new").write_bytes(b"new")
    shutil.rmtree(root / "opt/old")
    (root / "opt/old").write_bytes(b"a file now")
    (root / "opt/file").unlink()
    (root / "opt/file").mkdir(0o700)
    (root / "opt/file/inside").touch()
    os.link(root / "usr/lib/libc", root / "etc/libc-below")
    (root / "d1").chmod(0o500)
    shutil.rmtree(root / "d2")
    (root / "d2").symlink_to("usr/lib")
    (root / "pipe").unlink()
    (root / "pipe").write_bytes(b"no pipe")
    with (root / "usr/lib/new").open("wb") as file:
        file.write(os.urandom(100_000))


def by_umoci(place: Path) -> Path:
    """Four layers: two trees, a whiteout by hand, an opaque directory by hand. Returns: an OCI layout."""
    layout, bundle, image = place / "layout", place / "bundle", f"{place}/layout:umoci"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", image)
    run("umoci", "unpack", "--image", image, bundle)
    for step in (make, change):
        step(bundle / "rootfs")
        run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
    run("umoci", "insert", "--image", image, "--whiteout", "/d3")
    (place / "inserted").mkdir()
    (place / "inserted/alone").write_bytes(b"alone")
    run("umoci", "insert", "--image", image, "--opaque", place / "inserted", "/etc")
    return layout


def by_buildah(place: Path) -> Path:
    """Two layers. Returns: an OCI layout."""
    buildah = ("buildah", "--root", place / "storage", "--runroot", place / "run", "--storage-driver", "vfs")
    source = "scratch"
    for step in (make, change):
        run(*buildah, "from", "--name", step.__name__, source)
        step(Path(run(*buildah, "mount", step.__name__).strip()))
        source = run(*buildah, "commit", "--quiet", "--format", "oci", step.__name__).strip()
    run(*buildah, "push", "--quiet", source, f"oci:{place}/layout:buildah")
    return place / "layout"


@pytest.fixture(scope="module")
def node(registry: RealRegistry) -> Iterator[Node]:
    daemon = new_daemon(network=False, settings=UNLIMITED)
    try:
        yield _started(daemon, registry)
    finally:
        daemon.close()


def _started(daemon: Daemon, registry: RealRegistry) -> Node:
    daemon.map_host("docker.io", registry.address)
    daemon.start()
    return Node(daemon, registry, daemon.directory)


@pytest.mark.compat
@pytest.mark.parametrize("build", [by_umoci, by_buildah])
def test_images_of_other_builders_are_what_gnu_tar_makes_of_them(node: Node, tmp_path: Path, build: Callable[[Path], Path]) -> None:
    tool = build.__name__.removeprefix("by_")
    for program in (tool, "skopeo"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    assert compare(node, build(tmp_path), tool, tmp_path) > 40


def main(images: Sequence[str]) -> None:
    """Compare images of any size, given as OCI-LAYOUT:TAG, on a daemon of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "registry").mkdir()
        daemon = new_daemon(network=False, settings=UNLIMITED)
        try:
            with real_registry(place / "registry") as registry:
                node = _started(daemon, registry)
                for image in images:
                    layout, _, tag = image.rpartition(":")
                    compare(node, Path(layout), tag, place)
        finally:
            daemon.close()


if __name__ == "__main__":
    main(sys.argv[1:])
