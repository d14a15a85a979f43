"""Docker's config.json and Podman's auth.json as data. Pure.

Source: docker/cli cli/config/configfile; containers-auth.json(5) for keys with repository paths.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from imgsvc.base.errors import InvalidArgument
from imgsvc.base.oci import MIB, load_json_object
from imgsvc.registry.hosts.hosts import DOCKER_NAMESPACE, canonical_name
from imgsvc.registry.interfaces import Credential

T = TypeVar("T")

MAX_FILE: Final = MIB
_TOKEN_USER: Final = "<token>"  # noqa: S105  # docker's user name for an identity token
_DOCKER_SERVER: Final = "https://index.docker.io/v1/"


@dataclass(frozen=True, slots=True, repr=False)
class DockerConfig:
    """What is read of such a file, by normalised key (`host[/path]`): of a key that is spelt in several ways the exact one first."""

    where: str
    auths: Mapping[str, Sequence[Mapping[str, Any]]]
    helpers: Mapping[str, Sequence[str]]
    store: str = ""


def parse_docker_config(data: bytes, where: str) -> DockerConfig:
    """Raises: InvalidArgument; the text never quotes the file."""
    value = load_json_object(data, where, limit=MAX_FILE)
    auths, helpers, store = value.get("auths") or {}, value.get("credHelpers") or {}, value.get("credsStore") or ""
    if not isinstance(auths, dict) or not isinstance(helpers, dict) or not isinstance(store, str):
        raise InvalidArgument("auths and credHelpers must be objects, credsStore a string", where=where)
    return DockerConfig(
        where=where,
        auths=_by_key(auths, dict),
        helpers=_by_key(helpers, str),
        store=store,
    )


def _by_key(table: Mapping[str, Any], kind: type[T]) -> dict[str, list[T]]:
    """Source: docker/cli configfile GetAuthConfig (the exact key, then any of the same host)."""
    found: dict[str, list[T]] = {}
    exact = [key for key in table if key in (normalised_key(key), _DOCKER_SERVER)]  # the latter is docker's own key for its registry
    for key in dict.fromkeys([*exact, *table]):
        if isinstance(table[key], kind):
            found.setdefault(normalised_key(key), []).append(table[key])
    return found


def normalised_key(key: str) -> str:
    """`https://index.docker.io/v1/` → `docker.io`; a repository path stays: `quay.io/org`."""
    rest = key.rpartition("://")[2]
    path = rest.partition("/")[2].strip("/")
    return canonical_name(key) + (f"/{path}" if path not in ("", "v1", "v2") else "")


def entry_for(config: DockerConfig, registry: str, repository: str) -> Credential | None:
    """The most specific entry that holds a secret. Raises: InvalidArgument when that entry cannot be read."""
    parts = repository.split("/") if repository else []
    for length in range(len(parts), -1, -1):
        key = "/".join([registry, *parts[:length]])
        for entry in config.auths.get(key, ()):
            if found := _credential(entry, f"{config.where} ({key})", registry):
                return found
    return None


def helper_for(config: DockerConfig, registry: str) -> str:
    """The helper program's short name for a registry, "" for none."""
    return next(filter(None, config.helpers.get(registry, ())), config.store)


def helper_server(registry: str) -> str:
    """How helpers want to be asked about a registry."""
    return _DOCKER_SERVER if registry == DOCKER_NAMESPACE else registry


def parse_helper_answer(data: bytes, source: str, registry: str) -> Credential:
    """The answer of `docker-credential-NAME get`. Raises: InvalidArgument."""
    value = load_json_object(data, source, limit=MAX_FILE)
    username, secret = value.get("Username"), value.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str) or not secret:
        raise InvalidArgument("the helper's answer has no Username and Secret", where=source)
    if username == _TOKEN_USER:
        return Credential(source, identity_token=secret, host=registry)
    return Credential(source, username=username, password=secret, host=registry)


def credential_from_cri(
    *, username: str = "", password: str = "", auth: str = "", server_address: str = "", identity_token: str = "", registry_token: str = ""
) -> Credential | None:
    """CRI's AuthConfig; None when it is empty. Raises: InvalidArgument when `auth` cannot be read."""
    fields: dict[str, Any] = {
        "username": username,
        "password": password,
        "auth": auth,
        "identitytoken": identity_token,
        "registrytoken": registry_token,
    }
    return _credential(fields, "CRI request", canonical_name(server_address) if server_address else "")


def _credential(entry: Mapping[str, Any], source: str, host: str) -> Credential | None:
    values = {name: entry.get(name) or "" for name in ("username", "password", "auth", "identitytoken", "registrytoken")}
    if not all(isinstance(value, str) for value in values.values()):
        raise InvalidArgument("a credential whose members are not strings", where=source)
    username, password = values["username"], values["password"]
    if values["auth"] and not username:
        username, password = _decode_auth(values["auth"], source)
    identity = values["identitytoken"]
    if username == _TOKEN_USER and password:
        username, password, identity = "", "", password
    if not (username or password or identity or values["registrytoken"]):
        return None
    return Credential(source, username, password, identity, values["registrytoken"], host)


def _decode_auth(text: str, source: str) -> tuple[str, str]:
    """User and password; bytes that are no UTF-8 are kept as surrogates. Line ends in `text` mean nothing, as to Go's decoder."""
    text = text.replace("\r", "").replace("\n", "")
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), validate=True).decode("utf-8", "surrogateescape")
    except (binascii.Error, ValueError):
        # `from None`: the cause would quote the secret.
        raise InvalidArgument("auth is not base64 of user:password", where=source) from None
    user, colon, password = decoded.partition(":")
    if not colon or not user:
        raise InvalidArgument("auth is not base64 of user:password", where=source)
    return user, password.strip("\0")
