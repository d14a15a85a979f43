"""hosts.toml as data: which endpoints serve a registry namespace, in which order, with which powers. Pure.

The format is containerd's, read strictly, with our additions `fallback`, `blocked`, `rewrite`, `proxy`, `credentials`,
`ns`, `token_hosts` and `insecure_credentials`. A file is for a registry, or for the repositories below a prefix that its
directory names; it says everything about them, nothing is merged. Finding the files is hostdirs.py's job.

Source: containerd docs/hosts.md; containers-registries.conf(5) (prefix, blocked, location).
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.base.reference import is_repository
from imgsvc.base.tomlfile import Document, dotted, suggestion

DOCKER_NAMESPACE: Final = "docker.io"
DOCKER_REGISTRY: Final = "registry-1.docker.io"
_DOCKER_NAMES: Final = frozenset({DOCKER_NAMESPACE, "index.docker.io", DOCKER_REGISTRY})

# Token servers that live beside their registry under another name, as their operators document.
_KNOWN_TOKEN_HOSTS: Final = {DOCKER_REGISTRY: ("auth.docker.io",), "registry.gitlab.com": ("gitlab.com",)}

_HOST_KEYS: Final = (
    "capabilities",
    "ca",
    "client",
    "skip_verify",
    "header",
    "override_path",
    "rewrite",
    "dial_timeout",
    "proxy",
    "credentials",
    "ns",
    "token_hosts",
    "insecure_credentials",
)
_ROOT_KEYS: Final = ("server", "host", *_HOST_KEYS, "fallback", "blocked")
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?", re.ASCII)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_CREDENTIAL_NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

_HARMLESS_HEADERS: Final = frozenset({"accept", "accept-language", "user-agent"})  # the others may hold secrets

FROM_NAMESPACE: Final = "namespace"  # `credentials`: those of the image's registry, also the caller's
FROM_NOBODY: Final = "none"
OWN: Final = ""  # default for a mirror: what the node has stored for the mirror's own name
DIRECT: Final = "direct"  # `proxy`: none, whatever the environment says


class Capability(Enum):
    """What a host may be asked for. Source: containerd docs/hosts.md#capabilities-field; `referrers` since 2.1."""

    PULL = "pull"
    RESOLVE = "resolve"
    PUSH = "push"
    REFERRERS = "referrers"


ALL_CAPABILITIES: Final = frozenset(Capability)


@dataclass(frozen=True, slots=True)
class Tls:
    """How to talk TLS to one host. ca: PEM files added to the system's. client: (certificate, key) files; key "" = same file."""

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    skip_verify: bool | None = None

    @property
    def is_set(self) -> bool:
        """Whether the file sets a TLS option, be it `skip_verify = false`."""
        return bool(self.ca or self.client or self.skip_verify is not None)

    def without_identity(self) -> Tls:
        """For a foreign host that we were redirected to: no client certificate, no lowered guard, the same extra CAs."""
        return Tls(ca=self.ca)


@dataclass(frozen=True, slots=True)
class Host:
    """One endpoint. url: scheme, authority and path up to and including `/v2`, without a slash at the end.

    origin: where it was configured, "file:line:column" or what made it up. canonical: it is the namespace's own registry,
    not a mirror. try_tls_first: an `http://` host that has TLS options, so HTTPS is tried before (containerd's rule);
    downgrade_is_safe: credentials may follow the fall to HTTP (only the made-up localhost default). rewrite: what stands in
    place of `prefix`, which all repositories of its file begin with, when this host is asked; None: the same.
    """

    url: str
    origin: str
    capabilities: frozenset[Capability] = ALL_CAPABILITIES
    tls: Tls = field(default_factory=Tls)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # values may be secrets
    dial_timeout: float | None = None
    proxy: str = ""
    credentials: str = OWN
    canonical: bool = False
    sends_ns: bool = True
    token_hosts: tuple[str, ...] = ()
    insecure_credentials: bool = False
    try_tls_first: bool = False
    downgrade_is_safe: bool = False
    prefix: str = ""
    rewrite: str | None = None

    @property
    def authority(self) -> str:
        """Host or host:port."""
        return urlsplit(self.url).netloc

    def repository(self, name: str) -> str:
        """What this host calls a repository of the namespace; "" when its file is not for that one."""
        if self.rewrite is None or not is_below(name, self.prefix):
            return name if self.rewrite is None else ""
        return f"{self.rewrite}/{name.removeprefix(self.prefix).lstrip('/')}".strip("/")

    def configured_identity(self, base: str) -> str:
        """What identifies this node in every request to `base`, beside credentials; "" for none."""
        if any(name.lower() not in _HARMLESS_HEADERS for name, _ in self.headers):
            return f"headers of {self.origin}"
        return f"client certificate of {self.origin}" if self.tls.client and base.startswith("https:") else ""

    @property
    def credential_policy(self) -> str:
        """Whose credentials this host gets: FROM_NAMESPACE, FROM_NOBODY, OWN, or the name of a stored one."""
        return self.credentials or (FROM_NAMESPACE if self.canonical else OWN)


