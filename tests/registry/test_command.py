"""`imgsvc hosts explain` and `hosts check` as people and programs call them: output, --json, exit codes. No daemon runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.certs import authority
from tests.registry.support import hosts_d, image_of, noise

EXAMPLES = Path(__file__).parents[2] / "hosts.d.example"
DEAD = "127.0.0.1:1"

Imgsvc = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A directory with hosts.d and config.toml."""
    (tmp_path / "hosts.d").mkdir()
    configure(tmp_path)
    return tmp_path


def configure(node: Path, text: str = "") -> None:
    (node / "config.toml").write_text(f'version = 1\nimports = []\n[registry]\nconfig_path = "{node}/hosts.d"\n{text}')


@pytest.fixture
def imgsvc(node: Path) -> Imgsvc:
    """Run `imgsvc hosts …` with the node's configuration; imgsvc("explain", "busybox", environ…)."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "imgsvc.cli", "hosts", *arguments, "--config", str(node / "config.toml")]
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**clean, **environ})

    return run


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        running.add(image_of(noise(3_000_000)), "library/app")
        yield running


def parsed(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_explain_for_people(node: Path, imgsvc: Imgsvc) -> None:
    hosts_d(node / "hosts.d", {"docker.io": f'server = "https://registry-1.docker.io"\n[host."http://{DEAD}"]\ncapabilities = ["pull"]\n'})
    done = imgsvc("explain", "app:2", HTTPS_PROXY="http://robot:hidden@proxy.example:3128")
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    place = node / "hosts.d/docker.io/hosts.toml"
    assert lines[0] == f"docker.io/library/app:2: registry docker.io, configured by {place}"
    for line in (
        f"1. http://{DEAD}/v2/library/app/manifests/2?ns=docker.io",
        f"from         {place}:2:7",
        "asked for    pull",
        "TLS          off (plain HTTP)",
        "2. https://registry-1.docker.io/v2/library/app/manifests/2",
        f"from         {place}:1:1",
        "proxy        http://proxy.example:3128 (environment)",
    ):
        assert line in lines, done.stdout
    assert "hidden" not in done.stdout + done.stderr


def test_explain_for_programs(node: Path, imgsvc: Imgsvc) -> None:
    hosts_d(node / "hosts.d", {"docker.io": f'[host."http://{DEAD}"]\n'})
    found = parsed(imgsvc("explain", "app", "--json"))
    assert found.keys() == {"reference", "namespace", "origin", "endpoints", "searched", "warnings", "problem", "deprecations"}
    assert (found["reference"], found["namespace"], found["problem"]) == ("docker.io/library/app:latest", "docker.io", "")
    first = found["endpoints"][0]
    assert first.keys() == {
        "url",
        "origin",
        "capabilities",
        "tls",
        "credential",
        "proxy",
        "headers",
        "token_hosts",
        "connect_timeout",
    }
    assert first["capabilities"] == ["pull", "resolve", "push", "referrers"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("blocked = true\n", "blocked"),
        ('capabilites = ["pull"]\n', "did you mean"),
        ("[host.\n", ":1:"),
        ('capabilities = ["push"]\n', "capability pull"),
    ],
)
def test_explain_fails_where_a_pull_would(node: Path, imgsvc: Imgsvc, text: str, words: str) -> None:
    hosts_d(node / "hosts.d", {"docker.io": text})
    done = imgsvc("explain", "app")
    assert done.returncode == 1
    (problem,) = (line for line in done.stdout.splitlines() if "PROBLEM" in line)
    assert words in problem
    assert f"{node}/hosts.d/docker.io/hosts.toml" in done.stdout
    in_json = imgsvc("explain", "app", "--json")
    assert in_json.returncode == 1
    assert words in parsed(in_json)["problem"]


def test_explain_names_where_credentials_would_come_from(node: Path, imgsvc: Imgsvc) -> None:
    (node / "password").write_text("hidden\n")
    (node / "password").chmod(0o600)
    configure(node, f'[registry.credentials.hosts."docker.io"]\nusername = "robot"\npassword_file = "{node}/password"\n')
    done = imgsvc("explain", "app")
    assert f"the caller's, else {node}/config.toml:" in done.stdout
    assert "hidden" not in done.stdout
    (node / "password").unlink()
    gone = imgsvc("explain", "app")
    assert f"UNUSABLE: {node}/password: " in gone.stdout
    assert gone.returncode == 1


def test_explain_says_what_of_the_configuration_is_old(node: Path, imgsvc: Imgsvc) -> None:
    configure(node, f'[registry.mirrors."docker.io"]\nendpoint = ["http://{DEAD}"]\n')
    done = imgsvc("explain", "app")
    assert done.returncode == 0, done.stderr
    assert f"1. http://{DEAD}/v2/library/app" in done.stdout
    assert "warning: " in done.stdout
    assert "hosts.toml" in done.stdout
    assert parsed(imgsvc("explain", "app", "--json"))["deprecations"]


@pytest.mark.parametrize("arguments", [["explain"], ["check", "a", "b"], ["explane", "a"], []])
def test_wrong_usage(imgsvc: Imgsvc, arguments: list[str]) -> None:
    assert imgsvc(*arguments).returncode == 2


@pytest.mark.parametrize("action", ["explain", "check"])
def test_a_name_that_is_none_and_a_configuration_that_is_none(node: Path, imgsvc: Imgsvc, action: str) -> None:
    done = imgsvc(action, "UPPER CASE")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    configure(node, "config_pth = 1\n")
    done = imgsvc(action, "app")
    assert done.returncode == 1
    assert f"{node}/config.toml:" in done.stderr
    assert "config_path" in done.stderr
    assert done.stderr.count("\n") == 1


def test_check_asks_every_endpoint(node: Path, imgsvc: Imgsvc, fake: FakeRegistry) -> None:
    hosts_d(node / "hosts.d", {"docker.io": f'server = "{fake.url}"\n'})
    done = imgsvc("check", "app")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{fake.url}/v2: ok (status 200" in done.stdout
    assert "MiB/s" in done.stdout
    (found,) = parsed(imgsvc("check", "app", "--json"))
    assert found.keys() == {
        "endpoint",
        "origin",
        "ok",
        "status",
        "credential",
        "tls",
        "latency",
        "speed",
        "clock_skew",
        "error",
        "token",
    }
    assert (found["endpoint"], found["ok"], found["status"], found["tls"]) == (f"{fake.url}/v2", True, 200, "off")
    assert found["speed"] > 0

    hosts_d(node / "hosts.d", {"docker.io": f'server = "{fake.url}"\n[host."http://{DEAD}"]\n'})
    done = imgsvc("check", "app")
    assert done.returncode == 1, "one endpoint that does not do is enough"
    assert f"http://{DEAD}/v2: FAILED (status none" in done.stdout
    assert f"{fake.url}/v2: ok" in done.stdout
    assert [entry["ok"] for entry in parsed(imgsvc("check", "app", "--json"))] == [False, True]


def test_check_without_a_name_asks_every_configured_registry(node: Path, imgsvc: Imgsvc, fake: FakeRegistry) -> None:
    empty = imgsvc("check")
    assert empty.returncode == 0
    assert "no registry is configured" in empty.stdout
    assert parsed(imgsvc("check", "--json")) == []
    with FakeRegistry() as second:
        hosts_d(node / "hosts.d", {"docker.io": f'server = "{fake.url}"\n', "b.test": f'server = "{second.url}"\n'})
        done = imgsvc("check")
        assert done.returncode == 0, done.stdout
        assert {entry["endpoint"] for entry in parsed(imgsvc("check", "--json"))} == {f"{fake.url}/v2", f"{second.url}/v2"}
        assert not [r for r in (*fake.requests, *second.requests) if r.path != "/v2/"]
        second.rule(second.on("/v2/", Reply(401, {"WWW-Authenticate": 'Basic realm="x"'})))
        done = imgsvc("check")
        assert done.returncode == 1
        assert f"{second.url}/v2: FAILED (status 401" in done.stdout
        assert f"{fake.url}/v2: ok" in done.stdout


def test_check_takes_only_directories_for_registries(node: Path, imgsvc: Imgsvc, fake: FakeRegistry) -> None:
    (node / "hosts.d/README.md").write_text("not a registry")
    hosts_d(node / "hosts.d", {"docker.io": f'server = "{fake.url}"\n', "_default": "blocked = true\n"})
    assert [entry["endpoint"] for entry in parsed(imgsvc("check", "--json"))] == [f"{fake.url}/v2"]


def test_check_says_of_what_it_asks_nobody(node: Path, imgsvc: Imgsvc) -> None:
    hosts_d(node / "hosts.d", {"_default": f'[host."http://{DEAD}"]\n', "*.corp.test": "blocked = true\n"})
    lines = imgsvc("check").stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{node}/hosts.d/{name}" for name in ("*.corp.test", "_default")]
    assert all("name an image" in line for line in lines)


def test_check_of_a_registry_with_a_broken_file_says_where_and_checks_the_others(node: Path, imgsvc: Imgsvc, fake: FakeRegistry) -> None:
    hosts_d(node / "hosts.d", {"a.test": "[host.\n", "docker.io": f'server = "{fake.url}"\n'})
    done = imgsvc("check")
    assert done.returncode == 1
    assert "a.test: FAILED" in done.stdout
    assert f"{node}/hosts.d/a.test/hosts.toml:1:" in done.stdout
    assert f"{fake.url}/v2: ok" in done.stdout
    broken, whole = parsed(imgsvc("check", "--json"))
    assert (broken["endpoint"], broken["ok"], whole["ok"]) == ("a.test", False, True)
    assert "not valid TOML" in broken["error"]


@pytest.fixture
def examples(node: Path) -> Path:
    """The examples as hosts.d, with the files they speak of."""
    root = node / "hosts.d"
    shutil.copytree(EXAMPLES, root, dirs_exist_ok=True)
    for name in ("registry.corp.example_5000_/corp-ca.crt", "secure.corp.example/corp-ca.crt"):
        (root / name).write_bytes(authority().pem)
    authority().issue("node").write(root / "secure.corp.example", "node")
    for name in ("registry.corp.example_5000_/password", "quay.io/cache-password"):
        (root / name).write_text("secret-of-the-example\n")
    for path in (*root.glob("*/credentials.toml"), *root.glob("*/*password")):
        path.chmod(0o600)
    return root


@pytest.mark.usefixtures("examples")
def test_the_examples_are_explained(imgsvc: Imgsvc) -> None:
    for name, code in (
        ("nginx", 0),
        ("registry.corp.example:5000/app", 0),
        ("secure.corp.example/app", 0),
        ("quay.io/org/app", 0),
        ("ghcr.io/org/app", 0),
        ("registry.k8s.io/pause:3.10", 0),
        ("internal.example/app", 1),
    ):
        done = imgsvc("explain", name)
        assert done.returncode == code, done.stdout + done.stderr
        assert ("PROBLEM" in done.stdout) == bool(code)
        assert "secret-of-the-example" not in done.stdout
        assert bool(parsed(imgsvc("explain", name, "--json"))["endpoints"]) == (not code)


def test_an_example_with_a_missing_file_is_named(examples: Path, imgsvc: Imgsvc) -> None:
    (examples / "secure.corp.example/corp-ca.crt").unlink()
    done = imgsvc("check", "secure.corp.example/app")
    assert done.returncode == 1
    assert f"{examples}/secure.corp.example/corp-ca.crt" in done.stdout + done.stderr
