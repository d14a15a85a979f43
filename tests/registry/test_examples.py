"""hosts.d.example: every file is loaded and explained, and does what its comments say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from imgsvc.base.reference import Reference
from imgsvc.registry.auth.credentials import CredentialSettings, NodeCredentials
from imgsvc.registry.hosts.explain import Explanation, explain, render
from imgsvc.registry.hosts.hostdirs import HostDirectories
from tests.registry.certs import authority
from tests.registry.support import hosts_d

EXAMPLES = Path(__file__).parents[2] / "hosts.d.example"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The examples with the files they speak of."""
    root = tmp_path / "hosts.d"
    shutil.copytree(EXAMPLES, root)
    for name in ("registry.corp.example_5000_/corp-ca.crt", "secure.corp.example/corp-ca.crt"):
        (root / name).write_bytes(authority().pem)
    authority().issue("node").write(root / "secure.corp.example", "node")
    for name in ("registry.corp.example_5000_/password", "quay.io/cache-password"):
        (root / name).write_text("secret-of-the-example\n")
    for path in (*root.glob("*/credentials.toml"), *root.glob("*/*password")):
        path.chmod(0o600)
    return root


def explained(root: Path, reference: str, environ: dict[str, str] | None = None) -> Explanation:
    return explain(HostDirectories((str(root),)), NodeCredentials(CredentialSettings()), Reference.parse(reference), environ or {})


@pytest.mark.parametrize(
    "reference, urls",
    [
        (
            "nginx:1.27",
            [
                "https://mirror.corp.example/v2/library/nginx/manifests/1.27?ns=docker.io",
                "https://mirror.site-b.example/v2/library/nginx/manifests/1.27?ns=docker.io",
                "https://registry-1.docker.io/v2/library/nginx/manifests/1.27",
            ],
        ),
        ("registry.corp.example:5000/app", ["https://registry.corp.example:5000/v2/app/manifests/latest"]),
        ("secure.corp.example/app", ["https://secure.corp.example/v2/app/manifests/latest"]),
        (
            "quay.io/org/app",
            [
                "https://cache.corp.example/v2/quay-proxy/org/app/manifests/latest?ns=quay.io",
                "https://quay.io/v2/org/app/manifests/latest",
            ],
        ),
        (
            "ghcr.io/org/app",
            [
                "https://mirror.corp.example/v2/org/app/manifests/latest?ns=ghcr.io",
                "https://mirror.site-b.example/v2/org/app/manifests/latest?ns=ghcr.io",
            ],
        ),
        ("registry.k8s.io/pause:3.10", ["http://registry.inside.example:5000/v2/pause/manifests/3.10?ns=registry.k8s.io"]),
        ("internal.example/app", []),
        ("hub.partner.example/app", []),
        ("hub.partner.example/toolsmith/app", []),
        (
            "hub.partner.example/tools/lint:2",
            ["https://mirror.corp.example/v2/partner-tools/lint/manifests/2?ns=hub.partner.example"],
        ),
    ],
)
def test_which_urls_are_asked_in_which_order(root: Path, reference: str, urls: list[str]) -> None:
    explanation = explained(root, reference)
    assert [endpoint.url for endpoint in explanation.endpoints] == urls
    assert bool(explanation.problem) == (not urls)
    assert not explanation.warnings
    for endpoint in explanation.endpoints:
        position = re.fullmatch(r"(/.*hosts\.toml)(:\d+:\d+| \(no server.*)", endpoint.origin)
        assert position
        assert Path(position[1]).is_file()


