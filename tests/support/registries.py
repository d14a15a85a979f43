"""Registries on loopback: Debian's docker-registry, and a small one that serves whatever it is told to, true or not."""

from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from imgsvc.base.oci import Digest
from tests.registry.certs import authority
from tests.support.images import BuiltDocument


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class RealRegistry:
    """A running docker-registry. address: "127.0.0.1:PORT". authority: file of the CA whose certificate it has; None for plain HTTP."""

    address: str
    authority: Path | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return f"https://{self.address}" if self.authority else f"http://{self.address}"

    @property
    def trusted(self) -> ssl.SSLContext | bool:
        """What httpx is to verify it by."""
        return ssl.create_default_context(cafile=self.authority) if self.authority else True

    def push(self, document: BuiltDocument, repository: str, tag: str = "latest") -> Digest:
        """Upload a manifest or index with everything below it, without credentials. Returns its digest."""
        with httpx.Client(base_url=f"{self.url}/v2/{repository}/", timeout=60, verify=self.trusted) as client:
            _push(client, document, tag)
        return document.digest


def _push(client: httpx.Client, document: BuiltDocument, reference: str) -> None:
    for child in document.children:
        _push(client, child, str(child.digest))
    for digest, data in document.blobs.items():
        if client.head(f"blobs/{digest}").status_code == 200:
            continue
        location = client.post("blobs/uploads/").raise_for_status().headers["Location"]
        client.put(location, params={**httpx.URL(location).params, "digest": str(digest)}, content=data).raise_for_status()
    client.put(f"manifests/{reference}", content=document.data, headers={"Content-Type": document.media_type}).raise_for_status()


@contextmanager
def real_registry(directory: Path, *, tls: bool = False) -> Iterator[RealRegistry]:
    """Debian's docker-registry with its data in `directory`, for a `with` block; skips the test where it is absent."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    address = f"127.0.0.1:{free_port()}"
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}}}, delete: {{enabled: true}}}}\nhttp:\n  addr: {address}\n"
    )
    registry = RealRegistry(address)
    if tls:
        certificate, key = authority().issue().write(directory, "server")
        config.write_text(f"{config.read_text()}  tls: {{certificate: {certificate}, key: {key}}}\n")
        (directory / "ca.pem").write_bytes(authority().pem)
        registry = RealRegistry(address, directory / "ca.pem")
    with (directory / "log").open("wb") as log, subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log) as process:
        try:
            _wait_until_up(registry, process)
            yield registry
        finally:
            process.kill()


def _wait_until_up(registry: RealRegistry, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{registry.url}/v2/", verify=registry.trusted).status_code == 200:
                return
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@dataclass(slots=True)
class ScriptedRegistry:
    """Serves exact bytes per path, so that it can lie. requests: "METHOD PATH" in order of arrival.

    answers: path → (content type, body). Anything else is 404.
    """

    answers: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def serve(
        self, document: BuiltDocument, repository: str, tag: str = "latest", *, instead: Mapping[Digest, bytes] | None = None
    ) -> None:
        """Offer an image; `instead` replaces the bytes of single blobs, documents included, under their true digest."""
        lies = instead or {}
        base = f"/v2/{repository}"
        for child in document.children:
            self.serve(child, repository, str(child.digest), instead=instead)
        for reference in (tag, str(document.digest)):
            self.answers[f"{base}/manifests/{reference}"] = (document.media_type, lies.get(document.digest, document.data))
        for digest, data in document.blobs.items():
            self.answers[f"{base}/blobs/{digest}"] = ("application/octet-stream", lies.get(digest, data))


@contextmanager
def scripted_registry() -> Iterator[ScriptedRegistry]:
    """A ScriptedRegistry that listens on loopback, for a `with` block."""
    registry = ScriptedRegistry(answers={"/v2/": ("application/json", b"{}")})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(registry))
    registry.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(registry: ScriptedRegistry) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            registry.requests.append(f"{self.command} {path}")
            found = registry.answers.get(path)
            kind, body = found or ("application/json", b'{"errors":[{"code":"NAME_UNKNOWN","message":"not here"}]}')
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if "/manifests/" in path and found:
                self.send_header("Docker-Content-Digest", path.rpartition("/")[2] if "sha256:" in path else str(Digest.of(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it so
            """Keep the test output clean."""

    return Handler
