"""Fixtures of all tests: registries, the tools that encrypt images, and the real daemon with its own root, network and mirror."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.decrypt.foreign import Foreign, foreign
from tests.support.daemon import Daemon, new_daemon
from tests.support.quick import Quick
from tests.support.registries import RealRegistry, ScriptedRegistry, real_registry, scripted_registry

BUSYBOX = "docker.io/library/busybox:latest"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick`: see tests/support/quick.py."""
    parser.addoption("--quick", action="store_true", help="only tests that start no process")


def pytest_configure(config: pytest.Config) -> None:
    """Install what `--quick` means."""
    if config.getoption("--quick"):
        config.pluginmanager.register(Quick(config), "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root when we are not."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    """One docker-registry for the whole run; tests push under repository names of their own."""
    with real_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def scripted() -> Iterator[ScriptedRegistry]:
    """A registry that serves exactly what the test puts into it."""
    with scripted_registry() as running:
        yield running


@pytest.fixture
def make_daemon() -> Iterator[Callable[..., Daemon]]:
    """Make daemons with other settings: make_daemon(network=…, settings="…"); not started. Nothing of them survives."""
    made: list[Daemon] = []

    def make(*, network: bool = False, settings: str = "") -> Daemon:
        made.append(new_daemon(network=network, settings=settings))
        return made[-1]

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture
def image_daemon(make_daemon: Callable[..., Daemon], registry: RealRegistry) -> Daemon:
    """A running daemon without pod network; docker.io is reached only through a mirror, which is `registry`."""
    daemon = make_daemon()
    daemon.map_host("docker.io", registry.address)
    daemon.start()
    return daemon


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], registry: RealRegistry) -> Iterator[Daemon]:
    """As image_daemon, with a bridge network, for tests that run pods (marker root).

    When a test passed, its pods are removed through CRI and nothing of them may be left.
    """
    for program in ("runc", "conmon"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    if not Path("/usr/lib/cni/bridge").exists():
        pytest.skip("the CNI plugins are not installed")
    running = make_daemon(network=True)
    running.map_host("docker.io", registry.address)
    running.start()
    yield running
    if running.process:
        running.remove_all_pods()
        assert running.leftovers() == [], running.log[-4000:]


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    """skopeo, gpg and openssl, with keys they made."""
    missing = [name for name in ("skopeo", "gpg", "openssl") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    # Short, because gpg-agent's socket lies in it.
    with foreign(Path(tmp_path_factory.mktemp("f"))) as made:
        yield made
