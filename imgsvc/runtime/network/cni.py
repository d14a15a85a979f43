"""The CNI protocol: network lists, plugin calls, results, the cache of attachments.

A plugin is a program: command and addresses in its environment, configuration as JSON on standard input, a result or an
error as JSON on standard output. Versions 0.1.0 to 1.1.0.

Source: containernetworking/cni SPEC.md 1.1.0; libcni (names of cache files and members, semantics).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from imgsvc.base.errors import DataLoss, InvalidArgument, NotFound, Unavailable, printable
from imgsvc.base.fsutil import private_dir, write_atomic
from imgsvc.base.programs import SAFE_PATH, Finished, run

PLUGIN_TIMEOUT_S: Final = 110.0  # below the kubelet's two minutes for one CRI call
MAX_CONFIG: Final = 1024 * 1024  # [bytes] of one configuration file
_TEXT_BUSY_TRIES: Final = 5  # ETXTBSY: the plugin is being replaced right now
_CACHE_KIND: Final = "cniCacheV1"


class CNIError(Unavailable):
    """A plugin said no. code: as in SPEC.md "Error"; 11 means try again later."""

    def __init__(self, network: str, plugin: str, verb: str, code: int, text: str) -> None:
        super().__init__(f'CNI {verb} of plugin {plugin} in network "{printable(network, 80)}" failed: {printable(text)} (code {code})')
        self.network = network
        self.plugin = plugin
        self.verb = verb
        self.cni_code = code


@dataclass(frozen=True, slots=True)
class NetworkList:
    """A parsed .conflist, or a .conf wrapped as a list of one."""

    name: str
    version: str
    plugins: tuple[Mapping[str, Any], ...]
    disable_check: bool = False
    disable_gc: bool = False
    raw: bytes = b""
    source: str = ""

    def at_least(self, version: str) -> bool:
        """Whether the list speaks at least this version of the protocol."""
        return version_key(self.version) >= version_key(version)


@dataclass(frozen=True, slots=True)
class Attachment:
    """One interface of one pod in one network. capabilities: runtimeConfig members we can offer."""

    container_id: str
    netns: str
    interface: str
    args: Mapping[str, str] = field(default_factory=dict)
    capabilities: Mapping[str, Any] = field(default_factory=dict)


def version_key(text: str) -> tuple[int, ...]:
    """For comparing versions. Raises: InvalidArgument."""
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError as error:
        raise InvalidArgument(f'"{printable(text, 40)}" is not a CNI version') from error


def parse_network(data: bytes, source: str) -> NetworkList:
    """A network from the bytes of a .conflist, .conf or .json. Raises: InvalidArgument naming the file."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidArgument(f"not JSON: {error}", where=source) from error
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise InvalidArgument("a CNI configuration needs a name", where=source)
    plugins = value.get("plugins") if "plugins" in value else [value]
    if not isinstance(plugins, list) or not plugins or not all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in plugins):
        raise InvalidArgument("a CNI configuration needs plugins, each with a type", where=source)
    version = value.get("cniVersion") or "0.1.0"
    version_key(str(version))
    return NetworkList(
        name=value["name"],
        version=str(version),
        plugins=tuple(plugins),
        disable_check=_flag(value.get("disableCheck")),
        disable_gc=_flag(value.get("disableGC")),
        raw=data,
        source=source,
    )


