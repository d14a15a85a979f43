"""The mirror as a pull-through cache."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from imgsvc.base import failpoints
from tests.registry.support import noise
from tests.support import images
from tests.support.daemon import Daemon
from tests.support.images import BuiltDocument, Entry
from tests.support.registries import RealRegistry, ScriptedRegistry, free_port

SIZE = 3_000_000


@dataclass(slots=True)
class Cache:
    """A daemon that caches docker.io."""

    daemon: Daemon
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v2/library/cached"

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}/{path}", headers=headers, trust_env=False, timeout=30)


@pytest.fixture
def make_cache(make_daemon: Callable[..., Daemon]) -> Callable[..., Cache]:
    def make(upstream: str, *, extra: str = "") -> Cache:
        port = free_port()
        daemon = make_daemon(settings=f'[mirror]\naddress = "127.0.0.1:{port}"\npull_through = ["docker.io"]\n{extra}')
        hosts = daemon.directory / "hosts.d" / "docker.io"
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(f'server = "http://{upstream}"\n')
        daemon.start()
        return Cache(daemon, port)

    return make


def large(seed: int = 1) -> BuiltDocument:
    return images.image([images.layer([Entry("f", noise(SIZE, seed))], "plain")])


def layer_of(document: BuiltDocument) -> tuple[str, bytes]:
    return max(((str(d), data) for d, data in document.blobs.items()), key=lambda item: len(item[1]))


def test_what_is_not_here_is_fetched_once_and_stays(make_cache: Callable[..., Cache], scripted: ScriptedRegistry) -> None:
    made = large()
    scripted.serve(made, "library/cached", "1")
    cache = make_cache(scripted.address)
    digest, data = layer_of(made)

    first = cache.get("manifests/1")
    assert (first.content, first.headers["docker-content-digest"]) == (made.data, str(made.digest))
    assert cache.get(f"blobs/{digest}").content == data
    for _ in range(3):
        assert cache.get(f"manifests/{made.digest}").content == made.data
        assert cache.get(f"blobs/{digest}").content == data
    assert cache.get(f"blobs/{digest}", range="bytes=100-199").content == data[100:200]

    asked = [request for request in scripted.requests if "/blobs/" in request and request.startswith("GET")]
    assert len(asked) == 1
    assert cache.daemon.cli("gc").returncode == 0
    scripted.answers.clear()
    assert cache.get(f"blobs/{digest}").content == data


def test_a_tag_is_asked_of_the_registry_and_what_is_here_answers_when_that_is_gone(
    make_cache: Callable[..., Cache], scripted: ScriptedRegistry
) -> None:
    old, new = large(1), large(2)
    scripted.serve(old, "library/cached", "1")
    cache = make_cache(scripted.address)
    assert cache.get("manifests/1").content == old.data

    scripted.serve(new, "library/cached", "1")
    assert cache.get("manifests/1").content == new.data

    assert cache.daemon.cli("pull", "docker.io/library/cached:1").returncode == 0
    scripted.answers.clear()
    assert cache.get("manifests/1").content == new.data


def test_what_was_fetched_answers_when_the_registry_is_gone_after_a_restart_too(
    make_cache: Callable[..., Cache], scripted: ScriptedRegistry, tmp_path: Path
) -> None:
    made = large()
    scripted.serve(made, "library/cached", "1")
    policy = tmp_path / "policy.toml"
    policy.write_text('version = 1\ndefault = "allow"\n')
    cache = make_cache(scripted.address, extra=f'[verify]\npolicy = "{policy}"\n')
    digest, data = layer_of(made)
    assert cache.get("manifests/1").content == made.data
    assert cache.get(f"blobs/{digest}").content == data

    cache.daemon.map_host("docker.io", "127.0.0.1:9")  # nobody listens there
    assert cache.get("manifests/1").content == made.data
    assert cache.daemon.stop() == 0
    cache.daemon.start()
    for reference in ("1", made.digest):
        assert cache.get(f"manifests/{reference}").content == made.data
    assert cache.get(f"blobs/{digest}").content == data
    assert cache.get("manifests/2").status_code != 200

    policy.write_text('version = 1\ndefault = "deny"\n')
    assert [cache.get(f"manifests/{reference}").status_code for reference in ("1", made.digest)] == [403, 403]


def test_clients_that_come_together_share_one_download(make_cache: Callable[..., Cache], scripted: ScriptedRegistry) -> None:
    made = large()
    scripted.serve(made, "library/cached", "1")
    cache = make_cache(scripted.address)
    digest, data = layer_of(made)
    cache.get("manifests/1")
    answers: list[bytes] = []

    threads = [threading.Thread(target=lambda: answers.append(cache.get(f"blobs/{digest}").content)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [data] * 8
    assert len([r for r in scripted.requests if r == f"GET /v2/library/cached/blobs/{digest}"]) == 1


def test_wrong_bytes_are_never_sent_on_as_a_whole_blob(make_cache: Callable[..., Cache], scripted: ScriptedRegistry) -> None:
    made = large()
    digest, data = layer_of(made)
    lie = data[:-1] + bytes([data[-1] ^ 1])
    scripted.serve(made, "library/cached", "1")
    scripted.answers[f"/v2/library/cached/blobs/{digest}"] = ("application/octet-stream", lie)
    cache = make_cache(scripted.address)
    cache.get("manifests/1")

    with pytest.raises(httpx.RemoteProtocolError):
        cache.get(f"blobs/{digest}")

    scripted.serve(made, "library/cached", "1")
    deadline = time.monotonic() + 20
    while True:
        try:
            if cache.get(f"blobs/{digest}").content == data:
                break
        except httpx.RemoteProtocolError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_blobs_that_no_manifest_was_asked_for_are_not_fetched(make_cache: Callable[..., Cache], scripted: ScriptedRegistry) -> None:
    made = large()
    scripted.serve(made, "library/cached", "1")
    cache = make_cache(scripted.address)
    digest, _ = layer_of(made)

    assert cache.get(f"blobs/{digest}").status_code == 404
    assert cache.get("manifests/absent").status_code == 404
    assert [r for r in scripted.requests if "/blobs/" in r] == []


def test_other_registries_are_not_asked(make_cache: Callable[..., Cache], scripted: ScriptedRegistry) -> None:
    cache = make_cache(scripted.address)

    assert cache.get("manifests/1?ns=other.example").status_code == 404


def test_the_policy_holds(make_cache: Callable[..., Cache], scripted: ScriptedRegistry, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('version = 1\ndefault = "deny"\n')
    made = large()
    scripted.serve(made, "library/cached", "1")
    cache = make_cache(scripted.address, extra=f'[verify]\npolicy = "{policy}"\n')

    assert cache.get("manifests/1").status_code == 403
    assert cache.get(f"manifests/{made.digest}").status_code == 403
    assert [r for r in scripted.requests if "/blobs/" in r] == []


@contextmanager
def slow_registry(made: BuiltDocument, chunk: int, pause: float) -> Iterator[str]:
    """Sends blobs in pieces."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            target = self.path.partition("?")[0].rpartition("/")[2]
            data = {str(d): b for d, b in made.blobs.items()}.get(target, made.data if target in ("1", str(made.digest)) else b"{}")
            self.send_response(200)
            self.send_header("Content-Type", made.media_type)
            self.send_header("Docker-Content-Digest", str(made.digest))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for at in range(0, len(data) if self.command == "GET" else 0, chunk):
                self.wfile.write(data[at : at + chunk])
                self.wfile.flush()
                if len(data) > chunk:
                    time.sleep(pause)

        do_HEAD = do_GET  # noqa: N815  # the base class names it so

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it so
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_first_client_gets_bytes_while_the_rest_is_still_on_its_way(make_cache: Callable[..., Cache]) -> None:
    made = large()
    digest, data = layer_of(made)
    with slow_registry(made, 300_000, 0.2) as upstream:
        cache = make_cache(upstream)
        cache.get("manifests/1")
        began, first = time.monotonic(), 0.0
        received = b""
        with httpx.stream("GET", f"{cache.url}/blobs/{digest}", trust_env=False, timeout=30) as answer:
            for chunk in answer.iter_raw():
                first = first or time.monotonic() - began
                received += chunk
        whole = time.monotonic() - began

    assert received == data
    assert first < whole / 2


