"""The key directory: what is found, what is passed over, and when it is read again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from imgsvc.decrypt.keydir import MAX_KEY_FILE, KeyDirectory
from tests.decrypt.test_keys import dump

PASSWORD = b"correct horse"


@pytest.fixture
def pem(rsa_key: rsa.RSAPrivateKey) -> bytes:
    return dump(rsa_key, "PEM", "PKCS8")


@pytest.fixture
def locked(rsa_key: rsa.RSAPrivateKey) -> bytes:
    return dump(rsa_key, "PEM", "PKCS8", PASSWORD)


def count(directory: KeyDirectory) -> int:
    return len(directory.load()[0])


def test_keys_are_found_in_subdirectories_and_behind_links(
    tmp_path: Path, pem: bytes, ec_keys: dict[str, ec.EllipticCurvePrivateKey]
) -> None:
    keys = tmp_path / "keys"
    (keys / "a" / "b").mkdir(parents=True)
    (keys / "a" / "b" / "deep").write_bytes(pem)
    (tmp_path / "elsewhere").write_bytes(dump(ec_keys["secp384r1"], "PEM", "TraditionalOpenSSL"))
    (keys / "link").symlink_to(tmp_path / "elsewhere")
    (keys / "again").symlink_to("link")
    (keys / "circle").symlink_to(keys)
    (keys / "dangling").symlink_to("nowhere")

    assert count(KeyDirectory(keys)) == 2


def test_a_secret_volume_is_read_once_and_followed_when_it_moves(tmp_path: Path, pem: bytes, locked: bytes) -> None:
    for version, data in (("..2026_01", pem), ("..2026_02", locked)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "key.pem").write_bytes(data)
    (tmp_path / "..data").symlink_to("..2026_01")
    (tmp_path / "key.pem").symlink_to("..data/key.pem")
    directory = KeyDirectory(tmp_path)

    assert count(directory) == 1
    (tmp_path / "..new").symlink_to("..2026_02")
    (tmp_path / "..new").rename(tmp_path / "..data")
    ring, _ = directory.load()
    assert len(ring) == 0
    assert "key.pem" in ring.skipped[0]


def test_a_bad_file_never_hides_a_good_one(tmp_path: Path, pem: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "0-README").write_text("keys go here")
    (tmp_path / "1-broken.pem").write_bytes(pem[:300])
    (tmp_path / "2-empty").touch()
    (tmp_path / "3-huge").write_bytes(b"x" * (MAX_KEY_FILE + 1))
    os.mkfifo(tmp_path / "4-fifo")
    (tmp_path / "5-good").write_bytes(pem)
    (tmp_path / "5-good").chmod(0o600)
    directory = KeyDirectory(tmp_path)

    with caplog.at_level(logging.WARNING):
        ring, _ = directory.load()
        directory.load()

    assert len(ring) == 1
    assert [s.partition(":")[0] for s in ring.skipped] == ["0-README", "1-broken.pem", "3-huge"]
    assert len(caplog.records) == 3, "each is logged once"


def test_a_missing_directory_is_no_keys_until_it_comes(tmp_path: Path, pem: bytes) -> None:
    directory = KeyDirectory(tmp_path / "keys")
    ring, before = directory.load()
    assert len(ring) == 0
    assert "does not exist" in ring.source

    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "key").write_bytes(pem)
    ring, after = directory.load()
    assert len(ring) == 1
    assert after > before
    assert "does not exist" not in ring.source


def test_one_file_can_be_the_path(tmp_path: Path, pem: bytes) -> None:
    (tmp_path / "key").write_bytes(pem)

    assert count(KeyDirectory(tmp_path / "key")) == 1
    assert count(KeyDirectory(None)) == 0


def test_the_generation_grows_only_with_changes(tmp_path: Path, pem: bytes) -> None:
    key = tmp_path / "key"
    key.write_bytes(pem)
    directory = KeyDirectory(tmp_path)
    (first, one), (second, two) = directory.load(), directory.load()
    assert one == two
    assert first is second

    # Same length and mtime, another inode: what `mv` of a prepared file looks like.
    times = key.stat()
    other = tmp_path.parent / "other"
    other.write_bytes(pem[:-30] + b"A" + pem[-29:])
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.rename(key)
    _, three = directory.load()
    key.unlink()
    ring, four = directory.load()
    assert two < three < four
    assert len(ring) == 0


def test_passwords_come_from_a_file_beside_or_from_the_configuration(tmp_path: Path, locked: bytes) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "a.pem").write_bytes(locked)
    directory = KeyDirectory(keys)
    assert count(directory) == 0

    (keys / "a.pem.password").write_bytes(PASSWORD + b"\n")
    ring, _ = directory.load()
    assert len(ring) == 1
    assert ring.skipped == (), "the password's file is not taken for a key"

    (keys / "a.pem.password").unlink()
    assert count(directory) == 0
    (tmp_path / "secret").write_bytes(PASSWORD)
    assert count(KeyDirectory(keys, {"a.pem": tmp_path / "secret"})) == 1


def test_c_e3_a_key_that_others_can_read_is_used_and_reported(tmp_path: Path, pem: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").write_bytes(pem)
    (tmp_path / "key").chmod(0o644)

    assert count(KeyDirectory(tmp_path)) == 1
    assert "0644" in caplog.text
    assert "PRIVATE" not in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_c_e3_an_unreadable_key_is_skipped(tmp_path: Path, pem: bytes) -> None:
    (tmp_path / "bad").write_bytes(pem)
    (tmp_path / "bad").chmod(0)
    (tmp_path / "good").write_bytes(pem)

    ring, _ = KeyDirectory(tmp_path).load()
    assert len(ring) == 1
    assert "Permission denied" in ring.skipped[0]
