"""OpenPGP: keys of every kind that gpg makes and images use, opened without gpg."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from imgsvc.decrypt.interfaces import NotOpened
from imgsvc.decrypt.keys import KeyFileError, parse_key_file
from imgsvc.decrypt.pgp import PgpWrapper
from tests.decrypt.foreign import Foreign, export_gpg_key, make_gpg_key

pytestmark = pytest.mark.compat
OPTIONS = b'{"symkey":"AAAA"}'
KINDS = {
    "rsa": "Key-Type: RSA\nKey-Length: 2048\nSubkey-Type: RSA\nSubkey-Length: 2048",
    "cv25519": "Key-Type: EDDSA\nKey-Curve: ed25519\nSubkey-Type: ECDH\nSubkey-Curve: cv25519",
    "nistp256": "Key-Type: ECDSA\nKey-Curve: nistp256\nSubkey-Type: ECDH\nSubkey-Curve: nistp256",
    "nistp384": "Key-Type: ECDSA\nKey-Curve: nistp384\nSubkey-Type: ECDH\nSubkey-Curve: nistp384",
    "nistp521": "Key-Type: ECDSA\nKey-Curve: nistp521\nSubkey-Type: ECDH\nSubkey-Curve: nistp521",
}
PASSPHRASE = "correct horse"


@dataclass(frozen=True)
class Ring:
    """Exported keys, binary and armored, by kind; "locked" is cv25519 with a passphrase."""

    at: Foreign
    binary: dict[str, bytes]
    armored: dict[str, bytes]

    def encrypt(self, *kinds: str, hidden: bool = False) -> bytes:
        command = ["gpg", "--batch", "--quiet", "--trust-model", "always", "--compress-algo", "none"]
        flag = "--hidden-recipient" if hidden else "--recipient"
        return self.at.run(*command, *(w for k in kinds for w in (flag, f"{k}@example.test")), "--encrypt", data=OPTIONS)


@pytest.fixture(scope="module")
def ring(outside: Foreign) -> Ring:
    binary, armored = {}, {}
    for name, kind in {**KINDS, "locked": KINDS["cv25519"]}.items():
        locked = name == "locked"
        make_gpg_key(outside, kind, f"{name}@example.test", PASSPHRASE if locked else "")
        extra = ["--passphrase", PASSPHRASE] if locked else []
        binary[name] = export_gpg_key(outside, f"{name}@example.test", *extra)
        armored[name] = export_gpg_key(outside, f"{name}@example.test", *extra, "--armor")
    return Ring(outside, binary, armored)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_key_opens_its_message(ring: Ring, kind: str) -> None:
    packet = ring.encrypt(kind)

    for file in (ring.binary[kind], ring.armored[kind]):
        assert PgpWrapper(parse_key_file(file, "key")).unwrap(packet) == OPTIONS


def test_each_of_many_recipients_opens_it(ring: Ring) -> None:
    packet = ring.encrypt(*KINDS)

    assert len(PgpWrapper(parse_key_file(b"", "key")).recipients(packet)) == len(KINDS)
    for kind in KINDS:
        assert PgpWrapper(parse_key_file(ring.binary[kind], "key")).unwrap(packet) == OPTIONS


def test_a_hidden_recipient_is_found_by_trial(ring: Ring) -> None:
    packet = ring.encrypt("cv25519", hidden=True)
    everything = parse_key_file(b"".join(ring.binary[k] for k in KINDS), "ring")

    assert PgpWrapper(everything).unwrap(packet) == OPTIONS
    assert PgpWrapper(everything).recipients(packet) == ["hidden key ID"]


def test_a_locked_key_opens_with_its_passphrase_only(ring: Ring) -> None:
    packet = ring.encrypt("locked")
    unlocked = parse_key_file(ring.binary["locked"], "key", [b"wrong", PASSPHRASE.encode()])

    assert PgpWrapper(unlocked).unwrap(packet) == OPTIONS
    for passphrases in ([], [b"wrong"]):
        with pytest.raises(KeyFileError, match="locked"):
            parse_key_file(ring.binary["locked"], "key", passphrases)


def test_another_key_does_not_open_it(ring: Ring) -> None:
    with pytest.raises(NotOpened):
        PgpWrapper(parse_key_file(ring.binary["rsa"], "key")).unwrap(ring.encrypt("cv25519"))


def test_large_messages_in_partial_lengths_open(ring: Ring) -> None:
    command = ["gpg", "--batch", "--quiet", "--trust-model", "always", "--compress-algo", "none", "-r", "rsa@example.test", "--encrypt"]
    data = b"{" + b" " * 100_000 + b"}"

    assert PgpWrapper(parse_key_file(ring.binary["rsa"], "key")).unwrap(ring.at.run(*command, data=data)) == data


@pytest.mark.parametrize("kind", ["rsa", "cv25519", "nistp256"])
def test_damage_anywhere_opens_nothing_else(ring: Ring, kind: str) -> None:
    packet, keys = ring.encrypt(kind), parse_key_file(ring.binary[kind], "key")
    chance = random.Random(5)
    for _ in range(200):
        damaged = bytearray(packet)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        data = bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        PgpWrapper(keys).recipients(data)
        try:
            assert PgpWrapper(keys).unwrap(data) == OPTIONS  # the flip hit a byte that says nothing, such as the MPI's bit count
        except NotOpened:
            continue


def test_damaged_keyrings_give_keys_or_a_reason(ring: Ring) -> None:
    chance = random.Random(3)
    for _ in range(60):
        damaged = bytearray(ring.binary["rsa"])
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        try:
            parse_key_file(bytes(damaged[: chance.randrange(1, len(damaged))]), "key")
        except KeyFileError:
            continue