def _flag(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")


def load_networks(conf_dir: str, limit: int) -> list[NetworkList]:
    """Networks of a directory in lexical order of file names, at most `limit` (0: all). Blocking.

    Raises: InvalidArgument (a broken file), NotFound (no configuration there).
    """
    networks = []
    for path in config_files(conf_dir):
        with path.open("rb") as stream:
            networks.append(parse_network(stream.read(MAX_CONFIG), str(path)))
        if limit and len(networks) == limit:
            break
    if not networks:
        raise NotFound("no CNI network configuration", where=conf_dir, hint="install a CNI network there")
    return networks


def config_files(conf_dir: str) -> list[Path]:
    """Files of a CNI configuration directory, in the order in which they count."""
    try:
        entries = sorted(os.listdir(conf_dir))
    except OSError:
        return []
    return [Path(conf_dir, e) for e in entries if e.endswith((".conflist", ".conf", ".json")) and os.path.isfile(os.path.join(conf_dir, e))]


class CNI:
    """Plugin calls for network lists. One per daemon."""

    def __init__(self, bin_dirs: Sequence[str], cache_dir: Path, *, timeout_s: float = PLUGIN_TIMEOUT_S) -> None:
        self._bin_dirs = tuple(bin_dirs)
        self._timeout_s = timeout_s
        self._results = private_dir(cache_dir / "results")

    def missing_plugins(self, network: NetworkList) -> list[str]:
        """Plugin types without a program in the binary directories."""
        return [str(p["type"]) for p in network.plugins if self._find(str(p["type"])) is None]

    async def add(self, network: NetworkList, attachment: Attachment) -> Mapping[str, Any]:
        """Attach; the result is that of the last plugin. The attachment is cached before the first call, so that a DEL
        after a crash knows the configuration that was used. Raises: CNIError, NotFound, DeadlineExceeded.
        """
        self._store(network, attachment, None)
        result: Mapping[str, Any] = {}
        for plugin in network.plugins:
            result = await self._call("ADD", network, plugin, attachment, result or None)
        self._store(network, attachment, result)
        return result

    async def check(self, network: NetworkList, attachment: Attachment) -> None:
        """Verify an attachment (protocol 0.4.0 on, unless disabled). Raises: CNIError."""
        if network.disable_check or not network.at_least("0.4.0"):
            return
        cached = self._load(self._cache_path(network.name, attachment))
        result = cached.get("result") if cached else None
        for plugin in network.plugins:
            await self._call("CHECK", network, plugin, attachment, result)

    async def delete(self, network: NetworkList, attachment: Attachment) -> None:
        """Detach, in reverse order, with the cached result. Attached to nothing is fine. Raises: CNIError."""
        path = self._cache_path(network.name, attachment)
        cached = self._load(path)
        result = cached.get("result") if cached and network.at_least("0.4.0") else None
        for plugin in reversed(network.plugins):
            await self._call("DEL", network, plugin, attachment, result)
        path.unlink(missing_ok=True)

    async def status(self, network: NetworkList) -> None:
        """Ask the plugins whether they could ADD now (protocol 1.1.0 on). Raises: CNIError, NotFound."""
        if missing := self.missing_plugins(network):
            raise NotFound(f'CNI plugin {", ".join(missing)} of network "{network.name}" is not in {":".join(self._bin_dirs)}')
        if network.at_least("1.1.0"):
            for plugin in network.plugins:
                await self._call("STATUS", network, plugin, None, None)

    async def gc(self, network: NetworkList, valid: Sequence[tuple[str, str]]) -> None:
        """Tell the plugins which attachments (container ID, interface) are still wanted (protocol 1.1.0 on)."""
        if network.disable_gc or not network.at_least("1.1.0"):
            return
        listed = [{"containerID": c, "ifname": i} for c, i in valid]
        for plugin in network.plugins:
            await self._call("GC", network, {**plugin, "cni.dev/valid-attachments": listed, "cni.dev/attachments": listed}, None, None)

    def cached(self, container_id: str) -> list[tuple[NetworkList, Attachment]]:
        """What is or may be attached for a pod, from the cache."""
        found = []
        for path in sorted(self._results.iterdir()):
            if f"-{container_id}-" in path.name and (entry := self._load(path)):
                network = parse_network(base64.b64decode(entry["config"]), str(path))
                args = dict(entry.get("cniArgs") or [])
                found.append(
                    (network, Attachment(container_id, entry.get("netns", ""), entry["ifName"], args, entry.get("capabilityArgs") or {}))
                )
        return found

    def cached_owners(self) -> set[str]:
        """IDs of all pods in the cache."""
        return {entry["containerId"] for path in self._results.iterdir() if (entry := self._load(path))}

    def _cache_path(self, network: str, attachment: Attachment) -> Path:
        return self._results / f"{network.replace('/', '_')}-{attachment.container_id}-{attachment.interface}"

    def _store(self, network: NetworkList, attachment: Attachment, result: Mapping[str, Any] | None) -> None:
        entry = {
            "kind": _CACHE_KIND,
            "containerId": attachment.container_id,
            "config": base64.b64encode(network.raw).decode("ascii"),
            "ifName": attachment.interface,
            "networkName": network.name,
            "netns": attachment.netns,
            "cniArgs": [[k, v] for k, v in attachment.args.items()],
            "capabilityArgs": attachment.capabilities,
            "result": result,
        }
        write_atomic(self._cache_path(network.name, attachment), json.dumps(entry).encode(), sync=False)

    def _load(self, path: Path) -> dict[str, Any] | None:
        try:
            entry = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return entry if isinstance(entry, dict) and entry.get("kind") == _CACHE_KIND else None

    def _find(self, kind: str) -> str | None:
        if not kind or "/" in kind:
            return None
        for directory in self._bin_dirs:
            path = os.path.join(directory, kind)
            if os.access(path, os.X_OK):
                return path
        return None

    async def _call(
        self, verb: str, network: NetworkList, plugin: Mapping[str, Any], attachment: Attachment | None, previous: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        kind = str(plugin["type"])
        program = self._find(kind)
        if program is None:
            raise NotFound(
                f"no CNI plugin {printable(kind, 80)} in {':'.join(self._bin_dirs)}", hint="install it, or correct [cni] bin_dirs"
            )
        request = plugin_request(network, plugin, attachment, previous)
        done = await self._run(program, json.dumps(request).encode(), call_environment(verb, attachment, self._bin_dirs))
        if done.status:
            code, text = parse_error(done)
            raise CNIError(network.name, kind, verb, code, text)
        if verb != "ADD":
            return {}
        try:
            result = json.loads(done.stdout)
        except ValueError as error:
            raise DataLoss(f"CNI plugin {kind} answered with something that is not JSON") from error
        return result if isinstance(result, dict) else {}

    async def _run(self, program: str, request: bytes, environment: Mapping[str, str]) -> Finished:
        for _ in range(_TEXT_BUSY_TRIES - 1):
            try:
                return await run([program], stdin=request, env=environment, timeout_s=self._timeout_s)
            except OSError:
                await asyncio.sleep(1.0)
        return await run([program], stdin=request, env=environment, timeout_s=self._timeout_s)


def plugin_request(
    network: NetworkList, plugin: Mapping[str, Any], attachment: Attachment | None, previous: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a plugin reads: its own configuration, derived members added, `capabilities` replaced by runtimeConfig."""
    wanted = plugin.get("capabilities") or {}
    request = {k: v for k, v in plugin.items() if k not in ("capabilities", "disableCheck", "disableGC", "plugins")}
    request["name"] = network.name
    request["cniVersion"] = network.version
    offered = attachment.capabilities if attachment else {}
    runtime_config = {k: v for k, v in offered.items() if wanted.get(k) is True and v}
    if runtime_config:
        request["runtimeConfig"] = runtime_config
    if previous is not None:
        request["prevResult"] = previous
    return request


def call_environment(verb: str, attachment: Attachment | None, bin_dirs: Sequence[str]) -> dict[str, str]:
    """CNI_* variables. Nothing of the daemon's environment but PATH reaches a plugin."""
    environment = {"PATH": os.environ.get("PATH", SAFE_PATH), "CNI_COMMAND": verb, "CNI_PATH": ":".join(bin_dirs)}
    if attachment:
        environment |= {
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": attachment.interface,
            "CNI_ARGS": ";".join(f"{k}={v}" for k, v in attachment.args.items()),
        }
    return environment


def parse_error(done: Finished) -> tuple[int, str]:
    """Code and text of a failed call; a plugin that died without an error object gets code 999."""
    try:
        error = json.loads(done.stdout)
        return int(error.get("code", 999)), ": ".join(str(error[k]) for k in ("msg", "details") if error.get(k)) or done.complaint
    except (ValueError, AttributeError, TypeError):
        return 999, done.complaint


def pod_addresses(result: Mapping[str, Any], preference: str = "") -> list[str]:
    """Addresses of the pod in a result of any version, the primary one first.

    Args: preference: "" or "cni" keeps the plugin's order; "ipv4" and "ipv6" put that family first.
    """
    interfaces = result.get("interfaces") or []
    found: list[str] = []
    for entry in result.get("ips") or []:
        index = entry.get("interface")
        inside = index is None or not (0 <= index < len(interfaces)) or bool(interfaces[index].get("sandbox"))
        if inside:
            found.append(str(entry.get("address", "")).split("/")[0])
    older = [result[name] for name in ("ip4", "ip6") if isinstance(result.get(name), dict)]  # results before 0.3.0
    found += [str(entry.get("ip", "")).split("/")[0] for entry in older]
    if preference in ("ipv4", "ipv6"):
        found.sort(key=lambda ip: (":" in ip) == (preference == "ipv4"))
    return [ip for ip in found if ip]
