"""Debian's docker-registry in the set-ups of the field: htpasswd, Bearer tokens, behind nginx with client certificates."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from imgsvc.registry.http.exchange import Timeouts
from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.registry.certs import Pair, authority
from tests.support.registries import free_port

USER, PASSWORD = "robot", "correct-horse"
# bcrypt of PASSWORD; docker-registry takes no other hash.
_HTPASSWD = f"{USER}:$2b$04$rW1ZU/BcYWWRXTRfsaYqXeWp.k2RVAD89Bj8hMjfK0Oe.qlNNFY02\n"
PATIENT = Timeouts(connect=5, headers=20, stall=10)


@contextmanager
def docker_registry(directory: Path, auth: object = None) -> Iterator[str]:
    """A docker-registry with its data in `directory`. Yields "127.0.0.1:PORT"."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    address = f"127.0.0.1:{free_port()}"
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}, "delete": {"enabled": True}},
        "http": {"addr": address},
    }
    if auth:
        config["auth"] = auth
    (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with running([program, "serve", str(directory / "config.yml")], directory / "registry.log", address):
        yield address


@contextmanager
def running(argv: list[str], log: Path, address: str) -> Iterator[None]:
    """A server for a `with` block, from when its port answers."""
    import socket

    host, _, port = address.rpartition(":")
    with log.open("wb") as output, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection((host, int(port)), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            yield
        finally:
            process.terminate()


@contextmanager
def htpasswd_registry(directory: Path) -> Iterator[str]:
    """Basic authentication."""
    (directory / "htpasswd").write_text(_HTPASSWD)
    with docker_registry(directory, {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}) as address:
        yield address


@dataclass(slots=True)
class TokenServer:
    """Signs JWTs that docker-registry verifies by certificate. post: whether it knows the oauth2 POST."""

    fake: FakeRegistry
    pair: Pair
    lifetime: int = 300
    post: bool = True
    issued: list[str] = field(default_factory=list)  # scopes of every token, joined
    refresh_token: str = "refresh-me"

    @property
    def realm(self) -> str:
        return f"{self.fake.url}/token"

    def answer(self, request: Request) -> Reply | None:
        if request.path != "/token":
            return None
        form = parse_qs(request.body.decode()) if request.method == "POST" else dict(request.query)
        if request.method == "POST" and not self.post:
            return Reply(404)
        who = self._who(request, form)
        if who is None:
            return Reply(401, {}, b'{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}')
        scopes = " ".join(form.get("scope", [])).split()
        self.issued.append(" ".join(scopes))
        token = self._sign(who, form["service"][0], scopes)
        name = "access_token" if request.method == "POST" else "token"
        return Reply(200, {"Content-Type": "application/json"}, json.dumps({name: token, "expires_in": self.lifetime}).encode())

    def _who(self, request: Request, form: dict[str, list[str]]) -> str | None:
        """ "" for nobody, None for a wrong secret."""
        if request.method == "POST":
            if form["grant_type"] == ["refresh_token"]:
                return USER if form["refresh_token"] == [self.refresh_token] else None
            return USER if (form["username"], form["password"]) == ([USER], [PASSWORD]) else None
        if not request.authorization:
            return ""
        return USER if request.authorization == "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode() else None

    def _sign(self, who: str, service: str, scopes: list[str]) -> str:
        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            allowed = actions.split(",") if who else []
            if name.startswith("public/"):
                allowed = [action for action in actions.split(",") if who or action == "pull"]
            access.append({"type": kind, "name": name, "actions": allowed})
        now = int(time.time())
        claims = {
            "iss": "test-issuer",
            "sub": who,
            "aud": service,
            "iat": now,
            "nbf": now - 5,
            "exp": now + self.lifetime,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        der = x509.load_pem_x509_certificate(self.pair.certificate).public_bytes(serialization.Encoding.DER)
        return jwt.encode(claims, self.pair.key, "ES256", headers={"x5c": [base64.b64encode(der).decode()]})


@contextmanager
def token_registry(directory: Path) -> Iterator[tuple[str, TokenServer]]:
    """A registry that takes only tokens of the token server. Yields (address, token server)."""
    with FakeRegistry() as fake:
        tokens = TokenServer(fake, authority().issue("token-signer"))
        fake.rule(tokens.answer)
        (directory / "ca.pem").write_bytes(authority().pem)
        auth = {
            "token": {
                "realm": tokens.realm,
                "service": "test-service",
                "issuer": "test-issuer",
                "rootcertbundle": str(directory / "ca.pem"),
            }
        }
        with docker_registry(directory, auth) as address:
            yield address, tokens


@contextmanager
def nginx_registry(directory: Path, *, only_h2: bool = False) -> Iterator[str]:
    """TLS by nginx, which lets only clients with a certificate of the test CA in. Yields "127.0.0.1:PORT".

    only_h2: HTTP/2 without TLS and nothing else instead; TLS of nginx always allows HTTP/1.1, too.
    """
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    with docker_registry(directory) as upstream:
        certificate, key = authority().issue().write(directory, "server")
        (directory / "ca.pem").write_bytes(authority().pem)
        port = free_port()
        tls = f"""
                    listen 127.0.0.1:{port} ssl;
                    ssl_certificate {certificate}; ssl_certificate_key {key};
                    ssl_client_certificate {directory}/ca.pem; ssl_verify_client on;"""
        (directory / "nginx.conf").write_text(f"""
            daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log stderr;
            events {{ worker_connections 64; }}
            http {{
                access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
                fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
                server {{
                    {f"listen 127.0.0.1:{port} http2;" if only_h2 else tls}
                    client_max_body_size 0; proxy_max_temp_file_size 0; chunked_transfer_encoding on;
                    location / {{
                        proxy_pass http://{upstream}; proxy_request_buffering off;
                        proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto {"http" if only_h2 else "https"};
                    }}
                }}
            }}""")
        with running([program, "-p", str(directory), "-c", str(directory / "nginx.conf")], directory / "nginx.log", f"127.0.0.1:{port}"):
            yield f"127.0.0.1:{port}"