def test_a_second_node_pulls_through_the_cache(
    make_cache: Callable[..., Cache], make_daemon: Callable[..., Daemon], registry: RealRegistry
) -> None:
    made = large(5)
    registry.push(made, "library/cached", "through")
    cache, node = make_cache(registry.address), make_daemon()
    hosts = node.directory / "hosts.d" / "docker.io"
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "http://127.0.0.1:9"\n[host."http://127.0.0.1:{cache.port}"]\n')
    node.start()

    result = node.cli("pull", "docker.io/library/cached:through")

    assert result.returncode == 0, result.stderr
    assert json.loads(cache.daemon.cli("images", "--json").stdout) == [], "a cache unpacks nothing"


def test_the_last_bytes_wait_for_the_digest_and_not_for_the_disk(make_cache: Callable[..., Cache], scripted: ScriptedRegistry) -> None:
    made = large(7)
    scripted.serve(made, "library/cached", "1")
    cache = make_cache(scripted.address)
    cache.daemon.stop()
    cache.daemon.start({failpoints.ENV: "content.commit.checked=delay:4000@2"})  # the first is the manifest
    digest, data = layer_of(made)
    cache.get("manifests/1")

    began = time.monotonic()
    assert cache.get(f"blobs/{digest}").content == data
    assert time.monotonic() - began < 3

    assert cache.get(f"blobs/{digest}").content == data
    assert len([r for r in scripted.requests if r == f"GET /v2/library/cached/blobs/{digest}"]) == 1, "it was not stored"
