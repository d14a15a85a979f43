"""Container Device Interface: what a vendor's files say a device needs, applied to an OCI specification.

Devices are named in the CRI request only; annotations and image labels never name one (CVE-2026-53492). Specification
files are JSON (.json) or YAML (.yaml). Later directories win over earlier ones.

Source: cncf-tags/container-device-interface SPEC.md 1.1.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from imgsvc.base import yamlfile
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, NotFound, printable
from imgsvc.runtime.spec.volumes import clean

_QUALIFIED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*=[A-Za-z0-9][A-Za-z0-9_.:-]*", re.ASCII)
_HOOKS: Final = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_MAX_FILE: Final = 4 * 1024 * 1024
_RDT: Final = ("closID", "l3CacheSchema", "memBwSchema", "schemata", "enableMonitoring")
_MAX_CLASS: Final = 4096  # [characters]

Edits = Mapping[str, Any]


def edits_for(names: Sequence[str], directories: Sequence[str]) -> list[Edits]:
    """The containerEdits of some devices: those of each device's file, once, and its own. Blocking.

    Raises: InvalidArgument (a malformed name or file), NotFound (no such device).
    """
    if not names:
        return []
    for name in names:
        if not _QUALIFIED.fullmatch(name):
            raise InvalidArgument(f'"{printable(name, 120)}" is not a CDI device', hint="use vendor/class=name")
    files = list(_files(directories))
    found: list[Edits] = []
    common: list[str] = []
    for name in names:
        kind, _, device = name.partition("=")
        path, specification, entry = _find(files, kind, device, name)
        if path not in common:
            common.append(path)
            found.append(specification.get("containerEdits") or {})
        found.append(entry.get("containerEdits") or {})
    return found


def _find(files: Sequence[tuple[str, Edits]], kind: str, device: str, name: str) -> tuple[str, Edits, Edits]:
    for path, specification in reversed(files):
        if specification.get("kind") == kind:
            for entry in specification.get("devices") or []:
                if isinstance(entry, dict) and entry.get("name") == device:
                    return path, specification, entry
    raise NotFound(f"no CDI device {printable(name, 120)}", hint="install its specification as a .json or .yaml file in a CDI directory")


def _files(directories: Sequence[str]) -> Iterator[tuple[str, Edits]]:
    for directory in directories:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            path = os.path.join(directory, name)
            if name.endswith((".json", ".yaml")):
                yield path, _load(path)


def _load(path: str) -> Edits:
    try:
        with Path(path).open("rb") as stream:
            text = stream.read(_MAX_FILE)
        value = yamlfile.loads(text, path) if path.endswith(".yaml") else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"not a CDI specification: {printable(str(error))}", where=path) from error
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise InvalidArgument("not a CDI specification: it has no kind", where=path)
    return value


def apply(spec: dict[str, Any], edits: Sequence[Edits]) -> None:
    """Change an OCI specification as the edits say. Raises: InvalidArgument, FailedPrecondition (a device node is missing)."""
    process, linux = spec["process"], spec["linux"]
    for edit in edits:
        process["env"] = _merged(process["env"], edit.get("env") or [])
        for device in edit.get("deviceNodes") or []:
            node, rule = _device(device)
            linux["devices"] = [d for d in linux["devices"] if d["path"] != node["path"]] + [node]
            linux["resources"].setdefault("devices", []).append(rule)
        for device in edit.get("netDevices") or []:
            _add_network_device(linux, device)
        if rdt := edit.get("intelRdt"):
            linux["intelRdt"] = _rdt(rdt)
        for mount in edit.get("mounts") or []:
            options = mount.get("options") or ["ro", "nosuid", "nodev", "bind"]
            entry = {
                "destination": mount["containerPath"],
                "type": mount.get("type") or "bind",
                "source": mount["hostPath"],
                "options": options,
            }
            spec["mounts"] = [m for m in spec["mounts"] if clean(m["destination"]) != clean(entry["destination"])] + [entry]
        for hook in edit.get("hooks") or []:
            _add_hook(spec, hook)
        gids = process["user"].get("additionalGids") or []
        process["user"]["additionalGids"] = sorted({*gids, *(g for g in edit.get("additionalGids") or [] if g > 0)})


def _merged(old: Sequence[str], new: Sequence[str]) -> list[str]:
    names = {text.partition("=")[0] for text in new}
    return [text for text in old if text.partition("=")[0] not in names] + list(new)


def _add_hook(spec: dict[str, Any], hook: Mapping[str, Any]) -> None:
    name = hook.get("hookName")
    if name not in _HOOKS:
        raise InvalidArgument(f'"{printable(str(name), 60)}" is not a hook')
    entry = {k: hook[k] for k in ("path", "args", "env", "timeout") if hook.get(k)}
    spec.setdefault("hooks", {}).setdefault(name, []).append(entry)


def _add_network_device(linux: dict[str, Any], device: Mapping[str, Any]) -> None:
    """An interface of the node that the runtime moves into the container's network namespace under a name (CDI 1.1)."""
    source, name = device.get("hostInterfaceName"), device.get("name")
    if not isinstance(source, str) or not isinstance(name, str) or not source or not name:
        raise InvalidArgument("a CDI network device needs hostInterfaceName and name")
    devices = linux.setdefault("netDevices", {})
    if source in devices or any(known["name"] == name for known in devices.values()):
        raise InvalidArgument(f"two CDI devices bring network interface {printable(source, 60)} or the name {printable(name, 60)}")
    devices[source] = {"name": name}


def _rdt(value: Mapping[str, Any]) -> dict[str, Any]:
    """A linux.intelRdt object."""
    found = {key: value[key] for key in _RDT if value.get(key)}
    rdt_class(str(found.get("closID", "")))
    return found


def rdt_class(name: str) -> str:
    """The name itself, if it can be an RDT class: a directory of resctrl, "/" its root. Raises: InvalidArgument."""
    if name != "/" and (name in (".", "..") or "/" in name or "\n" in name or len(name) >= _MAX_CLASS):
        raise InvalidArgument(f'"{printable(name, 60)}" is not an RDT class')
    return name


def _device(device: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A linux.devices entry and its cgroup rule; what the file leaves out is looked up on the host."""
    source = device.get("hostPath") or device["path"]
    found: dict[str, Any] = {"type": device.get("type"), "major": device.get("major"), "minor": device.get("minor")}
    if not found["type"] or found["major"] is None:
        try:
            status = os.stat(source)
        except OSError as error:
            raise FailedPrecondition(f"a CDI device node is missing: {error.strerror}", where=source) from error
        kind = "b" if stat.S_ISBLK(status.st_mode) else "c"
        found = {"type": kind, "major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
    node = {"path": device["path"], **found} | {k: device[k] for k in ("fileMode", "uid", "gid") if device.get(k) is not None}
    rule = {"allow": True, **found, "access": device.get("permissions") or "rwm"}
    return node, rule
