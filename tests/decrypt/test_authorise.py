"""Salt, fingerprints and how long verdicts hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from imgsvc.base.oci import Digest
from imgsvc.decrypt.authorise import MAX_VERDICTS, OUTSIDE_TTL_S, Verdicts, key_fingerprint, load_salt, question
from imgsvc.decrypt.interfaces import KeyMissing, LayerKey
from imgsvc.decrypt.packets import LayerOptions
from tests.decrypt.vectors import seal

YES = LayerKey(b"secret", "print", "jwe", "type")
NO = KeyMissing(Digest.of(b""), (), hint="", lasting=True)


def test_a_salt_is_made_once_and_private(tmp_path: Path) -> None:
    salt = load_salt(tmp_path / "salt")

    assert len(salt) == 32
    assert load_salt(tmp_path / "salt") == salt
    assert (tmp_path / "salt").stat().st_mode & 0o777 == 0o600
    assert load_salt(tmp_path / "other") != salt


def test_a_cut_short_salt_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "salt").write_bytes(b"short")

    assert len(load_salt(tmp_path / "salt")) == 32
    assert load_salt(tmp_path / "salt") == (tmp_path / "salt").read_bytes()


def test_a_fingerprint_covers_key_and_nonce_and_hides_them() -> None:
    options = LayerOptions(b"k" * 32, b"n" * 16, b"m" * 32)
    prints = {
        key_fingerprint(b"salt", options),
        key_fingerprint(b"pepper", options),
        key_fingerprint(b"salt", replace(options, symkey=b"x" * 32)),
        key_fingerprint(b"salt", replace(options, nonce=b"x" * 16)),
    }
    assert len(prints) == 4
    assert key_fingerprint(b"salt", replace(options, hmac=b"x" * 32)) == key_fingerprint(b"salt", options)


def test_a_question_covers_all_that_takes_part_and_nothing_else() -> None:
    layer = seal(b"x").descriptor(jwe=b"a", pgp=b"b")

    assert question(layer) == question(replace(layer, annotations={**layer.annotations, "org.example": "x"}))
    for name in layer.annotations:
        assert question(layer) != question(replace(layer, annotations={**layer.annotations, name: "x"}))
    assert question(layer) != question(replace(layer, media_type="x"))
    assert question(layer) != question(replace(layer, digest=Digest.of(b"other")))


def test_verdicts_hold_for_one_generation() -> None:
    verdicts = Verdicts()
    verdicts.put("q", 1, YES, lasting=True)

    assert verdicts.get("q", 1) is YES
    assert verdicts.get("q", 2) is None
    assert verdicts.get("q", 1) is None, "a generation does not come back"


def test_answers_from_outside_last_a_minute_and_refusals_from_there_not_at_all() -> None:
    now = [0.0]
    verdicts = Verdicts(lambda: now[0])
    verdicts.put("yes", 1, YES, lasting=False)
    verdicts.put("no", 1, NO, lasting=False)
    verdicts.put("lasting no", 1, NO, lasting=True)

    assert verdicts.get("no", 1) is None
    now[0] = OUTSIDE_TTL_S
    assert verdicts.get("yes", 1) is YES
    now[0] += 1
    assert verdicts.get("yes", 1) is None
    assert verdicts.get("lasting no", 1) is NO


def test_verdicts_are_bounded_and_the_unused_go_first() -> None:
    verdicts = Verdicts()
    verdicts.put("first", 1, YES, lasting=True)
    for number in range(MAX_VERDICTS):
        verdicts.put(str(number), 1, YES, lasting=True)
        verdicts.get("first", 1)

    assert verdicts.get("first", 1) is YES
    assert verdicts.get("0", 1) is None
