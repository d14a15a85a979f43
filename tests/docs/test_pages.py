"""The pages in docs/ are true: their files are read, their commands are run, in order, against a daemon configured as they say.

Marks in a page, as comments in front of a fenced block: `file: PATH` writes the block there, `config` adds it to the
daemon's configuration, `run` runs it. Paths of a node are put below a directory of the test, ports and registries are ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imgsvc import config
from imgsvc.images.prepull.plan import load_plan
from tests.support import images
from tests.support.daemon import Daemon
from tests.support.registries import RealRegistry, free_port

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"<!-- (?P<mark>run|config|file: (?P<path>\S+)) -->\n```\w*\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(mark, path, text) of every marked block."""
    found = [(m["mark"].partition(":")[0], m["path"] or "", m["text"]) for m in BLOCK.finditer((DOCS / page).read_text())]
    assert found, f"{page} has no marked block"
    return found


@pytest.mark.parametrize("page", ["kubelet.md", "prepull-and-cache.md", "mirrors.md", "verification.md"])
def test_what_a_page_says_works(page: str, make_daemon: Callable[..., Daemon], registry: RealRegistry) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    for name, tag in (("busybox", "latest"), ("nginx", "1.27")):
        registry.push(images.busybox(Labels={"name": name}), f"library/{name}", tag)
    daemon = make_daemon()
    place = daemon.directory
    replaced = {
        "/etc/imgsvc/hosts.d": f"{place}/hosts.d",
        "/etc/imgsvc": f"{place}/etc",
        "/etc/containerd": f"{place}/containerd",
        "/opt/containerd": f"{place}/opt",
        "/srv": f"{place}",
        "/var/run/nri": f"{place}",
        "https://mirror.example": f"http://{registry.address}",
        "https://registry-1.docker.io": f"http://{registry.address}",
        "127.0.0.1:5001": f"127.0.0.1:{free_port()}",
        "127.0.0.1:9338": f"127.0.0.1:{free_port()}",
    }

    def ours(text: str) -> str:
        for theirs, mine in replaced.items():
            text = text.replace(theirs, mine)
        return text

    daemon.map_host("docker.io", registry.address)
    (place / "etc").mkdir()
    for mark, path, text in blocks(page):
        if mark == "file":
            target = Path(ours(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(ours(text))
    settings = [ours(text) for mark, _, text in blocks(page) if mark == "config"]
    for text in settings:
        config.parse(text, page)
    merged = place / "conf.d"
    merged.mkdir()
    for number, text in enumerate(settings):
        (merged / f"{number}.toml").write_text(text)
    (merged / "prepull.toml").write_text(f'[prepull]\ndirectory = "{place}/etc/prepull.d"\n')
    daemon.config.write_text(daemon.config.read_text().replace("imports = []", f'imports = ["{merged}/*.toml"]'))
    daemon.start()
    bin_dir = place / "bin"
    bin_dir.mkdir()
    script = f'#!/bin/sh\ncase "$1" in hosts) c="--config {daemon.config}";; esac\nexec {sys.executable} -m imgsvc.cli "$@" $c\n'
    (bin_dir / "imgsvc").write_text(script)
    (bin_dir / "imgsvc").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": str(DOCS.parent),
        "IMGSVC_ADDRESS": daemon.address,
        "no_proxy": "*",
    }
    for mark, _, text in blocks(page):
        if mark == "run":
            for command in ours(text).splitlines():
                result = subprocess.run(["sh", "-uc", command], capture_output=True, text=True, timeout=60, env=environment)
                assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((DOCS / page).read_text()):
        assert (DOCS / target).exists(), f"{page}: {target}"


def test_the_daemonsets_files_are_valid(tmp_path: Path) -> None:
    text = (DOCS / "deploy" / "daemonset.yaml").read_text()
    files = dict(re.findall(r"^  (\w+\.toml): \|\n((?:    .*\n)+)", text, re.MULTILINE))
    plain = {name: re.sub(r"^    ", "", body, flags=re.MULTILINE) for name, body in files.items()}

    config.parse(plain["config.toml"], "config.toml")
    (tmp_path / "prepull.toml").write_text(plain["prepull.toml"])
    assert load_plan(tmp_path / "prepull.toml").images


@pytest.mark.compat
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed")
    unit = tmp_path / "imgsvc.service"
    unit.write_text((DOCS / "deploy" / "imgsvc.service").read_text().replace("/usr/local/bin/imgsvc", "/bin/true"))

    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)

    complaints = [line for line in result.stderr.splitlines() if "imgsvc.service" in line]
    assert complaints == []
