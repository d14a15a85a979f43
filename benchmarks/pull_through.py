"""What the first client of a pull-through cache pays, against fetching straight from upstream.

Run: python -m benchmarks.pull_through [--size MIB] [--rounds N] [--rate MIB/S] [DIRECTORY]. nginx is upstream, curl with sha256sum
the client, both on loopback; a fresh daemon per round, syncing as configured by default; rounds alternate, times are medians. Without
--rate upstream is as fast as loopback, which no registry is: the cache then hashes and stores on the cores that curl and
nginx want.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.registry import make_blob, nginx
from imgsvc.oci import OCI_CONFIG, OCI_MANIFEST, Descriptor, Digest
from tests.support.daemon import new_daemon
from tests.support.registries import free_port

GOAL = 1.15


def make_manifest(directory: Path, blob: Descriptor) -> None:
    """An image of that one layer, as library/bench:1."""
    config = b"{}"
    repository = directory / "www" / "v2" / "library" / "bench"
    (repository / "blobs" / Digest.of(config)).write_bytes(config)
    (repository / "manifests").mkdir(exist_ok=True)
    parts = [{"mediaType": kind, "digest": digest, "size": size} for kind, digest, size in (
        (OCI_CONFIG, Digest.of(config), len(config)), (blob.media_type, blob.digest, blob.size),
    )]  # fmt: skip
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": parts[0], "layers": parts[1:]}
    data = json.dumps(manifest).encode()
    for target in ("1", Digest.of(data)):
        (repository / "manifests" / target).write_bytes(data)


def fetch(url: str, directory: Path) -> float:
    """Seconds for curl, tee and sha256sum to have the whole in a file and verified, as every client of a registry does."""
    target = directory / "curl.out"
    began = time.perf_counter()
    shown = subprocess.run(
        ["sh", "-c", 'curl -sf "$1" | tee "$2" | sha256sum', "sh", url, target], check=True, capture_output=True, text=True
    )
    elapsed = time.perf_counter() - began
    assert url.endswith(shown.stdout.split()[0])
    target.unlink()
    return elapsed


def through(upstream: str, path: str, directory: Path) -> float:
    """As fetch, through a cache that has nothing yet."""
    port = free_port()
    daemon = new_daemon(network=False, settings=f'[mirror]\naddress = "127.0.0.1:{port}"\npull_through = ["docker.io"]\n')
    try:
        hosts = daemon.directory / "hosts.d" / "docker.io"
        hosts.mkdir()
        (hosts / "hosts.toml").write_text(f'server = "http://{upstream}"\n')
        daemon.start()
        manifest = httpx.get(f"http://127.0.0.1:{port}/v2/library/bench/manifests/1", trust_env=False)
        assert manifest.status_code == 200, f"{manifest.text}\n{daemon.log}"
        return fetch(f"http://127.0.0.1:{port}{path}", directory)
    finally:
        daemon.close()


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=500, help="of the blob [MiB]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=0, help="of one connection to upstream [MiB/s]; 0: unlimited")
    parser.add_argument("directory", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        directory.chmod(0o755)  # nginx's workers are somebody else
        blob = make_blob(directory, arguments.size)
        make_manifest(directory, blob)
        path = f"/v2/library/bench/blobs/{blob.digest}"
        straight, cached = [], []
        with nginx(directory, arguments.rate) as upstream:
            for _ in range(arguments.rounds):
                straight.append(fetch(f"http://{upstream}{path}", directory))
                cached.append(through(upstream, path, directory))
    a, b = statistics.median(straight), statistics.median(cached)
    limit = f"{arguments.rate} MiB/s" if arguments.rate else "unlimited"
    print(f"first client, {arguments.size} MiB, upstream {limit}: straight {a:.2f} s, through a cold cache {b:.2f} s")
    print(f"  ratio {b / a:.2f} (goal {GOAL})")


if __name__ == "__main__":
    main()
