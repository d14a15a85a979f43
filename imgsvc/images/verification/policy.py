"""The policy file: what is needed of an image, by registry and repository. Pure but for reading the file and its keys.

version = 1
default = "deny"                       # for what no rule names: "allow" or "deny"

[[rule]]
prefix = "registry.example/team"       # a registry, or a repository and what is below it; the longest one decides
decision = "signed"                    # "allow", "deny" or "signed"
keys = ["team.pub"]                    # any of them; relative to this file
attestations = ["https://slsa.dev/provenance/v1"]  # predicate types that one of the keys must vouch for, too
same_name = true                       # the signature must have been made under this repository's name
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from imgsvc.base import tomlfile
from imgsvc.base.errors import InvalidArgument, from_os_error
from imgsvc.base.reference import DEFAULT_HOST
from imgsvc.images.verification import cosign

VERSION: Final = 1
_ROOT_KEYS: Final = ("version", "default", "rule")
_RULE_KEYS: Final = ("prefix", "decision", "keys", "attestations", "same_name")
_MAX_KEY_FILE: Final = 64 * 1024  # [bytes]


class Decision(StrEnum):
    """What a rule says."""

    ALLOW = "allow"
    DENY = "deny"
    SIGNED = "signed"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. where: its place in the file, for messages."""

    prefix: str
    decision: Decision
    keys: tuple[cosign.Key, ...] = ()
    attestations: tuple[str, ...] = ()
    same_name: bool = False
    where: str = ""

    def covers(self, name: str) -> bool:
        """Whether a repository ("host/path") is the prefix or below it; only whole path components count."""
        return not self.prefix or name == self.prefix or name.startswith(self.prefix + "/")


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole file. fingerprint: changes with every byte of it and of its keys."""

    rules: tuple[Rule, ...]
    default: Rule
    fingerprint: str

    def rule_for(self, name: str) -> Rule:
        """The rule that decides about a repository."""
        return max((rule for rule in self.rules if rule.covers(name)), key=lambda rule: len(rule.prefix), default=self.default)


def load_policy(path: Path) -> Policy:
    """Read a policy and the keys it names. Blocking. Raises: InvalidArgument with the position; NotFound."""
    document = tomlfile.load(path)
    document.check_keys(_ROOT_KEYS)
    if document.typed(int, "version") != VERSION:
        raise document.error(f"version must be {VERSION}", "version")
    seen = hashlib.sha256(path.read_bytes())
    rules = tuple(_rule(document, position, path.parent, seen) for position in range(len(document.typed(list, "rule") or [])))
    prefixes = [rule.prefix for rule in rules]
    for position, prefix in enumerate(prefixes):
        if prefix in prefixes[:position]:
            raise document.error(f'a second rule for "{prefix}"', "rule", position, hint="put all of it into one")
    decision = _decision(document, "default")
    if decision is Decision.SIGNED:
        raise document.error('default must be "allow" or "deny"', "default", hint='give a rule with prefix = "" instead')
    return Policy(rules, Rule("", decision, where=document.where("default")), seen.hexdigest())


def _rule(document: tomlfile.Document, position: int, base: Path, seen: hashlib._Hash) -> Rule:
    at = ("rule", position)
    document.check_keys(_RULE_KEYS, *at)
    prefix = document.typed(str, *at, "prefix")
    if prefix is None:
        raise document.error("a rule without prefix", *at, hint='prefix = "" is for everything')
    decision = _decision(document, *at, "decision")
    keys = tuple(_key(document, base / name, seen, *at) for name in document.strings(*at, "keys"))
    attestations = tuple(document.strings(*at, "attestations"))
    same_name = document.typed(bool, *at, "same_name") or False
    if decision is Decision.SIGNED and not keys:
        raise document.error('decision "signed" needs keys', *at, hint="name cosign's public key files")
    if decision is not Decision.SIGNED and (keys or attestations or same_name):
        raise document.error(f'keys, attestations and same_name mean nothing with decision "{decision}"', *at)
    return Rule(_prefix(document, prefix, *at), decision, keys, attestations, same_name, document.where(*at))


def _prefix(document: tomlfile.Document, text: str, *at: str | int) -> str:
    prefix = text.rstrip("/")
    if "*" in prefix or "@" in prefix or "://" in prefix:
        raise document.error(f'prefix "{text}"', *at, "prefix", hint="write a registry, or a registry and a path, without wildcards")
    host, slash, path = prefix.partition("/")
    if prefix and "." not in host and ":" not in host and host != "localhost":
        raise document.error(f'prefix "{text}" does not begin with a registry', *at, "prefix", hint=f'e.g. "{DEFAULT_HOST}/{prefix}"')
    return f"{host.lower()}{slash}{path}"


def _decision(document: tomlfile.Document, *keys: str | int) -> Decision:
    text = document.typed(str, *keys)
    if text is None or text not in list(Decision):
        raise document.error(f"{keys[-1]} must be one of {', '.join(Decision)}", *keys)
    return Decision(text)


def _key(document: tomlfile.Document, path: Path, seen: hashlib._Hash, *at: str | int) -> cosign.Key:
    try:
        with path.open("rb") as stream:
            pem = stream.read(_MAX_KEY_FILE + 1)
    except OSError as error:
        raise InvalidArgument(str(from_os_error(error, f"key {path}")), where=document.where(*at, "keys")) from error
    if len(pem) > _MAX_KEY_FILE:
        raise document.error(f"key {path} is larger than {_MAX_KEY_FILE} bytes", *at, "keys")
    seen.update(pem)
    return cosign.load_key(pem, str(path))
