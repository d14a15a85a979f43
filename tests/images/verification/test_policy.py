"""The policy file."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgsvc.base.errors import InvalidArgument
from imgsvc.images.verification.policy import Decision, Policy, load_policy
from tests.images.verification import vectors


def policy(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "k.pub").write_bytes(vectors.PUBLIC_KEY)
    file = tmp_path / "policy.toml"
    file.write_text(text)
    return load_policy(file)


RULES = """
version = 1
default = "deny"
[[rule]]
prefix = "registry.example"
decision = "allow"
[[rule]]
prefix = "registry.example/team/"
decision = "signed"
keys = ["k.pub"]
[[rule]]
prefix = "registry.example/team/scratch"
decision = "deny"
"""


@pytest.mark.parametrize(
    "name, decision",
    [
        ("registry.example/app", Decision.ALLOW),
        ("registry.example/team/app", Decision.SIGNED),
        ("registry.example/team", Decision.SIGNED),
        ("registry.example/teams/app", Decision.ALLOW),
        ("registry.example/team/scratch/app", Decision.DENY),
        ("registry.example.evil/team/app", Decision.DENY),
        ("docker.io/library/app", Decision.DENY),
    ],
)
def test_the_longest_prefix_of_whole_components_decides(tmp_path: Path, name: str, decision: Decision) -> None:
    assert policy(tmp_path, RULES).rule_for(name).decision is decision


@pytest.mark.parametrize(
    "text, place",
    [
        ('version = 2\ndefault = "deny"\n', ":1:1"),
        ('version = 1\ndefault = "maybe"\n', ":2:1"),
        ("version = 1\n", ""),
        ('version = 1\ndefault = "deny"\nrules = []\n', ":3:1"),
        ('version = 1\ndefault = "deny"\n[[rule]]\nprefix = "a.b"\ndecision = "signed"\n', ":3:3"),
        ('version = 1\ndefault = "deny"\n[[rule]]\nprefix = "a.b"\ndecision = "signed"\nkeys = ["gone.pub"]\n', ":6:1"),
        ('version = 1\ndefault = "deny"\n[[rule]]\nprefix = "a.b"\ndecision = "allow"\nkeys = ["k.pub"]\n', ":3:3"),
        ('version = 1\ndefault = "deny"\n[[rule]]\nprefix = "a.b/*"\ndecision = "allow"\n', ":4:1"),
        ('version = 1\ndefault = "deny"\n[[rule]]\nprefix = "library/app"\ndecision = "allow"\n', ":4:1"),
        ('version = 1\ndefault = "deny"\n[[rule]]\nprefix = "a.b"\ndecision = "allow"\nkey = "x"\n', ":6:1"),
        ('version = 1\ndefault = "deny"\n' + '[[rule]]\nprefix = "a.b"\ndecision = "allow"\n' * 2, ":6:3"),
    ],
)
def test_mistakes_are_refused_at_their_place(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        policy(tmp_path, text)
    assert caught.value.where.endswith("policy.toml" + place)


def test_the_fingerprint_covers_the_keys(tmp_path: Path) -> None:
    before = policy(tmp_path, RULES).fingerprint

    (tmp_path / "k.pub").write_bytes(vectors.PUBLIC_KEY + b"\n")

    assert load_policy(tmp_path / "policy.toml").fingerprint != before
