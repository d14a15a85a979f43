"""The node's own credentials, looked for in this order; the first that has one for the registry wins.

1. credentials.toml beside hosts.toml or above it, table [namespace] (named tables serve `credentials = "NAME"` of hosts.toml)
2. per-host entries of the daemon's configuration
3. Docker's config.json and Podman's auth.json, the most specific key first
4. their credHelpers and credsStore programs, and helpers of the daemon's configuration
5. kubelet credential-provider plugins

Files are read on every lookup, so that a change takes effect at once. Helpers' answers carry no expiry and are not kept;
plugins' answers are kept for as long as they say. Whatever is found is bound to the registry it was looked up for.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from imgsvc.base.concurrency import SingleFlight, in_thread
from imgsvc.base.errors import ImgsvcError, InvalidArgument, NotFound, PermissionDenied, Unavailable, from_os_error
from imgsvc.base.tomlfile import Document, load
from imgsvc.registry.auth.dockerconfig import MAX_FILE, DockerConfig, entry_for, helper_for, parse_docker_config
from imgsvc.registry.auth.helpers import Provider, ask_docker_helper, ask_provider, image_matches, parse_providers
from imgsvc.registry.endpoint import CredentialSource
from imgsvc.registry.interfaces import Credential

FILE_NAME: Final = "credentials.toml"
_OF_NAMESPACE: Final = "namespace"
_KEYS: Final = ("username", "password", "identity_token", "registry_token")
_EARLY: Final = 0.1  # share of a plugin's cache duration that is given up, so that no credential expires on the way


@dataclass(frozen=True, slots=True, repr=False)
class StoredCredential:
    """One secret of the daemon's configuration; `…_file` name the files that hold it."""

    username: str = ""
    password: str = ""
    password_file: str = ""
    identity_token: str = ""
    identity_token_file: str = ""
    registry_token: str = ""
    registry_token_file: str = ""
    source: str = "configuration"


@dataclass(frozen=True, slots=True)
class CredentialSettings:
    """Where to look. hosts: by registry namespace. helpers: registry → NAME of docker-credential-NAME.

    provider_config, provider_directory: the kubelet's --image-credential-provider-config and -bin-dir. timeout_s: of programs.
    """

    files: tuple[str, ...] = ()
    helpers: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, StoredCredential] = field(default_factory=dict)
    provider_config: str = ""
    provider_directory: str = ""
    timeout_s: float = 30.0
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


@dataclass(frozen=True, slots=True)
class Located:
    """A place that may have the credential. get: asks it, which may run a program; None when it has none after all."""

    source: str
    get: Callable[[], Awaitable[Credential | None]]


class NodeCredentials:
    """Implements CredentialSource. Belongs to one event loop."""

    def __init__(self, settings: CredentialSettings) -> None:
        self._settings = settings
        self._flights: SingleFlight[Credential | None] = SingleFlight()
        self._cache: dict[tuple[str, str], tuple[float, list[tuple[str, Credential]]]] = {}

    async def find(self, registry: str, repository: str, *, directories: Sequence[str], renew: bool = False) -> Credential | None:
        """As CredentialSource.find. Raises: what is wrong with the first place that should have one."""
        for located in await in_thread(lambda: list(self.locate(registry, repository, directories, renew))):
            if found := await located.get():
                return replace(found, host=registry)
        return None

    async def named(self, name: str, directories: Sequence[str]) -> Credential:
        """As CredentialSource.named."""
        return await in_thread(named_credential, name, directories)

    def locate(self, registry: str, repository: str, directories: Sequence[str], renew: bool = False) -> Iterator[Located]:
        """Every place that knows the registry, in order; files are read, programs are not run. Blocking."""
        if found := _from_directories(directories, _OF_NAMESPACE):
            yield _ready(found)
        if stored := self._settings.hosts.get(registry):
            yield _ready(_read_stored(stored))
        configs = [config for name in self._settings.files if (config := _read_docker_config(name))]
        for config in configs:
            if entry := entry_for(config, registry, repository):
                yield _ready(entry)
        names = [helper_for(config, registry) for config in configs]
        for name in dict.fromkeys(filter(None, [*names, self._settings.helpers.get(registry, "")])):
            yield self._helper(name, registry)
        image = f"{registry}/{repository}"
        for provider in self._providers():
            if any(image_matches(pattern, image) for pattern in provider.match_images):
                yield self._provider(provider, registry, image, renew)

    def _helper(self, name: str, registry: str) -> Located:
        settings = self._settings

        async def get() -> Credential | None:
            return await self._flights.run(
                f"helper\0{name}\0{registry}",
                lambda: ask_docker_helper(name, registry, env=settings.environ, timeout_s=settings.timeout_s),
            )

        return Located(f"docker-credential-{name}", get)

    def _providers(self) -> list[Provider]:
        name = self._settings.provider_config
        try:
            return [provider for file in _provider_files(name) for provider in parse_providers(_read(file), file)]
        except ImgsvcError as error:
            raise Unavailable(error.what, where=error.where, hint=error.hint) from error

    def _provider(self, provider: Provider, registry: str, image: str, renew: bool) -> Located:
        async def get() -> Credential | None:
            return await self._flights.run(
                f"provider\0{provider.name}\0{image}\0{renew}", lambda: self._ask_provider(provider, registry, image, renew)
            )

        return Located(f"credential provider {provider.name}", get)

    async def _ask_provider(self, provider: Provider, registry: str, image: str, renew: bool) -> Credential | None:
        for scope in (image, registry, ""):
            until, known = self._cache.get((provider.name, scope), (0.0, []))
            if time.monotonic() < until and not renew:
                return _matching(known, image)
        settings = self._settings
        kind, seconds, found = await ask_provider(
            provider, settings.provider_directory, image, env=settings.environ, timeout_s=settings.timeout_s
        )
        scope = {"Image": image, "Registry": registry, "Global": ""}.get(kind, image)
        self._cache[provider.name, scope] = (time.monotonic() + seconds * (1 - _EARLY), found)
        return _matching(found, image)


