"""The pod network: which CNI networks there are, attaching and detaching a pod, whether it is ready.

The configuration directory is read again on every request (a few stat calls), so there is no watcher that could miss a change.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.base.concurrency import all_of
from imgsvc.base.errors import ImgsvcError, InvalidArgument, printable
from imgsvc.base.fsutil import write_atomic
from imgsvc.runtime.interfaces import NetworkPlugin
from imgsvc.runtime.model import PodSandboxConfig
from imgsvc.runtime.network.cni import CNI, Attachment, NetworkList, config_files, load_networks, parse_network, pod_addresses
from imgsvc.runtime.network.template import render
from imgsvc.runtime.settings import CNISettings

log = logging.getLogger(__name__)

_STATUS_TTL_S: Final = 5.0  # the kubelet asks about every 5 s; plugins need not run more often
_TEMPLATE_FILE: Final = "10-imgsvc-net.conflist"
_PROTOCOLS: Final = ("tcp", "udp", "sctp")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|[kMGTPE]i?|)", re.ASCII)
_SUFFIX: Final = (
    {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    | {f"{unit}i": 1024.0**power for power, unit in enumerate("kMGTPE", start=1)}
    | {"Ki": 1024.0}
)
# The name is containerd's: what it attached, it can detach after a change of runtimes, and the other way round.
_LOOPBACK: Final = parse_network(b'{"cniVersion": "0.3.1", "name": "cni-loopback", "plugins": [{"type": "loopback"}]}', "loopback")


@dataclass(frozen=True, slots=True)
class _Loaded:
    signature: object
    networks: tuple[NetworkList, ...]
    problem: ImgsvcError | None


class PodNetwork:
    """CNI networks of the node. Satisfies NetworkPlugin."""

    def __init__(self, settings: CNISettings) -> None:
        self._settings = settings
        self._cni = CNI(settings.bin_dirs, Path(settings.cache_dir))
        self._loaded: dict[tuple[str, int], _Loaded] = {}
        self._status: tuple[float, ImgsvcError | None] | None = None

    def networks(self, conf_dir: str = "", limit: int | None = None) -> tuple[NetworkList, ...]:
        """The configured networks. Raises: NotFound (none), InvalidArgument (a broken file)."""
        directory = conf_dir or self._settings.conf_dir
        count = self._settings.max_conf_num if limit is None else limit
        signature = _signature(directory)
        loaded = self._loaded.get((directory, count))
        if loaded is None or loaded.signature != signature:
            loaded = _load(directory, count, signature)
            self._loaded[directory, count] = loaded
            self._status = None
        if loaded.problem:
            raise loaded.problem
        return loaded.networks

    async def setup(self, sandbox_id: str, netns: str, config: PodSandboxConfig, *, conf_dir: str = "", max_conf_num: int | None = None,
                    cgroup_path: str = "") -> tuple[str, ...]:  # fmt: skip
        """Attach a pod to every network, eth0 first; its addresses, the primary one first.

        A failure leaves what was attached to the caller's teardown(). Raises: CNIError, NotFound, InvalidArgument.
        """
        networks = self.networks(conf_dir, max_conf_num)
        for loopback in self._loopback():
            await self._cni.add(loopback, Attachment(sandbox_id, netns, "lo", pod_args(sandbox_id, config)))
        capabilities = pod_capabilities(config, cgroup_path)
        attachments = [
            Attachment(sandbox_id, netns, f"eth{number}", pod_args(sandbox_id, config), capabilities) for number in range(len(networks))
        ]
        pairs = list(zip(networks, attachments, strict=True))
        if self._settings.setup_serially:
            results = [await self._cni.add(network, attachment) for network, attachment in pairs]
        else:
            results = await all_of(*(self._cni.add(network, attachment) for network, attachment in pairs))
        return tuple(ip for result in results for ip in pod_addresses(result, self._settings.ip_pref))

    def _loopback(self) -> tuple[NetworkList, ...]:
        """The network of the loopback plugin, where it is wanted; the interface itself is up already."""
        return () if self._settings.use_internal_loopback else (_LOOPBACK,)

    async def teardown(self, sandbox_id: str, netns: str) -> None:
        """Detach a pod from all it was attached to, with the configuration that was used then. Idempotent.

        Every network is tried; the first failure is raised at the end.
        """
        failure: ImgsvcError | None = None
        for network, attachment in reversed(self._cni.cached(sandbox_id)):
            try:
                gone = Attachment(sandbox_id, netns, attachment.interface, attachment.args, attachment.capabilities)
                await self._cni.delete(network, gone)
            except ImgsvcError as error:
                failure = failure or error
        if failure:
            raise failure

    async def check(self, sandbox_id: str) -> None:
        """CHECK every attachment of a pod. Raises: CNIError."""
        for network, attachment in self._cni.cached(sandbox_id):
            await self._cni.check(network, attachment)

    async def status(self) -> ImgsvcError | None:
        """None when a pod could be attached now, else why not."""
        try:
            networks = (*self._loopback(), *self.networks())
        except ImgsvcError as error:
            return error
        if self._status and time.monotonic() - self._status[0] < _STATUS_TTL_S:
            return self._status[1]
        problem: ImgsvcError | None = None
        for network in networks:
            try:
                await self._cni.status(network)
            except ImgsvcError as error:
                problem = error
                break
        self._status = (time.monotonic(), problem)
        return problem

    async def collect(self, alive: set[str]) -> None:
        """After a restart: detach pods that no longer exist, and let plugins that can (GC) do the same."""
        for owner in self._cni.cached_owners() - alive:
            try:
                await self.teardown(owner, "")
            except ImgsvcError as error:
                log.warning("detaching the forgotten pod %s: %s", owner, error)
        try:
            for network in self.networks():
                wanted = [(c, a.interface) for c in alive for n, a in self._cni.cached(c) if n.name == network.name]
                await self._cni.gc(network, wanted)
        except ImgsvcError as error:
            log.info("no CNI garbage collection: %s", error)

    def update_pod_cidr(self, pod_cidr: str) -> None:
        """Write the network from [cni] conf_template, once there is a PodCIDR; nothing is done without a template. Blocking.

        Raises: InvalidArgument (CIDR or template).
        """
        if not pod_cidr or not self._settings.conf_template:
            return
        ranges = [cidr.strip() for cidr in pod_cidr.split(",")]
        if not all(re.fullmatch(r"[0-9a-fA-F.:]+/[0-9]{1,3}", cidr) for cidr in ranges):
            raise InvalidArgument(f'"{printable(pod_cidr, 80)}" is not a list of networks')
        routes = ["::/0" if ":" in cidr else "0.0.0.0/0" for cidr in ranges]
        template = Path(self._settings.conf_template).read_text()
        text = render(template, {"PodCIDR": ranges[0], "PodCIDRRanges": ranges, "Routes": list(dict.fromkeys(routes))})
        Path(self._settings.conf_dir).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(self._settings.conf_dir, _TEMPLATE_FILE), text.encode(), mode=0o644)

    def describe(self) -> dict[str, Any]:
        """For Status(verbose)."""
        try:
            listed = [
                {"name": n.name, "cniVersion": n.version, "source": n.source, "plugins": [p["type"] for p in n.plugins]}
                for n in self.networks()
            ]
        except ImgsvcError as error:
            return {"problem": str(error)}
        return {"networks": listed}


def as_network_plugin(network: PodNetwork) -> NetworkPlugin:
    """Typed as its Protocol, for mypy."""
    return network


def _signature(directory: str) -> object:
    found = []
    for path in config_files(directory):
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((path.name, status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _load(directory: str, limit: int, signature: object) -> _Loaded:
    try:
        return _Loaded(signature, tuple(load_networks(directory, limit)), None)
    except ImgsvcError as error:
        if isinstance(error, InvalidArgument):
            log.warning("pods get no network until this CNI file is corrected or removed, whatever others there are: %s", error)
        return _Loaded(signature, (), error)


def pod_args(sandbox_id: str, config: PodSandboxConfig) -> dict[str, str]:
    """CNI_ARGS as Kubernetes plugins expect them. Raises: InvalidArgument when a name would break the format."""
    m = config.metadata
    args = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": m.namespace,
        "K8S_POD_NAME": m.name,
        "K8S_POD_INFRA_CONTAINER_ID": sandbox_id,
        "K8S_POD_UID": m.uid,
    }
    for value in args.values():
        if any(c in value for c in ";=\n\r\0"):
            raise InvalidArgument(f'"{printable(value, 80)}" cannot be passed to a CNI plugin')
    return args


def pod_capabilities(config: PodSandboxConfig, cgroup_path: str) -> dict[str, Any]:
    """What plugins with the matching capability receive as runtimeConfig."""
    capabilities: dict[str, Any] = {"cgroupPath": cgroup_path}
    capabilities["portMappings"] = [
        {"hostPort": p.host_port, "containerPort": p.container_port, "protocol": _PROTOCOLS[p.protocol], "hostIP": p.host_ip}
        for p in config.port_mappings
        if p.host_port > 0
    ]
    capabilities["bandwidth"] = bandwidth(config.annotations)
    if config.dns_config:
        dns = config.dns_config
        capabilities["dns"] = {"servers": list(dns.servers), "searches": list(dns.searches), "options": list(dns.options)}
    return capabilities


def bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    """Rates [bit/s] from kubernetes.io/ingress-bandwidth and egress-bandwidth. Raises: InvalidArgument."""
    rates: dict[str, int] = {}
    for direction in ("ingress", "egress"):
        text = annotations.get(f"kubernetes.io/{direction}-bandwidth")
        if text is None:
            continue
        match = _QUANTITY.fullmatch(text)
        if match is None:
            raise InvalidArgument(
                f'"{printable(text, 40)}" is not a bandwidth', where=f"kubernetes.io/{direction}-bandwidth", hint="e.g. 10M"
            )
        rates[f"{direction}Rate"] = int(float(match[1]) * _SUFFIX[match[2]])
        rates[f"{direction}Burst"] = 2**31 - 1  # no limit of its own on bursts; the plugin wants a number
    return rates
