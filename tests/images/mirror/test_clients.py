"""Other programs, and another imgsvc, use a daemon's mirror endpoint through their own configuration."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.registry.certs import authority
from tests.support import images
from tests.support.daemon import Daemon
from tests.support.images import BuiltDocument, Entry
from tests.support.registries import RealRegistry, free_port, real_registry

NAME = "docker.io/library/shared:1"


@dataclass(slots=True)
class Serving:
    """A daemon that has NAME and serves it over TLS. ca: directory with ca.crt and a client's pair."""

    daemon: Daemon
    port: int
    ca: Path
    image: BuiltDocument

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


def serving(
    make: Callable[..., Daemon], directory: Path, registry: RealRegistry, *, layers: int = 2, extra: str = "", client_ca: bool = False
) -> Serving:
    ca, port = directory / "ca", free_port()
    ca.mkdir()
    (ca / "ca.crt").write_bytes(authority().pem)
    certificate, key = authority().issue().write(ca, "server")
    authority().issue("peer").write(ca, "client")
    lines = [f'[mirror]\naddress = "127.0.0.1:{port}"\ntls_cert_file = "{certificate}"\ntls_key_file = "{key}"']
    if client_ca:
        lines.append(f'client_ca_file = "{ca}/ca.crt"\nprivate_images = "certificate"')
    daemon = make(settings="\n".join([*lines, extra]) + "\n")
    daemon.map_host("docker.io", registry.address)
    daemon.start()
    made = images.image([images.layer([Entry(f"file{n}", f"{n}".encode() * 5000)]) for n in range(layers)], Cmd=["/a"])
    registry.push(made, "library/shared", "1")
    result = daemon.cli("pull", NAME)
    assert result.returncode == 0, result.stderr
    return Serving(daemon, port, ca, made)


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def hosts_toml(serving: Serving, *, client: bool = False) -> str:
    pair = f'client = [["{serving.ca}/client.cert", "{serving.ca}/client.key"]]\n' if client else ""
    return (
        f'server = "http://127.0.0.1:9"\n[host."https://{serving.address}"]\n'
        f'capabilities = ["pull", "resolve"]\nca = "{serving.ca}/ca.crt"\n{pair}'
    )


def test_a_second_node_pulls_21_layers_with_the_upstream_stopped(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    with real_registry(upstream) as registry:
        first = serving(make_daemon, tmp_path, registry, layers=21)
    second = make_daemon()
    directory = second.directory / "hosts.d" / "docker.io"
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(hosts_toml(first))
    second.start()

    result = second.cli("pull", NAME)

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(first.image.config_digest)
    shown = json.loads(second.cli("inspect", NAME).stdout)
    assert len(shown["layers"]) == 21
    assert all(list(layer["from"]) == [f"https://{first.address}/v2"] for layer in shown["layers"])


def test_clients_without_a_certificate_stay_outside(make_daemon: Callable[..., Daemon], tmp_path: Path, registry: RealRegistry) -> None:
    first = serving(make_daemon, tmp_path, registry, client_ca=True)
    refused, allowed = make_daemon(), make_daemon()
    for daemon, client in ((refused, False), (allowed, True)):
        directory = daemon.directory / "hosts.d" / "docker.io"
        directory.mkdir(parents=True)
        (directory / "hosts.toml").write_text(hosts_toml(first, client=client))
        daemon.start()

    assert refused.cli("pull", NAME).returncode == 1
    assert allowed.cli("pull", NAME).returncode == 0


@pytest.mark.compat
def test_skopeo_copies_from_the_mirror(make_daemon: Callable[..., Daemon], tmp_path: Path, registry: RealRegistry) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    first = serving(make_daemon, tmp_path, registry)
    target = tmp_path / "copy"

    run("skopeo", "copy", f"--src-cert-dir={first.ca}", f"docker://{first.address}/docker.io/library/shared:1", f"dir:{target}")

    assert json.loads((target / "manifest.json").read_text()) == json.loads(first.image.data)


@pytest.mark.compat
@pytest.mark.root
def test_podman_pulls_through_the_mirror(make_daemon: Callable[..., Daemon], tmp_path: Path, registry: RealRegistry) -> None:
    if not shutil.which("podman"):
        pytest.skip("podman is not installed")
    first = serving(make_daemon, tmp_path, registry)
    config = tmp_path / "registries.conf"
    config.write_text(
        f'[[registry]]\nprefix = "docker.io"\nlocation = "127.0.0.1:9"\n[[registry.mirror]]\nlocation = "{first.address}/docker.io"\n'
    )
    place = first.daemon.directory  # Podman takes short paths only
    podman = ("podman", "--root", f"{place}/podman", "--runroot", f"{place}/podman-run", "--storage-driver", "vfs")

    run(*podman, "pull", f"--cert-dir={first.ca}", NAME, CONTAINERS_REGISTRIES_CONF=str(config))

    found = json.loads(run(*podman, "image", "inspect", NAME))
    assert found[0]["Id"] == first.image.config_digest.hex


@contextmanager
def containerd(directory: Path) -> Iterator[Path]:
    """Debian's containerd, private; yields its socket."""
    program, socket = shutil.which("containerd"), directory / "s.sock"
    if program is None or not shutil.which("ctr"):
        pytest.skip("containerd is not installed")
    (directory / "config.toml").write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{socket}"\n[ttrpc]\naddress = "{socket}.ttrpc"\n'
        f'[plugins."io.containerd.internal.v1.opt"]\npath = "{directory}/opt"\n'
    )
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen([program, "--config", f"{directory}/config.toml"], stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + 30
            while subprocess.run(["ctr", "--address", str(socket), "version"], capture_output=True).returncode:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield socket
        finally:
            process.terminate()


@pytest.mark.compat
@pytest.mark.root
def test_containerd_pulls_through_the_mirror(make_daemon: Callable[..., Daemon], tmp_path: Path, registry: RealRegistry) -> None:
    first = serving(make_daemon, tmp_path, registry)
    hosts = tmp_path / "certs.d" / "docker.io"
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(hosts_toml(first))
    private = tmp_path / "containerd"
    private.mkdir()

    with containerd(private) as socket:
        command = ("ctr", "--address", str(socket))
        run(*command, "images", "pull", "--snapshotter", "native", "--hosts-dir", str(tmp_path / "certs.d"), NAME)
        listed = run(*command, "images", "list", "-q")

    assert listed.split() == [NAME]


def test_metrics_count_pulls_and_what_the_mirror_gave(make_daemon: Callable[..., Daemon], tmp_path: Path, registry: RealRegistry) -> None:
    port = free_port()
    first = serving(make_daemon, tmp_path, registry, extra=f'[metrics]\naddress = "127.0.0.1:{port}"')
    layer = first.image.blobs
    with httpx.Client(verify=ssl.create_default_context(cafile=first.ca / "ca.crt"), trust_env=False) as client:
        for digest, data in layer.items():
            answer = client.get(f"https://{first.address}/v2/library/shared/blobs/{digest}", params={"ns": "docker.io"})
            assert answer.content == data

    page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text

    served = sum(map(len, layer.values()))
    for line in (
        'imgsvc_pulls_total{outcome="ok"} 1',
        "imgsvc_pulls_running 0",
        "imgsvc_images 1",
        f'imgsvc_mirror_bytes_total{{kind="blobs"}} {served}',
        f'imgsvc_pulled_bytes_total{{endpoint="http://{registry.address}/v2"}} ',
        'imgsvc_rpc_seconds_count{method="Pull",code="OK"} 1',
    ):
        assert line in page
