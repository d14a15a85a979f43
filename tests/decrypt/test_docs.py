"""What docs/encrypted-images.md shows is what the code takes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from imgsvc import config
from imgsvc.daemon.settings import decrypt as decryption
from imgsvc.decrypt.keyprovider import load_providers
from imgsvc.decrypt.keys import TokenFile
from imgsvc.decrypt.pkcs11 import ModulePolicy, load_policy, parse_token_file
from tests.decrypt.softhsm import MODULE

PAGE = (Path(__file__).parents[2] / "docs" / "encrypted-images.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_configurations_are_good(tmp_path: Path) -> None:
    passwords, processors = (decryption.check(config.parse(f"version = 1\n{block}", "page")).config for block in blocks("toml"))
    assert passwords.decrypt.passwords
    assert processors.stream_processors
    (providers,) = blocks("json")
    (tmp_path / "providers.json").write_text(providers)
    assert [p.name for p in load_providers(tmp_path / "providers.json")] == ["vault", "kms"]


def test_the_token_files_are_good(tmp_path: Path) -> None:
    token, policy = blocks("yaml")
    (tmp_path / "policy").write_text(policy)
    assert load_policy(str(tmp_path / "policy")).allows("/opt/hsm/lib/module.so")
    if not os.path.exists(MODULE):
        pytest.skip("SoftHSM is not installed")
    (tmp_path / "pin").write_text("1234")
    key = parse_token_file(TokenFile("page", token.replace("/run/secrets/pin", str(tmp_path / "pin")).encode()), ModulePolicy())
    assert (key.token, key.label, key.pin, Path(key.module).name) == ("images", "node", "1234", Path(MODULE).name)
