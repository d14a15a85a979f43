"""Pulls of an encrypted image and of the same image in plain, in turn, both by one daemon through CRI; prints the ratio.

    python -m benchmarks.pull_encrypted [--rounds N] [--directory DIR] [--tree PATH ...] [--incompressible MIB]

The layers are gzip: one of --tree (default: this Python's packages and its standard library), one of files that do not
compress. Data below --directory (default: a tmpfs), registry on loopback. Goal: at most 1.25 times the wall time.
On a machine that does other things too, run it under `chrt -r 1`: unpack workers are nice, and decrypting is their work.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

from benchmarks.compare_pull import HOST, Cost, Peer, imgsvc, tree_layer
from imgsvc.base.oci import MIB
from tests.support.encrypted import encrypted, pem, wrap_jwe
from tests.support.images import BuiltDocument, Entry, image, layer, tar
from tests.support.registries import RealRegistry, real_registry

GOAL = 1.25
FILE = 4 * MIB  # [bytes] of each incompressible file


def build(trees: list[Path], incompressible: int) -> BuiltDocument:
    """A layer per tree, and one of `incompressible` MiB."""
    noise = (Entry(f"noise/{n}", os.urandom(FILE)) for n in range(incompressible * MIB // FILE))
    return image([*(tree_layer([tree])[0] for tree in trees), layer(tar(noise))])


def compare(peer: Peer, rounds: int, size: int) -> float:
    """Pull both, of `size` bytes, in turn. Returns the median ratio of wall times."""
    costs: dict[str, list[Cost]] = {"plain": [], "encrypted": []}
    for _ in range(rounds):
        for name, found in costs.items():
            found.append(peer.measure(f"{HOST}/bench/{name}:latest"))
            peer.remove(f"{HOST}/bench/{name}:latest", size)
    for name, found in costs.items():
        wall, cpu = statistics.median(c.wall for c in found), statistics.median(c.cpu for c in found)
        peak = peer.peak(f"{HOST}/bench/{name}:latest")
        peer.remove(f"{HOST}/bench/{name}:latest", size)
        print(f"{name:10} wall {wall:7.3f} s   cpu {cpu:7.3f} s   peak {peak / MIB:5.0f} MiB")
    return statistics.median(e.wall / p.wall for p, e in zip(costs["plain"], costs["encrypted"], strict=True))


@contextlib.contextmanager
def playground(directory: Path | None) -> Iterator[Path]:
    """An empty directory, on a tmpfs of its own where none is named."""
    with tempfile.TemporaryDirectory(prefix="imgsvc-bench-", dir=directory) as name:
        if directory is None:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            if directory is None:
                subprocess.run(["umount", "-l", name], check=True)


@contextlib.contextmanager
def running(directory: Path, registry: RealRegistry, key: rsa.RSAPrivateKey) -> Iterator[Peer]:
    """A daemon that has the key."""
    (directory / "keys").mkdir()
    (directory / "keys" / "key.pem").write_bytes(pem(key))
    hosts = directory / "hosts.d" / HOST
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "http://{registry.address}"\n')
    peer = imgsvc("imgsvc", directory / "imgsvc", hosts.parent, f'[decrypt]\nkeys_path = "{directory}/keys"\n')
    try:
        yield peer
    finally:
        peer.stop()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where data is kept; default: a tmpfs made for this run")
    parser.add_argument("--tree", type=Path, action="append", help="a directory that makes a layer")
    parser.add_argument("--incompressible", type=int, default=128, help="MiB of the last layer")
    arguments = parser.parse_args()
    packages = Path(next(p for p in sys.path if p.endswith("site-packages")))
    document = build(arguments.tree or [packages, Path(sysconfig.get_path("stdlib"))], arguments.incompressible)
    size = sum(map(len, document.blobs.values()))
    print(f"{len(document.blobs) - 1} layers, {size / MIB:.0f} MiB compressed, {arguments.rounds} rounds")
    key = rsa.generate_private_key(65537, 2048)
    with playground(arguments.directory) as directory:
        store = directory / "registry"
        store.mkdir()
        with real_registry(store) as registry, running(directory, registry, key) as peer:
            registry.push(document, "bench/plain")
            registry.push(encrypted(document, wrap_jwe(key)), "bench/encrypted")
            compare(peer, 1, size)  # both warm: page cache, unpack server
            ratio = compare(peer, arguments.rounds, size)
    print(f"encrypted / plain: {ratio:.2f} (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
