"""containerd's inline registry tables (`registry.mirrors`, `configs`, `auths`, `headers`) as the same host model. Pure.

They are deprecated there and slated for removal; here they work where no hosts.toml directory matches, with a warning
each. Source: containerd docs/cri/registry.md; internal/cri/server/images (endpoint order).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.registry.auth.credentials import StoredCredential
from imgsvc.registry.auth.dockerconfig import credential_from_cri, normalised_key
from imgsvc.registry.hosts.hosts import Capability, Host, HostsConfig, Tls, default_host, parse_url

_NO_PUSH = frozenset({Capability.PULL, Capability.RESOLVE, Capability.REFERRERS})
_SECTIONS = ("mirrors", "configs", "auths", "headers")


@dataclass(frozen=True, slots=True)
class LegacyRegistry:
    """hosts: by namespace, "*" for all others.  credentials: by registry.  warnings: what to tell the administrator."""

    hosts: Mapping[str, HostsConfig] = field(default_factory=dict)
    credentials: Mapping[str, StoredCredential] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def parse_legacy(tables: Mapping[str, Any], where: str) -> LegacyRegistry:
    """`tables` holds any of mirrors, configs, auths and headers as TOML gave them; `where` names the file.

    Raises: InvalidArgument for what would change where bytes come from if it were ignored.
    """
    used = [section for section in _SECTIONS if tables.get(section)]
    warnings = [f"{where}: registry.{section} is deprecated; use hosts.toml files below config_path" for section in used]
    configs = _table(tables, "configs", where)
    headers = _headers(_table(tables, "headers", where), where)
    tls = {authority: _tls(entry, f"{where}: registry.configs.{authority}.tls") for authority, entry in configs.items()}
    mirrors = {
        namespace: _mirror(namespace, entry, f'{where}: registry.mirrors."{namespace}"', tls, headers)
        for namespace, entry in _table(tables, "mirrors", where).items()
    }
    for authority, settings in tls.items():
        if settings.is_set and authority not in mirrors:
            mirrors[authority] = HostsConfig(authority, (default_host(authority, f"{where}: registry.configs", settings),), where)
    if headers and "*" not in mirrors:
        warnings.append(f"{where}: registry.headers are sent only to the endpoints of registry.mirrors; use header tables in hosts.toml")
    return LegacyRegistry(mirrors, _credentials(tables, configs, where), tuple(warnings))


def for_namespace(config: HostsConfig, namespace: str) -> HostsConfig:
    """An entry as it applies to one namespace: the registry itself comes last, unless it is among the endpoints."""
    own = default_host(namespace, f"{config.origin} (the registry itself)")
    hosts = tuple(replace(host, canonical=host.authority == own.authority) for host in config.hosts)
    if not any(host.canonical for host in hosts):
        hosts = (*hosts, own)
    return replace(config, namespace=namespace, hosts=hosts)


def _mirror(namespace: str, entry: object, where: str, tls: Mapping[str, Tls], headers: tuple[tuple[str, str], ...]) -> HostsConfig:
    if not isinstance(entry, dict):
        raise InvalidArgument("not a table with endpoint", where=where)
    endpoints = entry.get("endpoint")
    if not isinstance(endpoints, list) or not all(isinstance(endpoint, str) for endpoint in endpoints):
        raise InvalidArgument("endpoint must be a list of URLs", where=where)
    if unknown := sorted(entry.keys() - {"endpoint"}):
        raise InvalidArgument(f'unknown key "{printable(unknown[0], 80)}"', where=where, hint="only endpoint is known")
    hosts = []
    for endpoint in endpoints:
        bare = parse_url(endpoint, override_path=True)
        parts = urlsplit(endpoint)
        # An endpoint with a path is taken as it is; only without one `/v2` is added.
        url = bare if parts.path not in ("", "/") else parse_url(endpoint, override_path=False)
        settings = tls.get(parts.netloc, Tls())
        hosts.append(Host(url, f"{where}.endpoint", _NO_PUSH, settings, headers))
    return HostsConfig(namespace, tuple(hosts), where)


def _tls(entry: object, where: str) -> Tls:
    table = entry.get("tls") if isinstance(entry, dict) else None
    if table is None:
        return Tls()
    known = {"ca_file", "cert_file", "key_file", "insecure_skip_verify"}
    if not isinstance(table, dict) or not table.keys() <= known:
        raise InvalidArgument("not a table of ca_file, cert_file, key_file and insecure_skip_verify", where=where)
    ca, cert, key = (str(table.get(name) or "") for name in ("ca_file", "cert_file", "key_file"))
    return Tls((ca,) if ca else (), ((cert, key),) if cert else (), True if table.get("insecure_skip_verify") else None)


def _credentials(tables: Mapping[str, Any], configs: Mapping[str, Any], where: str) -> dict[str, StoredCredential]:
    entries = [(key, entry, f'registry.auths."{key}"') for key, entry in _table(tables, "auths", where).items()]
    entries += [(key, entry.get("auth"), f'registry.configs."{key}".auth') for key, entry in configs.items() if isinstance(entry, dict)]
    found = {}
    for key, entry, name in entries:
        if not entry:
            continue
        source = f"{where}: {printable(name, 120)}"
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
            raise InvalidArgument("not a table of strings", where=source)
        try:
            credential = credential_from_cri(
                username=entry.get("username", ""),
                password=entry.get("password", ""),
                auth=entry.get("auth", ""),
                identity_token=entry.get("identitytoken", ""),
            )
        except InvalidArgument as error:
            raise InvalidArgument(error.what, where=source) from error
        if credential:
            found[normalised_key(key)] = StoredCredential(
                credential.username, credential.password, identity_token=credential.identity_token, source=source
            )
    return found


def _headers(table: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    found = []
    for name, values in table.items():
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not value.isascii() or not value.isprintable():
                raise InvalidArgument(f"registry.headers.{printable(name, 40)} is not a list of header values", where=where)
            found.append((name, value))
    return tuple(found)


def _table(tables: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = tables.get(name, {})
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"registry.{name} is not a table", where=where)
    return value
