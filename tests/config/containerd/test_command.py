"""`imgsvc config import`."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgsvc import config
from imgsvc.cli.main import main

CRI = 'plugins."io.containerd.grpc.v1.cri"'


def test_the_command_keeps_secrets_private_and_exits_1_on_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.toml", tmp_path / "out.toml"
    source.write_text(f'version = 2\n[{CRI}.registry.configs."h".auth]\npassword = "hunter2"\n[grpc]\ntcp_address = "x"\n')

    code = main(["config", "import", str(source), "--output", str(target)])

    shown = capsys.readouterr()
    assert code == 1
    assert "tcp_address refused" in shown.err
    assert "hunter2" not in shown.out + shown.err
    assert target.stat().st_mode & 0o777 == 0o600
    assert config.parse(target.read_text(), "result").config.registry.configs["h"]["auth"]["password"] == "hunter2"
