"""What the first client of a pull-through cache pays, against fetching straight from upstream.

Run: python -m benchmarks.pull_through [--size MIB] [--rounds N] [--rate MIB/S] [DIRECTORY]. nginx is upstream, all on
loopback; a fresh daemon per round, syncing as configured by default; rounds alternate, times and ratios are medians. The clients:

* skopeo, which copies the image to a directory: a client of registries as they are.
* verify: curl, tee and sha256sum, the least that a client of registries does.
* curl alone, which checks nothing; no client of a registry does that.

Without --rate upstream is as fast as loopback, which no registry is: the cache then hashes and stores on the cores that client
and nginx want.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.registry import make_blob, nginx
from imgsvc.base.oci import OCI_CONFIG, OCI_MANIFEST, Descriptor, Digest
from tests.support.daemon import new_daemon
from tests.support.registries import free_port

GOAL = 1.15
_BLOB = "http://$1/v2/library/bench/blobs/$2"
CLIENTS = {
    "skopeo": 'skopeo --insecure-policy copy --quiet --src-tls-verify=false "docker://$1/library/bench:1" "dir:$3"',
    "verify": f'curl -sf "{_BLOB}" | tee "$3" | sha256sum',
    "curl": f'curl -sf -o "$3" "{_BLOB}"',
}


def make_manifest(directory: Path, blob: Descriptor) -> None:
    """An image of that one layer, as library/bench:1."""
    config = b"{}"
    repository = directory / "www" / "v2" / "library" / "bench"
    (repository / "blobs" / Digest.of(config)).write_bytes(config)
    (repository / "manifests").mkdir(exist_ok=True)
    (directory / "www" / "v2" / "index.html").write_bytes(b"{}")  # for clients that ask whether this is a registry
    parts = [{"mediaType": kind, "digest": digest, "size": size} for kind, digest, size in (
        (OCI_CONFIG, Digest.of(config), len(config)), (blob.media_type, blob.digest, blob.size),
    )]  # fmt: skip
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": parts[0], "layers": parts[1:]}
    data = json.dumps(manifest).encode()
    for target in ("1", Digest.of(data)):
        (repository / "manifests" / target).write_bytes(data)


def fetch(client: str, address: str, blob: Digest, directory: Path) -> float:
    """Seconds for one of CLIENTS to have the whole in a file."""
    target = directory / "fetched"
    command = CLIENTS[client]
    began = time.perf_counter()
    shown = subprocess.run(["sh", "-c", command, "sh", address, blob, str(target)], check=True, capture_output=True, text=True)
    elapsed = time.perf_counter() - began
    assert client != "verify" or blob.endswith(shown.stdout.split()[0])
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return elapsed


def through(client: str, upstream: str, blob: Digest, directory: Path) -> float:
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
        return fetch(client, f"127.0.0.1:{port}", blob, directory)
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
        limit = f"{arguments.rate} MiB/s" if arguments.rate else "unlimited"
        print(f"first client of a cold cache, {arguments.size} MiB, upstream {limit}:")
        with nginx(directory, arguments.rate) as upstream:
            for client in CLIENTS:
                straight, cached = [], []
                for _ in range(arguments.rounds):
                    straight.append(fetch(client, upstream, blob.digest, directory))
                    cached.append(through(client, upstream, blob.digest, directory))
                a, b = statistics.median(straight), statistics.median(cached)
                ratio = statistics.median(two / one for one, two in zip(straight, cached, strict=True))
                print(f"  {client:7} straight {a:.2f} s, through the cache {b:.2f} s, ratio {ratio:.2f} (goal {GOAL})", flush=True)


if __name__ == "__main__":
    main()