@dataclass(frozen=True, slots=True)
class HostsConfig:
    """All endpoints of one namespace in the order of asking. origin: the file, or what stands in for it.

    prefix: of the repositories this is for, "" for all.  blocked: why nothing of them may be pulled; "" otherwise.
    """

    namespace: str
    hosts: tuple[Host, ...]
    origin: str
    directory: str = ""
    blocked: str = ""
    warnings: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def directories(self) -> tuple[str, ...]:
        """The directories searched for credentials.toml: beside the file, then in the directories above it up to the registry's."""
        above = PurePosixPath(self.directory).parents[: len(self.prefix.split("/")) if self.prefix else 0]
        return (self.directory, *map(str, above)) if self.directory else ()

    def able(self, capability: Capability) -> list[Host]:
        """The hosts that may be asked for something, in order."""
        return [host for host in self.hosts if capability in host.capabilities]


def directory_names(namespace: str) -> list[str]:
    """Names to look for in a config_path root, first match wins: `host_port_`, `host:port`, wildcards, `_default`.

    A directory without the port is another registry's and never matches. Wildcards are ours: `*.corp.example` (with
    `_port_` where there is one) is for every name below corp.example, the longest first. Source: containerd docs/hosts.md.
    """
    host, colon, port = namespace.rpartition(":")
    has_port = bool(colon) and port.isdigit()
    name, suffix = (host, f"_{port}_") if has_port else (namespace, "")
    labels = [] if "[" in name or name.replace(".", "").isdigit() else name.split(".")
    wildcards = [f"*.{'.'.join(labels[start:])}{suffix}" for start in range(1, len(labels) - 1)]
    return [*([host + suffix] if has_port else []), namespace, *wildcards, "_default"]


def repository_prefixes(repository: str) -> list[str]:
    """Directories to look for below the registry's, the longest first; at last "", the registry's own."""
    parts = repository.split("/") if repository else []
    return ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]


def is_below(repository: str, prefix: str) -> bool:
    """Whether a repository is the one named by `prefix`, or below it; everything is below ""."""
    return not prefix or repository == prefix or repository.startswith(f"{prefix}/")


def namespace_of(directory: str) -> str:
    """The namespace of a directory's name: `host_port_` is `host:port`."""
    host, _, port = directory.removesuffix("_").rpartition("_")
    return f"{host}:{port}" if directory.endswith("_") and host and port.isdigit() else directory


def canonical_name(server: str) -> str:
    """The namespace of a server address: scheme and path dropped, Docker Hub's names made one."""
    _, _, rest = server.rpartition("://")
    authority = rest.partition("/")[0].lower()
    return DOCKER_NAMESPACE if authority in _DOCKER_NAMES else authority


