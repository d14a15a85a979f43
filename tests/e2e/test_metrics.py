"""What a daemon's metrics page and its events say of pulls, registries, collections and the store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.fakes.registry import FakeRegistry, Reply, Request
from tests.support import images
from tests.support.daemon import Daemon
from tests.support.images import Entry
from tests.support.registries import free_port

NAME = "docker.io/watched/app:1"
WARNING = '299 - "this repository moves to other.example"'
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@dataclass(frozen=True, slots=True)
class Node:
    """A daemon with a metrics page whose docker.io is a registry that wants tokens, warns, and breaks off once."""

    daemon: Daemon
    registry: FakeRegistry
    port: int

    def page(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).raise_for_status().text

    def value(self, series: str) -> float:
        """Of one series, by name and labels as they are shown."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.page(), re.MULTILINE)
        assert found, f"{series} is not in\n{self.page()}"
        return float(found[1])


@pytest.fixture
def node(make_daemon: Callable[..., Daemon]) -> Iterator[Node]:
    port = free_port()
    with FakeRegistry() as registry:
        registry.add(images.image([images.layer([Entry("f", os.urandom(100_000))]), images.layer([Entry("g", b"g")])]), "watched/app", "1")

        def door(request: Request) -> Reply | None:
            if request.path == "/token":
                return Reply(body=b'{"token":"t"}')
            if not request.authorization:
                return Reply(401, {"WWW-Authenticate": f'Bearer realm="{registry.url}/token",service="s"'})
            honest = registry.honest(request)
            return Reply(honest.status, {**honest.headers, "Warning": WARNING}, honest.body)

        registry.rule(door)
        registry.rule(registry.times(1, registry.on("/blobs/", Reply(500, body=b"oops"))))
        daemon = make_daemon(settings=f'[metrics]\naddress = "127.0.0.1:{port}"\n')
        hosts = daemon.directory / "hosts.d" / "docker.io"
        hosts.mkdir()
        (hosts / "hosts.toml").write_text(f'server = "{registry.url}"\n')
        daemon.start()
        yield Node(daemon, registry, port)


def test_a_page_tells_of_tokens_retries_queues_store_and_collections(node: Node) -> None:
    assert node.daemon.cli("pull", NAME).returncode == 0
    assert node.daemon.cli("pull", "docker.io/watched/absent:1").returncode == 1

    assert node.value('imgsvc_token_fetch_seconds_count{outcome="ok"}') == len(node.registry.seen("/token"))
    assert node.value('imgsvc_registry_failures_total{phase="fetch",reason="broken"}') == 1
    assert node.value('imgsvc_registry_retries_total{reason="broken",then="retry"}') == 1
    assert node.value('imgsvc_registry_failures_total{phase="resolve",reason="definite"}') == 1
    assert node.value('imgsvc_queue_seconds_count{queue="download"}') == 2
    assert node.value('imgsvc_queue_seconds_count{queue="unpack"}') == 2
    assert node.value('imgsvc_store_bytes{class="content"}') > 100_000
    assert node.value('imgsvc_store_bytes{class="snapshot"}') > 100_000
    assert 0 < node.value('imgsvc_metadata_bytes{of="used"}') < node.value('imgsvc_metadata_bytes{of="limit"}')

    assert node.daemon.cli("rmi", NAME).returncode == 0
    assert node.daemon.cli("gc").returncode == 0
    assert node.value('imgsvc_gc_runs_total{outcome="ok"}') >= 1
    assert node.value('imgsvc_gc_removed_total{kind="snapshot"}') == 2
    assert node.value('imgsvc_gc_removed_total{kind="content"}') == 4
    assert node.value('imgsvc_gc_seconds_count{phase="mark"}') >= 1


def test_everything_on_the_page_is_documented_and_the_other_way_round(node: Node) -> None:
    shown = set(re.findall(r"^# TYPE (\S+)", node.page(), re.MULTILINE))
    documented = set(re.findall(r"`(imgsvc_[a-z_]+)`", DOCS.read_text()))

    assert shown == documented


def test_a_registrys_warning_is_told_once_per_pull(node: Node) -> None:
    command = [sys.executable, "-m", "imgsvc.cli", "events", "--json", "--address", node.daemon.address]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
        reader = threading.Thread(target=lambda: lines.extend(listener.stdout or ()))
        reader.start()
        deadline = time.monotonic() + 60
        while not any('"pull-done"' in line for line in lines):  # until the listener listens
            assert time.monotonic() < deadline, lines
            assert node.daemon.cli("pull", NAME).returncode == 0
            time.sleep(0.2)
        listener.terminate()
        reader.join()

    last = [json.loads(line) for line in lines]
    warned = [event for event in last if event["event"] == "registry-warning"]
    assert [(event["subject"], event["warning"]) for event in warned] == [("docker.io/watched/app", WARNING)]
    pulls = node.value('imgsvc_pulls_total{outcome="ok"}')
    assert node.value("imgsvc_registry_warnings_total") == pulls
    assert node.daemon.log.count(WARNING) == pulls
