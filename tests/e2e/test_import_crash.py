"""C-D1 for imports: SIGKILL at failpoints between the first byte of an archive and its image's record; restart, look, import again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from imgsvc.base import failpoints
from tests.e2e.test_crash import check_nothing_half_made, died
from tests.e2e.twoimages import APP, LAYERS, check, collect, offer, pull
from tests.fakes.registry import FakeRegistry
from tests.support.daemon import Daemon, new_daemon
from tests.support.disk import Disk, Expected

pytestmark = pytest.mark.root

POINTS = [
    ("content.ingest.recorded", 1),
    ("content.written", 2),
    ("content.commit.renamed", 2),
    ("lease.add", 3),
    ("layer.prepared", 2),
    ("layer.committed", 1),
    ("pull.layers", 1),
    ("image.add", 1),
    ("image.added", 1),
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """APP as `imgsvc export` writes it."""
    file = tmp_path_factory.mktemp("archive") / "app.tar"
    with FakeRegistry() as registry:
        offer(registry)
        daemon = new_daemon(network=False)
        try:
            daemon.map_host("docker.io", registry.address)
            daemon.start()
            pull(daemon, APP)
            assert daemon.cli("export", APP, "-o", str(file)).returncode == 0
        finally:
            daemon.close()
    return file


def names(daemon: Daemon) -> list[str]:
    """Of `imgsvc images`."""
    return [name for image in json.loads(daemon.cli("images", "--json").stdout) for name in image["repoTags"]]


@pytest.mark.parametrize("point, hit", POINTS)
def test_c_d1_an_import_is_killed(make_daemon: Callable[..., Daemon], archive: Path, tmp_path: Path, point: str, hit: int) -> None:
    daemon = make_daemon()  # without any registry: all has to come out of the archive
    daemon.start({failpoints.ENV: f"{point}=kill@{hit}"})
    first = daemon.cli("import", str(archive))
    assert first.returncode == 1
    assert died(daemon), f"{point} is not reached: {first.stderr}\n{daemon.log[-3000:]}"

    daemon.start()
    assert names(daemon) == ([APP] if point == "image.added" else [])
    assert check(daemon, deep=False) == []
    collect(daemon)
    check_nothing_half_made(daemon)

    second = daemon.cli("import", str(archive))
    assert second.returncode == 0, second.stderr
    assert names(daemon) == [APP]
    disk = Disk(daemon.root)
    Expected(tmp_path / "expected", LAYERS[APP]).check(disk, disk.images()[APP])
    assert check(daemon) == []
    collect(daemon)
    check_nothing_half_made(daemon)
    assert disk.ingests() == []