def is_local(authority: str) -> bool:
    """`localhost` or a loopback address, with or without a port."""
    try:
        name = urlsplit(f"//{authority}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def default_host(namespace: str, origin: str, tls: Tls | None = None) -> Host:
    """The namespace's own registry when no `server` is given; localhost speaks HTTP unless its port says otherwise."""
    tls = tls or Tls()
    if namespace == DOCKER_NAMESPACE:
        return _guess_tls(Host(f"https://{DOCKER_REGISTRY}/v2", origin, tls=tls, canonical=True))
    try:
        port = urlsplit(f"//{namespace}").port
    except ValueError:
        raise InvalidArgument(f'registry "{printable(namespace, 80)}" is not a host with a port', hint="ports end at 65535") from None
    if not is_local(namespace) or port in (None, 443):
        relaxed = Tls(tls.ca, tls.client, True) if is_local(namespace) and tls.skip_verify is None else tls
        return _guess_tls(Host(f"https://{namespace}/v2", origin, tls=relaxed, canonical=True))
    untouched = not tls.is_set
    if port != 80:
        tls = Tls(tls.ca, tls.client, True if tls.skip_verify is None else tls.skip_verify)
    host = _guess_tls(Host(f"http://{namespace}/v2", origin, tls=tls, canonical=True))
    # The file does not say `http`, so guess; the bytes do not leave this node either way.
    return replace(host, downgrade_is_safe=untouched, insecure_credentials=untouched)


def parse_hosts(document: Document, namespace: str, directory: str, prefix: str = "") -> HostsConfig:
    """A hosts.toml. `directory` anchors relative paths of certificates. `prefix`: of the repositories it is for, "" for all.

    Raises: InvalidArgument with file:line:column and the way out, for anything that is not fully understood.
    """
    _check_shape(document)
    warnings: list[str] = []
    hosts = [_table_host(document, namespace, directory, url, warnings) for url in document.get("host") or {}]
    blocked = bool(document.typed(bool, "blocked"))
    if document.typed(bool, "fallback") is False:
        if "server" in document.data:
            raise document.error("server and fallback = false contradict each other", "fallback", hint="remove one of them")
        if not hosts and not blocked:
            raise document.error("fallback = false leaves no host to ask", "fallback", hint='add a [host."https://…"] table')
    else:
        hosts.append(_server(document, namespace, directory, warnings))
    return HostsConfig(
        namespace=namespace,
        hosts=() if blocked else tuple(replace(host, prefix=prefix) for host in hosts),
        origin=document.name,
        directory=directory,
        blocked=f"{document.where('blocked')}: blocked = true" if blocked else "",
        warnings=tuple(warnings),
        prefix=prefix,
    )


def docker_certificates(namespace: str, directory: str, names: Iterable[str]) -> HostsConfig:
    """Docker's certs.d layout: `*.crt` are CAs, `*.cert` with `*.key` client pairs, for the namespace's own registry."""
    present = sorted(names)
    at = PurePosixPath(directory)
    pairs = []
    for name in present:
        if name.endswith(".cert"):
            key = name.removesuffix(".cert") + ".key"
            pairs.append((str(at / name), str(at / key) if key in present else ""))
    tls = Tls(ca=tuple(str(at / name) for name in present if name.endswith(".crt")), client=tuple(pairs))
    return HostsConfig(namespace, (default_host(namespace, directory, tls),), directory, directory)


def trusted_token_hosts(host: Host) -> frozenset[str]:
    """Host names (no port) whose token service may see this host's credentials, besides the host itself.

    Without a public suffix list, "same registrable domain" cannot be told from "same shared hosting", so only the very
    same name, names the administrator lists, and the operators' documented pairs count.
    """
    name = urlsplit(host.url).hostname or ""
    return frozenset({name, *(h.lower() for h in host.token_hosts), *_KNOWN_TOKEN_HOSTS.get(name, ())})


def parse_url(text: str, override_path: bool) -> str:
    """A `server` or `[host."…"]` value as an endpoint base. Raises: InvalidArgument naming the wrong part."""
    full = text if "://" in text else f"https://{text}"
    shown = printable(text, 160)
    try:
        parts = urlsplit(full)
    except ValueError:
        raise InvalidArgument(f'"{shown}" is no URL', hint='write it like "https://mirror.example:5000"') from None
    if parts.scheme not in ("http", "https"):
        raise InvalidArgument(f'"{shown}": unknown scheme "{printable(parts.scheme, 20)}"', hint="use https:// or http://")
    if "@" in parts.netloc:
        raise InvalidArgument("a URL with a user name or password", hint="store credentials in credentials.toml beside this file")
    match = _AUTHORITY.fullmatch(parts.netloc)
    if not match or (match[1] and not 0 < int(match[1]) < 65536):
        raise InvalidArgument(f'"{shown}" has no valid host', hint='write it like "https://mirror.example:5000"')
    if parts.query or parts.fragment:
        raise InvalidArgument(f'"{shown}" has a query or fragment', hint="only scheme, host, port and path are used")
    authority = parts.netloc.lower()
    if authority in _DOCKER_NAMES:
        authority = DOCKER_REGISTRY
    return f"{parts.scheme}://{authority}{_api_path(parts.path, override_path)}"


def _api_path(path: str, override_path: bool) -> str:
    """`/v2` is appended unless it ends the path already or override_path says not to."""
    clean = posixpath.normpath(path).rstrip("/") if path else ""
    clean = "/" + clean.lstrip("/") if clean else ""
    return clean if override_path or clean.endswith("/v2") else f"{clean}/v2"


def _check_shape(document: Document) -> None:
    document.check_keys(_ROOT_KEYS)
    try:
        document.typed(dict, "host")
    except InvalidArgument as error:
        raise document.error(error.what, "host", hint='host tables look like [host."https://mirror.example"]') from error
    for url, table in (document.get("host") or {}).items():
        if not isinstance(table, dict):
            hint = f'host tables look like [host."https://mirror.example"]; did you mean a root-level {url}?'
            raise document.error(f'"{printable(url, 80)}" below [host] is not a table', "host", url, hint=hint)
        misplaced = [key for key in table if key in ("server", "host", "fallback", "blocked")]
        if misplaced:
            hint = "it belongs to the top of the file, before the first [host] table"
            raise document.error(f"{misplaced[0]} inside a [host] table", "host", url, misplaced[0], hint=hint)
        for key, value in table.items():
            if isinstance(value, dict) and key not in _HOST_KEYS:
                hint = f'dots part names in TOML: write the whole address in quotes, [host."https://{printable(url, 80)}.…"]'
                raise document.error(f'a table "{printable(key, 80)}" inside [host.{printable(url, 80)}]', "host", url, key, hint=hint)
        document.check_keys(_HOST_KEYS, "host", url)


def _table_host(document: Document, namespace: str, directory: str, url: str, warnings: list[str]) -> Host:
    return _host(document, ("host", url), url, namespace, directory, warnings)


def _server(document: Document, namespace: str, directory: str, warnings: list[str]) -> Host:
    """The last endpoint: `server`, or the namespace's own registry, with the root-level fields."""
    server = document.typed(str, "server")
    if server is not None:
        return _host(document, (), server, namespace, directory, warnings)
    guessed = default_host(namespace, f"{document.name} (no server, so the registry itself)", _tls(document, (), directory))
    fields = _fields(document, (), directory)
    if fields.insecure_credentials or guessed.insecure_credentials:
        fields = replace(fields, insecure_credentials=True)
    return replace(
        fields,
        url=guessed.url,
        origin=guessed.origin,
        tls=guessed.tls,
        canonical=True,
        try_tls_first=guessed.try_tls_first,
        downgrade_is_safe=guessed.downgrade_is_safe,
    )


def _host(document: Document, table: tuple[str, ...], url: str, namespace: str, directory: str, warnings: list[str]) -> Host:
    position = table or ("server",)
    override = bool(document.typed(bool, *table, "override_path"))
    try:
        base = parse_url(url, override)
    except InvalidArgument as error:
        raise document.error(error.what, *position, hint=error.hint) from error
    if "/v2/" in base and not override:
        warnings.append(
            f"{document.where(*position)}: requests will go to {base}/<repository>; "
            "set override_path = true if /v2 shall not be appended to this path"
        )
    fields = _fields(document, table, directory)
    authority = urlsplit(base).netloc
    canonical = authority == namespace or (namespace == DOCKER_NAMESPACE and authority == DOCKER_REGISTRY)
    return _guess_tls(replace(fields, url=base, origin=document.where(*position), canonical=canonical))


def _fields(document: Document, table: tuple[str, ...], directory: str) -> Host:
    return Host(
        url="",
        origin="",
        capabilities=_capabilities(document, table),
        tls=_tls(document, table, directory),
        headers=_headers(document, table),
        rewrite=_rewrite(document, table),
        dial_timeout=document.duration(*table, "dial_timeout"),
        proxy=_proxy(document, table),
        credentials=_credentials(document, table),
        sends_ns=document.typed(bool, *table, "ns") is not False,
        token_hosts=tuple(document.strings(*table, "token_hosts")),
        insecure_credentials=bool(document.typed(bool, *table, "insecure_credentials")),
    )


def _capabilities(document: Document, table: tuple[str, ...]) -> frozenset[Capability]:
    names = document.strings(*table, "capabilities")
    known = {capability.value: capability for capability in Capability}
    for index, name in enumerate(names):
        if name.lower() not in known:
            raise document.error(f'unknown capability "{printable(name, 40)}"', *table, "capabilities", index, hint=suggestion(name, known))
    return frozenset(known[name.lower()] for name in names) or ALL_CAPABILITIES


def _tls(document: Document, table: tuple[str, ...], directory: str) -> Tls:
    absolute = _anchor(directory)
    return Tls(
        ca=tuple(absolute(name) for name in document.strings(*table, "ca")),
        client=_client_pairs(document, table, absolute),
        skip_verify=document.typed(bool, *table, "skip_verify"),
    )


def _anchor(directory: str) -> Callable[[str], str]:
    return lambda name: str(PurePosixPath(directory) / name)


def _client_pairs(document: Document, table: tuple[str, ...], absolute: Callable[[str], str]) -> tuple[tuple[str, str], ...]:
    """All three spellings: a PEM file, a list of PEM files, a list of [certificate, key] ("" key: the same file)."""
    value = document.get(*table, "client")
    entries = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(entries, list):
        raise document.error("client must be a file, a list of files, or a list of [certificate, key]", *table, "client")
    pairs = []
    for index, entry in enumerate(entries):
        pair = [entry, ""] if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair) or not pair[0]:
            raise document.error(
                "a client entry must be a file or a pair [certificate, key]", *table, "client", index, hint='e.g. ["c.cert", "c.key"]'
            )
        pairs.append((absolute(pair[0]), absolute(pair[1]) if pair[1] else ""))
    return tuple(pairs)


