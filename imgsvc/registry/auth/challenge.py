"""WWW-Authenticate, scopes and token answers. Pure; everything here comes from a server that may be hostile.

Source: RFC 9110 11.6.1 (challenges); distribution docs/spec/auth/token.md and oauth.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.base.oci import load_json_object
from imgsvc.registry.auth.claims import Claims, claims_of
from imgsvc.registry.http.netguard import is_host_name

MAX_TOKEN_BODY: Final = 1024**2  # [bytes] of a token server's answer; real ones stay below 20 KiB
_MAX_HEADER: Final = 16 * 1024  # [characters] of all challenges together
_DEFAULT_LIFETIME_S: Final = 60.0  # token.md: what an absent expires_in means
_MAX_LIFETIME_S: Final = 24 * 3600.0
_MIN_LIFETIME_S: Final = 1.0  # of one that has expired by its own words: perhaps only by our clock, so it is tried once

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf"\s*({_WORD})\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|({_WORD}|[^\s,\"]+))\s*", re.DOTALL)
_SCHEME = re.compile(rf"[\s,]*({_WORD})(?=[\s,]|$)")
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_VISIBLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate. scheme: lower case. parameters: names in lower case, values unquoted."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A bearer token. lifetime [seconds] from when it was received; 0 < lifetime. claims: what it says of itself, where it is a JWT."""

    value: str
    lifetime: float
    claims: Claims | None = None

    def __repr__(self) -> str:
        return f"Token(lifetime={self.lifetime})"


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """All challenges of all WWW-Authenticate headers, in order; what cannot be read ends its header."""
    found: list[Challenge] = []
    for header in headers:
        position = 0
        text = header[:_MAX_HEADER]
        while match := _SCHEME.match(text, position):
            position = match.end()
            parameters: dict[str, str] = {}
            if not (parameter := _PARAMETER.match(text, position)) and (token68 := _TOKEN68.match(text, position)):
                position = token68.end()
            while parameter:
                name, quoted, bare = parameter.groups()
                # The first of two equal names counts: a server cannot append one behind what a proxy checked.
                parameters.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare)
                position = parameter.end()
                comma = re.compile(r"\s*,\s*").match(text, position)
                parameter = _PARAMETER.match(text, comma.end()) if comma else None
            found.append(Challenge(match[1].lower(), parameters))
    return found


def choose(challenges: Iterable[Challenge], *, has_secret: bool) -> Challenge | None:
    """Bearer before Basic; Basic only when there is something to say."""
    by_scheme: dict[str, Challenge] = {}
    for challenge in challenges:
        by_scheme.setdefault(challenge.scheme, challenge)
    if "bearer" in by_scheme and by_scheme["bearer"].parameters.get("realm"):
        return by_scheme["bearer"]
    return by_scheme.get("basic") if has_secret else None


def scopes_for(challenge: Challenge, wanted: Sequence[str]) -> tuple[str, ...]:
    """The scopes to ask a token for, sorted, actions of one resource merged; entries that are no scope are dropped.

    A server that names other resources than we did has another name for the repository (a pull-through project prefix):
    then its word counts alone. Otherwise what we need is added, e.g. the source repository of a mount.
    """
    asked = _actions(challenge.parameters.get("scope", "").split())
    needed = _actions(wanted)
    if not asked or asked.keys() & needed.keys():
        for resource, verbs in needed.items():
            asked.setdefault(resource, set()).update(verbs)
    return tuple(f"{resource}:{','.join(sorted(verbs))}" for resource, verbs in sorted(asked.items()))


def _actions(scopes: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for scope in scopes:
        resource, colon, verbs = scope.rpartition(":")
        if colon and len(scope) <= 512 and len(found) < 32 and _VISIBLE.fullmatch(scope):
            found.setdefault(resource, set()).update(verb for verb in verbs.split(",") if verb)
    return found


def check_realm(realm: str, endpoint: str, trusted_hosts: frozenset[str]) -> str:
    """Why credentials must not go to this realm, or "" when they may.

    Args: realm: URL of the token service. endpoint: base URL of the registry. trusted_hosts: names without port.
    Raises: InvalidArgument when nothing at all may be sent there.
    """
    try:
        parts = urlsplit(realm)
        _ = parts.port
    except ValueError as error:
        raise InvalidArgument("the registry names a token service that is not a URL") from error
    shown = printable(f"{parts.scheme}://{parts.hostname or ''}", 120)
    is_address = parts.scheme in ("http", "https") and parts.hostname and is_host_name(parts.hostname)
    if not _VISIBLE.fullmatch(realm) or not is_address or not parts.hostname:
        raise InvalidArgument(f"the registry names a token service that is not an HTTP URL: {shown}")
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument(f"the registry names a token service with credentials in its URL: {shown}")
    if parts.scheme == "http" and not endpoint.startswith("http://"):
        raise InvalidArgument(f"an HTTPS registry names a token service without encryption: {shown}")
    if parts.hostname.lower() not in trusted_hosts:
        return f"token service {printable(parts.hostname, 80)} is not known to belong to this registry (token_hosts lists others)"
    return ""


def parse_token(body: bytes, where: str) -> Token:
    """A token service's answer. Raises: InvalidArgument, ResourceExhausted."""
    value = load_json_object(body, where, limit=MAX_TOKEN_BODY)
    token = value.get("token") or value.get("access_token")
    if not isinstance(token, str) or not _VISIBLE.fullmatch(token):
        raise InvalidArgument("the token service's answer has no usable token", where=where)
    seconds = value.get("expires_in")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        seconds = _DEFAULT_LIFETIME_S
    claims = claims_of(token)
    longest = _MAX_LIFETIME_S
    if claims and claims.lifetime is not None:
        longest = min(longest, max(_MIN_LIFETIME_S, claims.lifetime))
    return Token(token, float(min(seconds, longest)), claims)


def usable_for(token: Token) -> float:
    """How long a token is used [seconds]: it is replaced early, so that none expires on the way to the registry."""
    return token.lifetime - min(30.0, token.lifetime * 0.2)
