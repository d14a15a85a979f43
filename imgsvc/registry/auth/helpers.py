"""Programs that hand out credentials: docker-credential-NAME and kubelet credential-provider plugins.

Source: docker/docker-credential-helpers protocol; Kubernetes kubelet.config.k8s.io/v1 CredentialProviderConfig and
credentialprovider.kubelet.k8s.io/v1.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from imgsvc.base import yamlfile
from imgsvc.base.errors import DeadlineExceeded, ImgsvcError, InvalidArgument, Unavailable
from imgsvc.base.oci import MIB, load_json_object
from imgsvc.base.programs import Finished, run
from imgsvc.base.tomlfile import parse_duration
from imgsvc.registry.auth.dockerconfig import helper_server, parse_helper_answer
from imgsvc.registry.interfaces import Credential

_MAX_OUTPUT: Final = MIB  # [bytes]
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_NOT_FOUND: Final = b"credentials not found"  # what helpers print, on stdout or stderr, when they have none
_API: Final = "credentialprovider.kubelet.k8s.io/"


async def _run(argv: Sequence[str], data: bytes, *, env: Mapping[str, str], timeout_s: float) -> Finished:
    """Run a program with `data` on its stdin. Raises: Unavailable when it cannot be started, takes too long, or prints too much."""
    try:
        done = await run(argv, stdin=data, env=env, timeout_s=timeout_s, limit=_MAX_OUTPUT + 1)
    except DeadlineExceeded as error:
        raise Unavailable(f"credential program did not answer within {timeout_s:g} s", where=argv[0]) from error
    except ImgsvcError as error:
        raise Unavailable(
            f"credential program not started: {error.what}", where=argv[0], hint="install it where the daemon finds it"
        ) from error
    if len(done.stdout) > _MAX_OUTPUT:
        raise Unavailable(f"credential program printed more than {_MAX_OUTPUT} bytes", where=argv[0])
    return done


async def ask_docker_helper(name: str, registry: str, *, env: Mapping[str, str], timeout_s: float) -> Credential | None:
    """`docker-credential-NAME get`. None when the helper knows nothing. Raises: Unavailable; InvalidArgument for its name."""
    if not _PROGRAM.fullmatch(name):
        raise InvalidArgument("the name of a credential helper may have letters, digits, dots, dashes", where="credHelpers")
    program = f"docker-credential-{name}"
    done = await _run([program, "get"], helper_server(registry).encode(), env=env, timeout_s=timeout_s)
    if done.status:
        if _NOT_FOUND in done.stdout + done.stderr:
            return None
        # Its words stay with it: some helpers print what they were given.
        raise Unavailable(f"credential helper failed with status {done.status} for {registry}", where=program)
    try:
        return parse_helper_answer(done.stdout, program, registry)
    except ImgsvcError as error:
        raise Unavailable(error.what, where=program) from error


@dataclass(frozen=True, slots=True)
class Provider:
    """One plugin of a CredentialProviderConfig. cache_s: its defaultCacheDuration [seconds]. needs_pod: see _provider."""

    name: str
    match_images: tuple[str, ...]
    cache_s: float
    api_version: str
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    needs_pod: bool = False


def parse_providers(data: bytes, where: str) -> list[Provider]:
    """A CredentialProviderConfig, in YAML or JSON as the kubelet reads it. Raises: InvalidArgument.

    Keys we do not know are the kubelet's business: the file is its own, and newer ones have more.
    """
    value = load_json_object(data, where, limit=_MAX_OUTPUT) if data.lstrip().startswith(b"{") else yamlfile.loads(data, where)
    if not isinstance(value, dict) or value.get("kind") != "CredentialProviderConfig" or not isinstance(value.get("providers"), list):
        hint = "it has kind: CredentialProviderConfig and a list of providers"
        raise InvalidArgument("not a CredentialProviderConfig", where=where, hint=hint)
    return [_provider(entry, f"{where}: providers[{index}]") for index, entry in enumerate(value["providers"])]


def _provider(entry: object, where: str) -> Provider:
    """One entry. A plugin that wants the service account token of the image's pod cannot work without a kubelet."""
    if not isinstance(entry, dict):
        raise InvalidArgument("a provider is not a mapping", where=where)

    def field(name: str, is_good: Callable[[Any], bool], what: str) -> Any:
        value = entry.get(name)
        if not is_good(value):
            raise InvalidArgument(f"{name} is missing" if value is None else f"{name} is not {what}", where=where, hint=f"it is {what}")
        return value

    name = field("name", _is_text, "the name of a program in the directory of plugins")
    images = field("matchImages", lambda value: _is_list(value, _is_text) and bool(value), "a list of patterns of images")
    duration = field("defaultCacheDuration", _is_text, 'a duration such as "12h"')
    version = field("apiVersion", _is_text, f"{_API}v1")
    args = field("args", lambda value: value is None or _is_list(value, lambda arg: isinstance(arg, str)), "a list of strings") or ()
    env = field("env", lambda value: value is None or _is_list(value, _is_variable), "a list of variables with name and value") or ()
    token = entry.get("tokenAttributes")
    try:
        seconds = parse_duration(duration)
    except InvalidArgument as error:
        raise InvalidArgument(f"defaultCacheDuration: {error.what}", where=where, hint=error.hint) from error
    variables = tuple((pair["name"], pair["value"]) for pair in env)
    needs_pod = isinstance(token, dict) and token.get("requireServiceAccount") is True
    return Provider(name, tuple(images), seconds, version, tuple(args), variables, needs_pod)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list(value: object, is_good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_good, value))


