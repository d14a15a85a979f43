"""Checks on what the kubelet sends, before anything is made of it. Pure; every failure is InvalidArgument.

What ends up in a file we generate (hosts, resolv.conf, hostname), in a path or in a kernel interface must not carry
characters that mean something there: newlines (CVE-2022-4318, CVE-2026-15809), `..` (CVE-2025-0750), `+` (CVE-2022-0811).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.runtime.model import ContainerConfig, DNSConfig, IDMapping, NamespaceMode, PodSandboxConfig
from imgsvc.runtime.spec.sysctls import canonical

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", re.ASCII)
_IP = re.compile(r"[0-9A-Fa-f.:]{2,45}(%[A-Za-z0-9_.-]{1,15})?", re.ASCII)
_WORD = re.compile(r"[!-~]{1,255}", re.ASCII)
_SYSCTL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*([./][A-Za-z0-9][A-Za-z0-9_:*@.-]*)+", re.ASCII)
_SYSCTL_VALUE = re.compile(r"[0-9A-Za-z,.:/_ \t-]{0,256}", re.ASCII)
_IPC_SYSCTLS: Final = ("kernel.shm", "kernel.msg", "fs.mqueue.")
_MAX_TEXT: Final = 256 * 1024  # [characters] of one annotation; Kubernetes allows 256 KiB for all together


def plain(text: str, what: str) -> str:
    """Text without control characters. Returns it."""
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise InvalidArgument(f'{what} contains control characters: "{printable(text, 120)}"')
    return text


def pod(config: PodSandboxConfig) -> None:
    """Everything about a pod that can be judged by itself."""
    m = config.metadata
    if not m.name or not m.namespace or not m.uid:
        raise InvalidArgument("a pod sandbox needs a name, a namespace and a UID")
    for text, what in ((m.name, "pod name"), (m.namespace, "pod namespace"), (m.uid, "pod UID")):
        if "/" in plain(text, what) or text in (".", ".."):
            raise InvalidArgument(f'{what} "{printable(text, 120)}" contains a slash')
    if config.hostname and not _HOSTNAME.fullmatch(config.hostname):
        raise InvalidArgument(f'"{printable(config.hostname, 80)}" is not a host name')
    if config.log_directory:
        clean_path(config.log_directory, "log_directory")
    if config.dns_config:
        _dns(config.dns_config)
    texts(config.labels, "label")
    texts(config.annotations, "annotation")
    _cgroup_parent(config.linux.cgroup_parent)
    sysctls(config.linux.sysctls, config)
    _namespaces(config)
    for port in config.port_mappings:
        if not 0 <= port.host_port <= 65535 or not 0 <= port.container_port <= 65535 or port.protocol not in (0, 1, 2):
            raise InvalidArgument(f"port mapping {port.host_port}:{port.container_port} is out of range")
        if port.host_ip and not _IP.fullmatch(port.host_ip):
            raise InvalidArgument(f'"{printable(port.host_ip, 60)}" is not an IP address', where="port_mappings")


def container(config: ContainerConfig) -> None:
    """Everything about a container that can be judged by itself."""
    if not config.metadata.name:
        raise InvalidArgument("a container needs a name")
    plain(config.metadata.name, "container name")
    texts(config.labels, "label")
    texts(config.annotations, "annotation")
    if config.log_path:
        relative_path(config.log_path, "log_path")
    for env in config.envs:
        if not env.key or "=" in env.key or "\0" in env.key or b"\0" in env.value:
            raise InvalidArgument(f'"{printable(env.key, 80)}" cannot be an environment variable')
    for text in (*config.command, *config.args, config.working_dir):
        if "\0" in text:
            raise InvalidArgument("a command, an argument or the working directory contains a NUL byte")
    for m in config.mounts:
        if not m.container_path or "\0" in m.container_path or "\0" in m.host_path:
            raise InvalidArgument(f'"{printable(m.container_path, 120)}" cannot be a mount point')
    plain(config.security.run_as_username, "user name")


def clean_path(path: str, what: str) -> str:
    """An absolute path without `.`, `..`, double slashes and control characters. Returns it without a slash at its end."""
    trimmed = path.rstrip("/") or "/"
    if not path.startswith("/") or os.path.normpath(trimmed) != trimmed:
        raise InvalidArgument(f'{what} "{printable(path, 200)}" is not a plain absolute path')
    return plain(trimmed, what)


def relative_path(path: str, what: str) -> str:
    """A path that stays below wherever it is put."""
    if path.startswith("/") or os.path.normpath(path) != path or path.split("/", maxsplit=1)[0] == "..":
        raise InvalidArgument(f'{what} "{printable(path, 200)}" is not a plain relative path')
    return plain(path, what)


def texts(values: Mapping[str, str], what: str) -> None:
    """Keys of labels and annotations are one line; values may have several, but no NUL."""
    for key, value in values.items():
        plain(key, f"{what} key")
        if "\0" in value or len(value) > _MAX_TEXT:
            raise InvalidArgument(f'{what} "{printable(key, 80)}" contains a NUL character or is too long')


def _dns(dns: DNSConfig) -> None:
    for server in dns.servers:
        if not _IP.fullmatch(server):
            raise InvalidArgument(f'"{printable(server, 80)}" is not the address of a DNS server')
    for word in (*dns.searches, *dns.options):
        if not _WORD.fullmatch(word):
            raise InvalidArgument(f'"{printable(word, 80)}" cannot stand in resolv.conf')


def _cgroup_parent(parent: str) -> None:
    if parent and (".." in parent.split("/") or plain(parent, "cgroup_parent").count("\0")):
        raise InvalidArgument(f'cgroup_parent "{printable(parent, 200)}" leads out of its directory')


def sysctls(values: Mapping[str, str], config: PodSandboxConfig) -> None:
    """Only namespaced sysctls, only when the pod has that namespace for itself, only harmless characters."""
    for name, value in values.items():
        dotted = canonical(name)
        if not _SYSCTL_NAME.fullmatch(name) or ".." in name.replace("/", "."):
            raise InvalidArgument(f'"{printable(name, 120)}" is not the name of a sysctl')
        if not _SYSCTL_VALUE.fullmatch(value):
            raise InvalidArgument(f'"{printable(value, 120)}" is not a value for sysctl {name}')
        if dotted.startswith("net."):
            if config.namespaces.network == NamespaceMode.NODE:
                raise InvalidArgument(f"sysctl {name} would change the node: the pod uses the host's network")
        elif dotted.startswith(_IPC_SYSCTLS) or dotted == "kernel.sem":
            if config.namespaces.ipc == NamespaceMode.NODE:
                raise InvalidArgument(f"sysctl {name} would change the node: the pod uses the host's IPC namespace")
        else:
            raise InvalidArgument(f"sysctl {name} is not namespaced: it would change the node")


def _namespaces(config: PodSandboxConfig) -> None:
    user = config.namespaces.userns_options
    if user is None:
        return
    if user.mode not in (NamespaceMode.POD, NamespaceMode.NODE):
        raise InvalidArgument("a user namespace is the pod's or the node's")
    if user.mode == NamespaceMode.NODE:
        if user.uids or user.gids:
            raise InvalidArgument("ID mappings without a user namespace of the pod's own")
        return
    for mappings, what in ((user.uids, "UID"), (user.gids, "GID")):
        id_mappings(mappings, what)
    if tuple(user.uids) != tuple(user.gids):
        raise InvalidArgument("UIDs and GIDs must be mapped alike")


def id_mappings(mappings: tuple[IDMapping, ...], what: str) -> None:
    """Exactly one run, from ID 0 of the container, not onto the host's ID 0."""
    if len(mappings) != 1:
        raise InvalidArgument(f"{len(mappings)} {what} mappings; exactly one is supported")
    m = mappings[0]
    if m.container_id != 0 or m.length <= 0 or m.host_id + m.length > 2**32 - 1:
        raise InvalidArgument(f"the {what} mapping {m.container_id}:{m.host_id}:{m.length} must map ID 0 of the container")


def hostname_of(config: PodSandboxConfig) -> str:
    """The pod's host name; that of the node when it shares its network."""
    return config.hostname or os.uname().nodename