def _matching(found: list[tuple[str, Credential]], image: str) -> Credential | None:
    return next((credential for pattern, credential in found if image_matches(pattern, image)), None)


def _ready(credential: Credential) -> Located:
    async def get() -> Credential | None:
        return credential

    return Located(credential.source, get)


def _read(name: str, *, is_ours: bool = False) -> bytes:
    """A small file. Raises: PermissionDenied when it is ours and others may read it."""
    try:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise InvalidArgument("not a regular file", where=name)
            if is_ours and mode & 0o077:
                raise PermissionDenied(f"mode {mode & 0o777:o} lets other users at this secret", where=name, hint=f"chmod 600 {name}")
            data = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise from_os_error(error, "reading credentials", where=name) from error
    if len(data) > MAX_FILE:
        raise InvalidArgument(f"larger than {MAX_FILE} bytes", where=name)
    return data


def _provider_files(name: str) -> list[str]:
    """The kubelet takes a file, or a directory whose files it reads in the order of their names."""
    if not os.path.isdir(name):
        return [name] if name else []
    try:
        return [os.path.join(name, file) for file in sorted(os.listdir(name)) if file.endswith((".json", ".yaml", ".yml"))]
    except OSError as error:
        raise from_os_error(error, "reading credential providers", where=name) from error


def _read_docker_config(name: str) -> DockerConfig | None:
    """None when the file is not there: tools create it at the first login. Raises: Unavailable: it is for all registries."""
    try:
        return parse_docker_config(_read(name), name)
    except NotFound:
        return None
    except ImgsvcError as error:
        raise Unavailable(error.what, where=error.where, hint=error.hint) from error


def named_credential(name: str, directories: Sequence[str]) -> Credential:
    """A table of the first credentials.toml that has it. Blocking. Raises: InvalidArgument, PermissionDenied."""
    found = _from_directories(directories, name)
    if found is None:
        where = os.path.join(next(iter(directories), ""), FILE_NAME)
        raise InvalidArgument(f'no table "{name}"', where=where, hint=f"add [{name}] with username and password")
    return found


def _from_directories(directories: Sequence[str], table: str) -> Credential | None:
    return next((found for directory in directories if (found := _from_directory(directory, table))), None)


def _from_directory(directory: str, table: str) -> Credential | None:
    """A table of credentials.toml. None without the file or the table. Raises: InvalidArgument, PermissionDenied."""
    name = os.path.join(directory, FILE_NAME)
    if not os.path.exists(name):
        return None
    _read(name, is_ours=True)
    document = load(name)
    for key, value in document.data.items():
        if not isinstance(value, dict):
            raise document.error(f'"{key}" is not a table', key, hint=f"write [{_OF_NAMESPACE}] above it")
        document.check_keys([*_KEYS, *(f"{k}_file" for k in _KEYS if k != "username")], key)
    return _from_table(document, table, directory) if table in document.data else None


def _from_table(document: Document, table: str, directory: str) -> Credential:
    values = {}
    for key in _KEYS:
        value = document.typed(str, table, key) or ""
        file = document.typed(str, table, f"{key}_file") if key != "username" else None
        if value and file:
            raise document.error(f"{key} and {key}_file are both set", table, key, hint="remove one of them")
        values[key] = _secret_file(os.path.join(directory, file)) if file else value
    if not any(values.values()):
        raise document.error(f"[{table}] has no credential", table, hint=f"keys: {', '.join(_KEYS)}")
    return Credential(document.where(table), **values)


def _read_stored(stored: StoredCredential) -> Credential:
    return Credential(
        stored.source,
        stored.username,
        stored.password or _secret_file(stored.password_file),
        stored.identity_token or _secret_file(stored.identity_token_file),
        stored.registry_token or _secret_file(stored.registry_token_file),
    )


def _secret_file(name: str) -> str:
    return _read(name, is_ours=True).decode("utf-8", "surrogateescape").rstrip("\r\n") if name else ""


def credential_source(settings: CredentialSettings) -> CredentialSource:
    """The node's credentials behind their interface."""
    return NodeCredentials(settings)
