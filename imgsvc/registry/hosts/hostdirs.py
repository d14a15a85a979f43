"""Finding the hosts.toml of an image's registry below the config_path roots, and saying why others did not match. Blocking I/O.

The first root with a directory for the registry decides. Below that directory, one named by a prefix of the repository
that holds a hosts.toml (`docker.io/library/hosts.toml`) applies to its repositories, the longest first: containerd does
not look there, so its files keep their meaning.

Files are read on every call, so that a change takes effect on the next pull; a file that is there but wrong is an error
for its namespace and never leads to another host being asked.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from imgsvc.base.errors import FailedPrecondition, ImgsvcError, InvalidArgument, from_os_error
from imgsvc.base.reference import is_repository
from imgsvc.base.tomlfile import load
from imgsvc.registry.hosts.hosts import (
    HostsConfig,
    default_host,
    directory_names,
    docker_certificates,
    namespace_of,
    parse_hosts,
    repository_prefixes,
)
from imgsvc.registry.hosts.legacy import for_namespace

log = logging.getLogger(__name__)

_FILE: Final = "hosts.toml"
_LOWER: Final = "repositories are written in lower case"
_MAX_TOLD: Final = 256  # warnings remembered


@dataclass(frozen=True, slots=True)
class Searched:
    """One path that was tried, and the outcome in words."""

    path: str
    outcome: str


def split_config_path(value: str) -> tuple[str, ...]:
    """`config_path` of the configuration as directories. Source: containerd's filepath.SplitList."""
    return tuple(part for part in value.split(":") if part)


class HostDirectories:
    """Looks namespaces up. `inline`: configurations from the daemon's own file (legacy mirrors), used when no directory matches."""

    def __init__(self, roots: Sequence[str], inline: Mapping[str, HostsConfig] | None = None) -> None:
        self._roots = tuple(roots)
        self._inline = dict(inline or {})
        self._told: set[str] = set()  # warnings that were logged, so that each is once

    def missing_roots(self) -> list[str]:
        """Configured roots that are not there, for a warning at start."""
        return [root for root in self._roots if not os.path.isdir(root)]

    def namespaces(self) -> list[tuple[str, str]]:
        """(registry, repository prefix) of all that have a file of their own, or an entry of the legacy tables; "" is the registry."""
        found = {(name, "") for name in self._inline if name != "*"}
        for path in self._directories():
            if not _is_pattern(path.name):
                found.update((namespace_of(path.name).lower(), prefix) for prefix in ("", *_prefixes_with_files(path)))
        return sorted(found)

    def patterns(self) -> list[str]:
        """Directories that apply to registries they do not name: `_default` and wildcards."""
        return sorted(str(path) for path in self._directories() if _is_pattern(path.name))

    def _directories(self) -> Iterator[Path]:
        for root in filter(os.path.isdir, self._roots):
            yield from filter(Path.is_dir, Path(root).iterdir())

    def lookup(self, namespace: str, repository: str = "") -> HostsConfig:
        """The endpoints for a repository of a namespace. What is odd about their file without being wrong is logged once.

        Raises: InvalidArgument (file:line:column) for a file that is wrong, PermissionDenied and others for one that
        cannot be read, FailedPrecondition when pulling from the namespace is blocked.
        """
        config, _ = self.search(namespace, repository)
        self.tell(config.warnings)
        if config.blocked:
            what = f"{namespace}/{config.prefix}" if config.prefix else namespace
            raise FailedPrecondition(f"pulling from {what} is blocked", where=config.blocked.split(": ")[0], hint="by configuration")
        return config

    def tell(self, warnings: Iterable[str]) -> None:
        """Log what was not logged before."""
        if len(self._told) > _MAX_TOLD:
            self._told.clear()
        for warning in warnings:
            if warning not in self._told:
                log.warning("%s", warning)
            self._told.add(warning)

    def search(self, namespace: str, repository: str = "") -> tuple[HostsConfig, list[Searched]]:
        """As lookup, for explain: blocked hosts are returned, and every path that was tried."""
        if repository and not is_repository(repository):
            raise InvalidArgument(f'no repository is called "{repository}", so its file is never used', where=namespace, hint=_LOWER)
        searched: list[Searched] = []
        found = self._find(namespace, repository, searched)
        if found is not None:
            config = self._load(namespace, *found)
            for host in config.hosts:
                if repository and not host.repository(repository):
                    raise InvalidArgument(
                        f'rewrite = "" leaves nothing of {repository}', where=host.origin, hint="name what it is called there"
                    )
            return config, searched
        for name in (namespace, "*"):
            if name in self._inline:
                return for_namespace(self._inline[name], namespace), searched
        host = default_host(namespace, "built-in default: the registry itself")
        return HostsConfig(namespace, (host,), "built-in default"), searched

    def _find(self, namespace: str, repository: str, searched: list[Searched]) -> tuple[Path, str] | None:
        """The directory to go by, and the prefix of the repositories it is for."""
        found: tuple[Path, str] | None = None
        for root in self._roots:
            if not os.path.isdir(root):
                searched.append(Searched(root, "no such directory"))
                continue
            spelt = _spellings(root)
            for name in directory_names(namespace):
                path = Path(root, name)
                if not _is_directory(path) and name in spelt:
                    path = Path(root, spelt[name])
                if not _is_directory(path):
                    searched.append(Searched(str(path), "not there"))
                elif found is None:
                    found = _most_specific(path, namespace, repository, searched)
                else:
                    searched.append(Searched(str(path), f"not read: {found[0]} comes first"))
            self._note_similar(root, namespace, searched)
        return found

    def _note_similar(self, root: str, namespace: str, searched: list[Searched]) -> None:
        """Directories people create by mistake for this namespace."""
        bare = namespace.rpartition(":")[0] if namespace.rpartition(":")[2].isdigit() else ""
        aliases = ("index.docker.io", "registry-1.docker.io") if namespace == "docker.io" else ()
        for name, why in [(bare, "is for the registry without a port"), *((a, "the namespace is docker.io") for a in aliases)]:
            if name and os.path.isdir(os.path.join(root, name)):
                searched.append(Searched(os.path.join(root, name), f"does not match: {why}"))

    def _load(self, namespace: str, directory: Path, prefix: str) -> HostsConfig:
        path = directory / _FILE
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in entries if not entry.is_dir()]
            # An empty file means the same as none; anything else by that name, a dangling link too, must be readable.
            is_empty = not os.path.lexists(path) or (path.is_file() and path.stat().st_size == 0)
        except OSError as error:
            raise from_os_error(error, "reading registry configuration", where=str(directory)) from error
        if not is_empty:
            document = load(path)
            config = parse_hosts(document, namespace, str(directory), prefix)
        else:
            config = docker_certificates(namespace, str(directory), names)
            is_bare = not config.hosts[0].tls.ca and not config.hosts[0].tls.client
            if is_bare and not any(_prefixes_with_files(directory)):
                config = replace(config, warnings=(f"{directory} has neither hosts.toml nor certificates; defaults are used",))
        for host in config.hosts:
            _check_files(host.origin, [*host.tls.ca, *(name for pair in host.tls.client for name in pair if name)])
        return config