def _headers(document: Document, table: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    values = document.typed(dict, *table, "header") or {}
    found = []
    for name in values:
        if not _HEADER_NAME.fullmatch(name):
            raise document.error(f'"{printable(name, 40)}" is not a header name', *table, "header", name)
        for value in document.strings(*table, "header", name):
            if not value.isascii() or not value.isprintable():
                raise document.error(f"the value of header {name} has characters HTTP does not allow", *table, "header", name)
            found.append((name, value))
    return tuple(found)


def _proxy(document: Document, table: tuple[str, ...]) -> str:
    value = document.typed(str, *table, "proxy") or ""
    if value and value != DIRECT:
        try:
            parts = urlsplit(value)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise document.error("proxy is not a URL", *table, "proxy", hint=f'use "http://proxy.example:3128" or "{DIRECT}"')
    return value


def _rewrite(document: Document, table: tuple[str, ...]) -> str | None:
    hint = 'e.g. rewrite = "hub/library": that takes the place of the prefix this file is for; "" leaves the prefix out'
    value = document.get(*table, "rewrite")
    if value is None:
        return None
    if isinstance(value, str) and (not value or is_repository(value)):
        return value
    raise document.error(f"{dotted((*table, 'rewrite'))} is not the start of a repository's name", *table, "rewrite", hint=hint)


def _credentials(document: Document, table: tuple[str, ...]) -> str:
    value = document.typed(str, *table, "credentials") or ""
    if value and not _CREDENTIAL_NAME.fullmatch(value):
        hint = f'"{FROM_NAMESPACE}", "{FROM_NOBODY}", or a table of credentials.toml'
        raise document.error(f"{dotted((*table, 'credentials'))} is not a name", *table, "credentials", hint=hint)
    return value


def _guess_tls(host: Host) -> Host:
    """Containerd's rule for http:// hosts with TLS options on an ambiguous port."""
    parts = urlsplit(host.url)
    return replace(host, try_tls_first=parts.scheme == "http" and host.tls.is_set and parts.port not in (None, 80))
