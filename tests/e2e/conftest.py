from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support import cri, images
from tests.support.daemon import Daemon
from tests.support.encrypted import PrivateKey, pem
from tests.support.registries import RealRegistry

BUSYBOX = "docker.io/library/busybox:latest"


@pytest.fixture(scope="session")
def busybox(registry: RealRegistry) -> str:
    """docker.io/library/busybox, in the registry behind the mirror. Returns the image ID."""
    made = images.busybox()
    registry.push(made, "library/busybox")
    return str(made.config_digest)


@pytest.fixture
def pod_daemon(daemon: Daemon, busybox: str) -> Daemon:
    """A daemon with a pod network that has pulled busybox."""
    assert cri.pull(daemon.images(), BUSYBOX) == busybox
    return daemon


@dataclass(frozen=True, slots=True)
class Node:
    """A running daemon, and the directory of its decryption keys."""

    daemon: Daemon
    keys: Path

    def key(self, name: str, key: PrivateKey) -> Path:
        """Give the node a key; the file."""
        path = self.keys / name
        path.write_bytes(pem(key))
        path.chmod(0o600)
        return path

    def snapshots(self) -> set[str]:
        """What is unpacked or half unpacked; what is in the trash is removed already."""
        return {str(p) for p in (self.daemon.root / "snapshots").glob("*/*/*") if p.parent.name != "trash"}

    def inspect(self, name: str) -> dict[str, Any]:
        """`imgsvc inspect`."""
        done = self.daemon.cli("inspect", name)
        assert done.returncode == 0, done.stderr
        shown: dict[str, Any] = json.loads(done.stdout)
        return shown


@pytest.fixture
def make_node(make_daemon: Callable[..., Daemon], registry: RealRegistry, tmp_path: Path) -> Callable[..., Node]:
    """Make a node that decrypts with the keys in a directory, empty at first: make_node(network=…, decrypt="…", settings="…")."""

    def make(*, network: bool = False, decrypt: str = "", settings: str = "") -> Node:
        keys = tmp_path / "keys"
        keys.mkdir()
        daemon = make_daemon(network=network, settings=f'[decrypt]\nkeys_path = "{keys}"\n{decrypt}\n{settings}')
        daemon.map_host("docker.io", registry.address)
        daemon.start()
        return Node(daemon, keys)

    return make


@pytest.fixture(scope="session")
def rsa_key() -> rsa.RSAPrivateKey:
    """A key to encrypt images for."""
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="session")
def other_key() -> rsa.RSAPrivateKey:
    """One that opens nothing that rsa_key opens."""
    return rsa.generate_private_key(65537, 2048)
