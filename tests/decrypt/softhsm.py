"""A SoftHSM token of the test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "s3cret-pin"


def make_token(root: Path, keys: Mapping[str, rsa.RSAPrivateKey]) -> dict[str, str]:
    """A token "images" with these keys, label → key, ids from 01 on. Returns the environment its users need. Skips where there is none."""
    pytest.importorskip("pkcs11", reason="imgsvc[pkcs11] is not installed")
    if not shutil.which("softhsm2-util") or not os.path.exists(MODULE):
        pytest.skip("SoftHSM is not installed")
    (root / "tokens").mkdir()
    (root / "conf").write_text(f"directories.tokendir = {root}/tokens\nlog.level = ERROR\n")
    env = {"SOFTHSM2_CONF": str(root / "conf")}

    def util(*arguments: str) -> None:
        subprocess.run(["softhsm2-util", *arguments], env={**os.environ, **env}, check=True, capture_output=True)

    util("--init-token", "--free", "--label", "images", "--pin", PIN, "--so-pin", PIN)
    for number, (name, key) in enumerate(keys.items(), 1):
        (root / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        util("--import", str(root / name), "--token", "images", "--label", name, "--id", f"{number:02}", "--pin", PIN)
    return env


def uri(path: str = "token=images;object=first", query: str = f"module-path={MODULE}&pin-value={PIN}") -> str:
    return f"pkcs11:{path}?{query}"
