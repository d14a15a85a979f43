"""containerd's inline registry tables (A2.10)."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from imgsvc.base.errors import InvalidArgument
from imgsvc.registry.hosts.hosts import Capability
from imgsvc.registry.hosts.legacy import parse_legacy


def test_everything_is_carried_over_and_warned_about() -> None:
    tables: dict[str, Any] = {
        "mirrors": {"r.test": {"endpoint": ["http://m.test:5000"]}},
        "configs": {
            "m.test:5000": {"tls": {"ca_file": "/ca", "cert_file": "/c", "key_file": "/k", "insecure_skip_verify": True}},
            "r.test": {"auth": {"username": "u", "password": "p"}},
        },
        "auths": {"https://other.test/v1/": {"auth": base64.b64encode(b"a:b").decode()}},
        "headers": {"X-Test": ["1"]},
    }
    legacy = parse_legacy(tables, "config.toml")
    host = legacy.hosts["r.test"].hosts[0]
    assert (host.tls.ca, host.tls.client, host.tls.skip_verify) == (("/ca",), (("/c", "/k"),), True)
    assert host.headers == (("X-Test", "1"),)
    assert Capability.PUSH not in host.capabilities
    assert host.url == "http://m.test:5000/v2"
    assert (legacy.credentials["r.test"].username, legacy.credentials["other.test"].password) == ("u", "b")
    assert len(legacy.warnings) == 5
    assert all("config.toml" in warning for warning in legacy.warnings)


def test_tls_of_a_registry_without_mirrors() -> None:
    legacy = parse_legacy({"configs": {"r.test": {"tls": {"ca_file": "/ca"}}}}, "c")
    assert legacy.hosts["r.test"].hosts[0].url == "https://r.test/v2"
    assert legacy.hosts["r.test"].hosts[0].tls.ca == ("/ca",)


def test_nothing_is_nothing() -> None:
    assert parse_legacy({}, "c").warnings == ()


@pytest.mark.parametrize(
    "tables",
    [
        {"mirrors": []},
        {"mirrors": {"x": {"endpoint": "https://m"}}},
        {"mirrors": {"x": {"endpoint": ["nope://m"]}}},
        {"configs": {"x": {"tls": {"ca": "/x"}}}},
        {"configs": {"x": {"auth": {"auth": "%%%"}}}},
        {"headers": {"X": [1]}},
    ],
)
def test_what_is_not_understood_is_refused_without_quoting_secrets(tables: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_legacy(tables, "c")
    assert "%%%" not in str(caught.value)