def _is_variable(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("value"), str)


def image_matches(pattern: str, image: str) -> bool:
    """The kubelet's rule: host labels one by one with globs, the same port, and the pattern's path as a prefix."""
    host, _, path = pattern.rpartition("://")[2].partition("/")
    image_host, _, image_path = image.partition("/")
    name, _, port = host.partition(":")
    image_name, _, image_port = image_host.partition(":")
    labels, image_labels = name.split("."), image_name.split(".")
    return (
        port == image_port
        and len(labels) == len(image_labels)
        and all(fnmatch.fnmatchcase(have, want) for have, want in zip(image_labels, labels, strict=True))
        and image_path.startswith(path)
    )


async def ask_provider(
    provider: Provider, directory: str, image: str, *, env: Mapping[str, str], timeout_s: float
) -> tuple[str, float, list[tuple[str, Credential]]]:
    """Run a plugin. Returns (cache key type, cache duration [s], credentials by image pattern, longest pattern first).

    Raises: Unavailable, InvalidArgument.
    """
    if not _PROGRAM.fullmatch(provider.name) or not provider.api_version.startswith(_API):
        raise InvalidArgument(f'credential provider "{provider.name}" has an unusable name or apiVersion', where=directory)
    program = os.path.join(directory, provider.name)
    if provider.needs_pod:
        what = f'credential provider "{provider.name}" requires the token of a pod\'s service account, which only the kubelet has'
        raise Unavailable(what, where=program, hint="with a kubelet, its own --image-credential-provider-config does this")
    request = {"kind": "CredentialProviderRequest", "apiVersion": provider.api_version, "image": image}
    done = await _run([program, *provider.args], json.dumps(request).encode(), env={**env, **dict(provider.env)}, timeout_s=timeout_s)
    if done.status:
        raise Unavailable(f"credential provider failed with status {done.status}", where=program)
    try:
        answer = load_json_object(done.stdout, program, limit=_MAX_OUTPUT)
    except ImgsvcError as error:
        raise Unavailable(error.what, where=program) from error
    auths: Any = answer.get("auth") or {}
    if answer.get("kind") != "CredentialProviderResponse" or not isinstance(auths, dict):
        raise Unavailable("not a CredentialProviderResponse", where=program)
    found = []
    for pattern, entry in sorted(auths.items(), key=lambda item: -len(item[0])):
        if isinstance(entry, dict) and isinstance(entry.get("username"), str) and isinstance(entry.get("password"), str):
            found.append((pattern, Credential(f"credential provider {provider.name}", entry["username"], entry["password"])))
    duration = answer.get("cacheDuration")
    try:
        seconds = parse_duration(duration) if isinstance(duration, str) else provider.cache_s
    except InvalidArgument as error:
        raise Unavailable(error.what, where=program) from error
    return str(answer.get("cacheKeyType") or "Image"), seconds, found
