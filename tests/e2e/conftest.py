from __future__ import annotations

import pytest

from tests.support import cri, images
from tests.support.daemon import Daemon
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
