"""`imgsvc push` against docker-registry: what is stored arrives as it is, and what is not stored is fetched or told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from imgsvc.base.oci import Digest, Platform
from tests.e2e.test_registries import image_of
from tests.fakes.registry import FakeRegistry
from tests.registry.real import PASSWORD, USER, htpasswd_registry
from tests.registry.support import hosts_d, noise
from tests.support import cri, images
from tests.support.daemon import Daemon
from tests.support.images import BuiltDocument, Entry
from tests.support.registries import RealRegistry

pytestmark = pytest.mark.compat


@pytest.fixture
def origin() -> FakeRegistry:
    """Where images come from."""
    return FakeRegistry()


@pytest.fixture
def node(make_daemon: Callable[..., Daemon], origin: FakeRegistry) -> Callable[..., Daemon]:
    """Start a daemon that has pulled some images as docker.io/library/NAME:1."""

    def start(settings: str = "", **made: BuiltDocument) -> Daemon:
        daemon = make_daemon(settings=settings)
        hosts_d(daemon.directory / "hosts.d", {"docker.io": f'fallback = false\n[host."{origin.url}"]\n'})
        daemon.start()
        for name, document in made.items():
            origin.add(document, f"library/{name}", "1")
            cri.pull(daemon.images(), f"{name}:1")
        return daemon

    return start


@pytest.fixture(autouse=True)
def _serving(origin: FakeRegistry) -> object:
    with origin:
        yield


def imgsvc(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = daemon.cli(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def manifest(registry: RealRegistry, repository: str, target: str) -> httpx.Response:
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
    return httpx.get(f"{registry.url}/v2/{repository}/manifests/{target}", headers={"Accept": accept})


def check_there(registry: RealRegistry, repository: str, made: BuiltDocument) -> None:
    for digest, data in made.blobs.items():
        assert httpx.get(f"{registry.url}/v2/{repository}/blobs/{digest}").content == data


def test_a_tag_is_pushed_with_everything_below_it(node: Callable[..., Daemon], registry: RealRegistry) -> None:
    made = image_of("pushed")
    daemon = node(app=made)
    name = f"{registry.address}/push/whole:2"
    imgsvc(daemon, "tag", "app:1", name)

    done = imgsvc(daemon, "push", name)

    assert done.stdout.split() == [str(made.digest)]
    assert made.data == manifest(registry, "push/whole", "2").content
    check_there(registry, "push/whole", made)
    for layer in (blob for blob in made.blobs if blob != made.config_digest):
        assert f"{layer.hex[:12]}: done" in done.stderr
    again = imgsvc(daemon, "push", name)
    assert ": done" not in again.stderr
    assert again.stderr.count(": exists") == 3


def test_a_second_repository_of_one_registry_gets_its_blobs_by_mounting(node: Callable[..., Daemon], registry: RealRegistry) -> None:
    made = image_of("mounted")
    daemon = node(app=made)
    for repository in ("push/first", "push/second"):
        imgsvc(daemon, "tag", "app:1", f"{registry.address}/{repository}:1")
    imgsvc(daemon, "push", f"{registry.address}/push/first:1")
    done = imgsvc(daemon, "push", f"{registry.address}/push/second:1")
    assert ": done" not in done.stderr
    assert done.stderr.count(": exists") == 3
    check_there(registry, "push/second", made)


def test_of_an_index_the_part_that_is_here_is_pushed(node: Callable[..., Daemon], registry: RealRegistry) -> None:
    ours, other = str(Platform.host()), "linux/s390x" if Platform.host().architecture != "s390x" else "linux/amd64"
    right, wrong = image_of("right"), images.image([images.layer([Entry("w", b"wrong")])], platform=other)
    partial, whole = images.index({other: wrong, ours: right}), images.index({ours: right})
    daemon = node(partial=partial, whole=whole)
    for name in ("partial", "whole"):
        imgsvc(daemon, "tag", f"{name}:1", f"{registry.address}/push/{name}:1")

    # Both names stand for one image ID; its record is that of the later pull, the whole index.
    assert imgsvc(daemon, "push", f"{registry.address}/push/whole:1").stdout.split() == [str(whole.digest)]
    assert manifest(registry, "push/whole", "1").content == whole.data
    assert manifest(registry, "push/whole", str(right.digest)).content == right.data
    cri.pull(daemon.images(), "partial:1")
    done = imgsvc(daemon, "push", f"{registry.address}/push/partial:1")
    assert done.stdout.split() == [str(right.digest)]
    assert "1 other manifest" in done.stderr
    assert manifest(registry, "push/partial", "1").content == right.data


def test_by_digest_exactly_that_is_pushed_or_nothing(node: Callable[..., Daemon], origin: FakeRegistry) -> None:
    other = "linux/s390x" if Platform.host().architecture != "s390x" else "linux/amd64"
    right, wrong = image_of("right"), images.image([images.layer([Entry("w", b"wrong")])], platform=other)
    made = images.index({other: wrong, str(Platform.host()): right})
    daemon = node(app=made)
    done = daemon.cli("push", f"docker.io/library/app@{made.digest}")
    assert done.returncode == 1
    assert str(made.digest) in done.stderr
    assert "push a tag" in done.stderr
    assert not [r for r in origin.requests if r.method in ("POST", "PUT", "PATCH")]


def test_an_image_that_is_not_here_is_one_clear_line(node: Callable[..., Daemon], registry: RealRegistry) -> None:
    done = node().cli("push", f"{registry.address}/push/absent:1")
    assert done.returncode == 1
    assert f"{registry.address}/push/absent:1 is not on this node" in done.stderr
    assert done.stderr.count("\n") == 1


def drop_layers(daemon: Daemon, made: BuiltDocument) -> list[Digest]:
    """With discard_unpacked_layers: until the collector took the blobs of unpacked layers."""
    layers = [digest for digest in made.blobs if digest != made.config_digest]
    imgsvc(daemon, "gc")
    assert not [d for d in layers if (daemon.root / "content/blobs/sha256" / d.hex).exists()]
    return layers


def test_a7_2_layers_that_were_given_up_are_fetched_again(
    node: Callable[..., Daemon], registry: RealRegistry, origin: FakeRegistry
) -> None:
    made = image_of("discarded")
    daemon = node("[images]\ndiscard_unpacked_layers = true\n[gc]\nblob_cache = 0\n", app=made)
    drop_layers(daemon, made)
    name = f"{registry.address}/push/discarded:1"
    imgsvc(daemon, "tag", "app:1", name)
    imgsvc(daemon, "push", name)
    check_there(registry, "push/discarded", made)
    # What the registry has needs neither a blob here nor its origin.
    imgsvc(daemon, "gc")
    origin.blobs.clear()
    imgsvc(daemon, "push", name)


def test_a7_2_layers_that_nobody_has_any_more_are_named(node: Callable[..., Daemon], registry: RealRegistry, origin: FakeRegistry) -> None:
    made = image_of("lost")
    daemon = node("[images]\ndiscard_unpacked_layers = true\n[gc]\nblob_cache = 0\n", app=made)
    layers = drop_layers(daemon, made)
    origin.blobs.clear()
    name = f"{registry.address}/push/lost:1"
    imgsvc(daemon, "tag", "app:1", name)
    done = daemon.cli("push", name)
    assert done.returncode == 1
    assert any(layer in done.stderr for layer in layers)
    assert "discard_unpacked_layers" in done.stderr
    assert manifest(registry, "push/lost", "1").status_code == 404, "a name never stands for half an image"


def test_credentials_of_the_caller_and_of_the_node(node: Callable[..., Daemon], tmp_path: Path) -> None:
    made = image_of("private")
    daemon = node(app=made)
    with htpasswd_registry(tmp_path) as address:
        name = f"{address}/push/private:1"
        imgsvc(daemon, "tag", "app:1", name)
        refused = daemon.cli("push", name)
        assert refused.returncode == 1
        assert "401" in refused.stderr
        wrong = daemon.cli("push", name, "--creds", f"{USER}:not-it")
        assert wrong.returncode == 1
        assert "credential command line" in wrong.stderr
        assert "not-it" not in wrong.stderr
        imgsvc(daemon, "push", name, "--creds", f"{USER}:{PASSWORD}")
        place = daemon.directory / "hosts.d" / (address.replace(":", "_") + "_")
        place.mkdir()
        (place / "credentials.toml").touch(0o600)
        (place / "credentials.toml").write_text(f'[namespace]\nusername = "{USER}"\npassword = "{PASSWORD}"\n')
        imgsvc(daemon, "push", name)
    assert PASSWORD not in daemon.log
    assert "not-it" not in daemon.log


def test_large_layers_arrive_whole_while_the_daemon_answers(node: Callable[..., Daemon], registry: RealRegistry) -> None:
    size = 48 << 20
    made = images.image([images.layer([Entry("big", noise(size))], "plain")])
    daemon = node(app=made)
    name = f"{registry.address}/push/large:1"
    imgsvc(daemon, "tag", "app:1", name)
    pushing = subprocess.Popen(
        [sys.executable, "-m", "imgsvc.cli", "push", name, "--address", daemon.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while pushing.poll() is None:
        assert cri.image_status(daemon.images(), "app:1")
    out, errors = pushing.communicate(timeout=30)
    assert pushing.returncode == 0, errors
    assert out.decode().split() == [str(made.digest)]
    check_there(registry, "push/large", made)
