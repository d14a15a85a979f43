"""Files a pod's containers share: hosts, resolv.conf, hostname, and the tmpfs behind /dev/shm. Blocking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from imgsvc.base import kernel
from imgsvc.runtime.model import DNSConfig, NamespaceMode, PodSandboxConfig
from imgsvc.runtime.spec.selinux import mount_option, relabel
from imgsvc.runtime.spec.validate import hostname_of

SHM_SIZE: Final = 64 * 1024 * 1024  # [bytes], Docker's default
PROVIDED: Final = ("/etc/hosts", "/etc/resolv.conf", "/etc/hostname")


def write(directory: Path, config: PodSandboxConfig, label: str) -> None:
    """Write the files; the host's own where the pod shares its network and says nothing else. label: of SELinux, or ""."""
    host_network = config.namespaces.network == NamespaceMode.NODE
    owner = config.namespaces.user.uids[0].host_id if config.namespaces.user else 0
    _file(directory / "hostname", f"{hostname_of(config)}\n".encode(), owner)
    _file(directory / "hosts", _read("/etc/hosts") if host_network else hosts_file(hostname_of(config)).encode(), owner)
    dns = config.dns_config
    _file(
        directory / "resolv.conf",
        resolv_conf(dns).encode() if dns and (dns.servers or dns.searches or dns.options) else _read("/etc/resolv.conf"),
        owner,
    )
    for path in provided(directory).values():
        relabel(path, label)


def hosts_file(hostname: str) -> str:
    """A small /etc/hosts."""
    names = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    return f"{names}127.0.1.1\t{hostname}\n" if hostname else names


def resolv_conf(dns: DNSConfig) -> str:
    """resolv.conf(5) text; every part was checked by validate.pod."""
    lines = []
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "".join(line + "\n" for line in lines)


def mount_shm(directory: Path, config: PodSandboxConfig, label: str) -> None:
    """A tmpfs for the pod's /dev/shm, unless it shares the node's IPC namespace."""
    if config.namespaces.ipc == NamespaceMode.NODE:
        return
    target = directory / "shm"
    target.mkdir(mode=0o1777, exist_ok=True)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    owner = f",uid={config.namespaces.user.uids[0].host_id},gid={config.namespaces.user.gids[0].host_id}" if config.namespaces.user else ""
    kernel.mount("shm", str(target), "tmpfs", flags, ",".join([f"mode=1777,size={SHM_SIZE}{owner}", *mount_option(label)]))


def shm_source(directory: Path, config: PodSandboxConfig) -> str:
    """What is bound at /dev/shm of the pod's containers."""
    return "/dev/shm" if config.namespaces.ipc == NamespaceMode.NODE else str(directory / "shm")


def provided(directory: Path) -> dict[str, str]:
    """Container path -> host path of the generated files."""
    return {path: str(directory / os.path.basename(path)) for path in PROVIDED}


def _file(path: Path, data: bytes, owner: int) -> None:
    path.write_bytes(data)
    path.chmod(0o644)
    if owner:
        os.chown(path, owner, owner)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