def test_every_example_is_covered() -> None:
    directories = {str(path.parent.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("hosts.toml")}
    assert directories == {
        "docker.io",
        "registry.corp.example_5000_",
        "secure.corp.example",
        "quay.io",
        "ghcr.io",
        "_default",
        "internal.example",
        "*.partner.example",
        "*.partner.example/tools",
    }
    assert all(f"`{name.partition('/')[0]}/`" in (EXAMPLES / "README.md").read_text() for name in directories)


def test_credentials_tls_and_proxies_are_named_never_shown(root: Path) -> None:
    hub = explained(root, "nginx", {"HTTPS_PROXY": "http://user:pw@env-proxy.example:1"})
    assert [endpoint.proxy for endpoint in hub.endpoints] == [
        "http://env-proxy.example:1 (environment)",
        "http://proxy.site-b.example:3128 (hosts.toml)",
        "http://env-proxy.example:1 (environment)",
    ]
    assert hub.endpoints[2].token_hosts == ("auth.docker.io", "registry-1.docker.io")
    corp = explained(root, "registry.corp.example:5000/app").endpoints[0]
    assert corp.credential == f"the caller's, else {root}/registry.corp.example_5000_/credentials.toml:1:2"
    assert "corp-ca.crt" in corp.tls
    assert "login.corp.example" in corp.token_hosts
    assert "node.cert" in explained(root, "secure.corp.example/app").endpoints[0].tls
    cache = explained(root, "quay.io/org/app").endpoints[0]
    assert "[cache]" in cache.credential
    assert cache.headers == ("x-team",)
    everything = "".join(str(explained(root, name).to_json()) for name in ("nginx", "quay.io/a/b", "registry.corp.example:5000/app"))
    assert "secret-of-the-example" not in everything
    assert "pw" not in hub.endpoints[0].proxy


def test_the_output_for_people_and_for_programs(root: Path) -> None:
    explanation = explained(root, "nginx")
    text = "\n".join(render(explanation))
    for part in ("1. https://mirror.corp.example", "hosts.toml:5:7", "pull, resolve", "certificate verified", "_default: not read"):
        assert part in text
    assert json.loads(json.dumps(explanation.to_json())).keys() == {
        "reference",
        "namespace",
        "origin",
        "endpoints",
        "searched",
        "warnings",
        "problem",
    }


def test_a2_9_what_decides_and_what_does_not_is_said(root: Path) -> None:
    text = "\n".join(render(explained(root, "hub.partner.example/tools/lint:2")))
    assert "*.partner.example/tools/hosts.toml:7:7" in text
    assert "*.partner.example/tools: used, for hub.partner.example/tools and below" in text
    assert f"*.partner.example: not read: {root}/*.partner.example/tools is more specific" in text
    assert f"blocked ({root}/*.partner.example/hosts.toml:2:1" in explained(root, "hub.partner.example/app").problem


def test_files_that_cannot_be_used_are_a_problem_before_anybody_is_asked(root: Path) -> None:
    hosts_d(root, {"a.test": 'ca = "hosts.toml"\n', "b.test": 'credentials = "robot"\n'})
    for reference, file in (("a.test/x", "a.test/hosts.toml"), ("b.test/x", "b.test/credentials.toml")):
        explanation = explained(root, reference)
        assert explanation.problem.startswith(f"{root}/{file}: ")
        assert "UNUSABLE" in "".join(render(explanation))


def test_a_wrong_file_is_explained_too(root: Path) -> None:
    hosts_d(root, {"docker.io": "capabilites = ['pull']\n"})
    explanation = explained(root, "nginx")
    assert "did you mean" in explanation.problem
    assert explanation.origin == f"{root}/docker.io/hosts.toml:1:1"
    assert "PROBLEM" in "\n".join(render(explanation))


def test_missing_roots_and_missing_powers_are_said(root: Path, tmp_path: Path) -> None:
    hosts_d(root, {"a.test": 'fallback = false\n[host.m]\ncapabilities = ["pull"]\n', "b.test": 'capabilities = ["push"]\n'})
    assert "digest" in explained(root, "a.test/x").problem
    assert "capability pull" in explained(root, "b.test/x").problem
    nowhere = explain(HostDirectories((str(tmp_path / "no"),)), NodeCredentials(CredentialSettings()), Reference.parse("x"), {})
    assert any("no such directory" in warning for warning in nowhere.warnings)