def _spellings(root: str) -> dict[str, str]:
    """What directories are called, by name in lower case: host names are, and people copy them as they come."""
    try:
        return {name.lower(): name for name in sorted(os.listdir(root), reverse=True)}
    except OSError as error:
        raise from_os_error(error, "looking for registry configuration", where=root) from error


def _is_pattern(name: str) -> bool:
    return name == "_default" or "*" in name


def _mode(path: Path, *, follow: bool = True) -> int:
    """Of what is there, 0 when nothing is. Raises: PermissionDenied and others: what cannot be looked at may decide."""
    try:
        return path.stat(follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise from_os_error(error, "looking for registry configuration", where=str(path)) from error


def _is_directory(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def _most_specific(directory: Path, namespace: str, repository: str, searched: list[Searched]) -> tuple[Path, str]:
    """The directory of the longest prefix of the repository that has a file, else the registry's own."""
    found = (directory, "")
    for prefix in repository_prefixes(repository):
        path = directory / prefix
        if prefix and not _mode(path / _FILE, follow=False):
            if _is_directory(path):
                searched.append(Searched(str(path), f"has no {_FILE}"))
        elif found[1]:
            searched.append(Searched(str(path), f"not read: {found[0]} is more specific"))
        else:
            found = (path, prefix)
            searched.append(Searched(str(path), f"used, for {namespace}/{prefix} and below" if prefix else "used"))
    return found


def _prefixes_with_files(directory: Path) -> Iterator[str]:
    """The repository prefixes that have a file below a registry's directory."""
    for path, directories, _ in os.walk(directory):
        directories.sort()
        for name in directories:
            if os.path.lexists(os.path.join(path, name, _FILE)):
                yield os.path.relpath(os.path.join(path, name), directory)


def _check_files(origin: str, names: Sequence[str]) -> None:
    for name in names:
        try:
            os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            mapped: ImgsvcError = from_os_error(error, f"certificate file {name}")
            raise InvalidArgument(mapped.what, where=origin, hint="relative paths start at the directory of hosts.toml") from error
