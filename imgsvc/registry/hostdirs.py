"""Finding the hosts.toml of a namespace below the config_path roots, and saying why the others did not match. Blocking I/O.

Files are read on every call, so that a change takes effect on the next pull; a file that is there but wrong is an error
for its namespace and never leads to another host being asked.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from imgsvc.errors import FailedPrecondition, ImgsvcError, InvalidArgument, from_os_error
from imgsvc.registry.hosts import HostsConfig, default_host, directory_names, docker_certificates, namespace_of, parse_hosts
from imgsvc.registry.legacy import for_namespace
from imgsvc.tomlfile import load

log = logging.getLogger(__name__)

_MAX_TOLD: Final = 256  # warnings remembered


@dataclass(frozen=True, slots=True)
class Searched:
    """One place that was looked at, and the outcome in words."""

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

    def namespaces(self) -> list[str]:
        """Every registry that has a directory of its own, or an entry of the legacy tables."""
        found = {name for name in self._inline if name != "*"}
        for root in filter(os.path.isdir, self._roots):
            found.update(namespace_of(name) for name in os.listdir(root) if name != "_default" and os.path.isdir(os.path.join(root, name)))
        return sorted(found)

    def lookup(self, namespace: str) -> HostsConfig:
        """The endpoints of a namespace. What is odd about its file without being wrong is logged once.

        Raises: InvalidArgument (file:line:column) for a file that is wrong, PermissionDenied and others for one that
        cannot be read, FailedPrecondition when pulling from the namespace is blocked.
        """
        config, _ = self.search(namespace)
        if len(self._told) > _MAX_TOLD:
            self._told.clear()
        for warning in config.warnings:
            if warning not in self._told:
                log.warning("%s", warning)
            self._told.add(warning)
        if config.blocked:
            raise FailedPrecondition(f"pulling from {namespace} is blocked", where=config.blocked.split(": ")[0], hint="by configuration")
        return config

    def search(self, namespace: str) -> tuple[HostsConfig, list[Searched]]:
        """As lookup, for explain: a blocked namespace is returned, and every place that was looked at comes along."""
        searched: list[Searched] = []
        directory = self._find(namespace, searched)
        if directory is not None:
            return self._load(namespace, directory), searched
        for name in (namespace, "*"):
            if name in self._inline:
                return for_namespace(self._inline[name], namespace), searched
        host = default_host(namespace, "built-in default: the registry itself")
        return HostsConfig(namespace, (host,), "built-in default"), searched

    def _find(self, namespace: str, searched: list[Searched]) -> Path | None:
        found: Path | None = None
        for root in self._roots:
            if not os.path.isdir(root):
                searched.append(Searched(root, "no such directory"))
                continue
            for name in directory_names(namespace):
                path = Path(root, name)
                if not self._is_directory(path):
                    searched.append(Searched(str(path), "not there"))
                elif found is None:
                    found = path
                    searched.append(Searched(str(path), "used"))
                else:
                    searched.append(Searched(str(path), f"not read: {found} comes first"))
            self._note_similar(root, namespace, searched)
        return found

    def _is_directory(self, path: Path) -> bool:
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_os_error(error, "looking for registry configuration", where=str(path)) from error

    def _note_similar(self, root: str, namespace: str, searched: list[Searched]) -> None:
        """Directories people create by mistake for this namespace."""
        bare = namespace.rpartition(":")[0] if namespace.rpartition(":")[2].isdigit() else ""
        aliases = ("index.docker.io", "registry-1.docker.io") if namespace == "docker.io" else ()
        for name, why in [(bare, "is for the registry without a port"), *((a, "the namespace is docker.io") for a in aliases)]:
            if name and os.path.isdir(os.path.join(root, name)):
                searched.append(Searched(os.path.join(root, name), f"does not match: {why}"))

    def _load(self, namespace: str, directory: Path) -> HostsConfig:
        path = directory / "hosts.toml"
        try:
            names = [entry.name for entry in os.scandir(directory) if not entry.is_dir()]
            # An empty file means the same as none; anything else by that name, a dangling link too, must be readable.
            is_empty = not os.path.lexists(path) or (path.is_file() and path.stat().st_size == 0)
        except OSError as error:
            raise from_os_error(error, "reading registry configuration", where=str(directory)) from error
        if not is_empty:
            document = load(path)
            config = parse_hosts(document, namespace, str(directory))
        else:
            config = docker_certificates(namespace, str(directory), names)
            if not config.hosts[0].tls.ca and not config.hosts[0].tls.client:
                config = replace(config, warnings=(f"{directory} has neither hosts.toml nor certificates; defaults are used",))
        for host in config.hosts:
            _check_files(host.origin, [*host.tls.ca, *(name for pair in host.tls.client for name in pair if name)])
        return config


def _check_files(origin: str, names: Sequence[str]) -> None:
    for name in names:
        try:
            os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            mapped: ImgsvcError = from_os_error(error, f"certificate file {name}")
            raise InvalidArgument(mapped.what, where=origin, hint="relative paths start at the directory of hosts.toml") from error
