"""`config check` reads what a configuration refers to; the daemon goes on and tells the kubelet."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgsvc import config
from imgsvc.api import cri_pb2
from imgsvc.daemon import preflight
from tests.support.daemon import RPC_TIMEOUT, Daemon

GOOD = '[registry]\nconfig_path = "/nowhere"\n[prepull]\ndirectory = "/nowhere"\n'


@pytest.mark.parametrize(
    "text, what",
    [
        ('[images]\npinned_images = ["Bad Name"]\n', "file:7:1: images.pinned_images"),
        ('[verify]\npolicy = "/nowhere/policy.toml"\n', "/nowhere/policy.toml"),
        ('[metrics]\naddress = "9338"\n', "metrics address"),
        ('[mirror]\naddress = "127.0.0.1:1"\ntls_cert_file = "/nowhere/c"\ntls_key_file = "/nowhere/k"\n', "/nowhere/c"),
        ('[decrypt]\nkeyprovider_config = "/etc/passwd"\n', "/etc/passwd"),
        ('[registry.mirrors."a.example"]\nendpoint = ["ftp://x"]\n', "ftp"),
    ],
)
def test_what_will_not_work_is_a_problem(text: str, what: str) -> None:
    found = preflight.inspect(config.parse(f"version = 1\n{GOOD}{text}", "file"))

    assert len(found.problems) == 1
    assert what in found.problems[0]


def test_broken_files_of_registries_and_pre_pull_are_all_told_of(tmp_path: Path) -> None:
    for name, text in (("a.example/hosts.toml", "nonsense = 1\n"), ("b.example/hosts.toml", 'server = "ftp://x"\n')):
        (tmp_path / "hosts" / name).parent.mkdir(parents=True)
        (tmp_path / "hosts" / name).write_text(text)
    (tmp_path / "pre").mkdir()
    (tmp_path / "pre" / "a.toml").write_text("version = 2\n")
    text = f'[registry]\nconfig_path = "{tmp_path}/hosts"\n[prepull]\ndirectory = "{tmp_path}/pre"\n[mirror]\naddress = "0.0.0.0:1"\n'

    found = preflight.inspect(config.parse(f"version = 1\n{text}", "file"))

    assert [problem.partition(":")[0].removeprefix(str(tmp_path)) for problem in found.problems] == [
        "/pre/a.toml",
        "/hosts/a.example/hosts.toml",
        "/hosts/b.example/hosts.toml",
    ]
    (warning,) = found.warnings
    assert "plain HTTP" in warning


def test_the_command_says_all_of_it_and_the_running_daemon_tells_the_kubelet(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(settings="")
    daemon.config.write_text(daemon.config.read_text().replace("[registry]\n", "[registry]\nmirrors.'a.example'.endpoint = ['http://b']\n"))
    daemon.start()

    def condition() -> cri_pb2.RuntimeCondition:
        conditions = daemon.runtime().Status(cri_pb2.StatusRequest(), timeout=RPC_TIMEOUT).status.conditions
        return next(c for c in conditions if c.type == "ConfigurationHasNoWarnings")

    deadline = time.monotonic() + RPC_TIMEOUT
    while condition().status and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "registry.mirrors is deprecated" in condition().message

    checked = subprocess.run([sys.executable, "-m", "imgsvc.cli", "config", "check", str(daemon.config)], capture_output=True, text=True)
    assert checked.returncode == 0
    assert "registry.mirrors is deprecated" in checked.stderr
    assert checked.stdout == f"good: {daemon.config}\n"
