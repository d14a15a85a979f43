"""What several plugins want of one container, put together, with a note of who set what. Pure.

A value is set by one plugin; a second one that sets it, too, is an error that names both. Lists and maps are judged key by key. A
plugin takes over what another has set by removing it first: with "-" before the key, or, for arguments, an empty first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from imgsvc.api import nri_pb2 as nri
from imgsvc.base.errors import FailedPrecondition, InvalidArgument, printable

REMOVAL: Final = "-"


class Kind(Enum):
    """How values of two plugins are put together."""

    SINGLE = "one value, of one plugin"
    MAP = "a map, key by key"
    LIST = "a list of messages, by the field that is their key"
    ADDED = "a list that every plugin may add to"
    RESET = "a switch that takes back what was set before it"


@dataclass(frozen=True, slots=True)
class Rule:
    """kind; owner: the number under which its owner is told, 0 for none; key: of a list's messages; removable: "-" works."""

    kind: Kind
    owner: int = 0
    key: str = ""
    removable: bool = True


_MEMORY: Final = {
    "limit": nri.FIELD_MEM_LIMIT,
    "reservation": nri.FIELD_MEM_RESERVATION,
    "swap": nri.FIELD_MEM_SWAP_LIMIT,
    "kernel": nri.FIELD_MEM_KERNEL_LIMIT,
    "kernel_tcp": nri.FIELD_MEM_TCP_LIMIT,
    "swappiness": nri.FIELD_MEM_SWAPPINESS,
    "disable_oom_killer": nri.FIELD_MEM_DISABLE_OOM_KILLER,
    "use_hierarchy": nri.FIELD_MEM_USE_HIERARCHY,
}
_CPU: Final = {
    "shares": nri.FIELD_CPU_SHARES,
    "quota": nri.FIELD_CPU_QUOTA,
    "period": nri.FIELD_CPU_PERIOD,
    "realtime_runtime": nri.FIELD_CPU_REALTIME_RUNTIME,
    "realtime_period": nri.FIELD_CPU_REALTIME_PERIOD,
    "cpus": nri.FIELD_CPUSET_CPUS,
    "mems": nri.FIELD_CPUSET_MEMS,
}
_HOOKS: Final = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")

# By path in LinuxResources.
RESOURCES: Final[Mapping[str, Rule]] = {
    **{f"memory.{name}": Rule(Kind.SINGLE, owner) for name, owner in _MEMORY.items()},
    **{f"cpu.{name}": Rule(Kind.SINGLE, owner) for name, owner in _CPU.items()},
    "hugepage_limits": Rule(Kind.LIST, nri.FIELD_HUGEPAGE_LIMITS, "page_size", removable=False),
    "blockio_class": Rule(Kind.SINGLE, nri.FIELD_BLOCKIO_CLASS),
    "rdt_class": Rule(Kind.SINGLE, nri.FIELD_RDT_CLASS),
    "unified": Rule(Kind.MAP, nri.FIELD_CGROUPS_UNIFIED, removable=False),
    "devices": Rule(Kind.ADDED),
    "pids": Rule(Kind.SINGLE, nri.FIELD_PIDS_LIMIT),
}
# By path in ContainerAdjustment.
ADJUSTMENT: Final[Mapping[str, Rule]] = {
    "annotations": Rule(Kind.MAP, nri.FIELD_ANNOTATIONS),
    "mounts": Rule(Kind.LIST, nri.FIELD_MOUNTS, "destination"),
    "env": Rule(Kind.LIST, nri.FIELD_ENV, "key"),
    **{f"hooks.{name}": Rule(Kind.ADDED, nri.FIELD_OCI_HOOKS) for name in _HOOKS},
    "rlimits": Rule(Kind.LIST, nri.FIELD_RLIMITS, "type", removable=False),
    "cdi_devices": Rule(Kind.LIST, nri.FIELD_CDI_DEVICES, "name", removable=False),
    "args": Rule(Kind.SINGLE, nri.FIELD_ARGS),
    "linux.devices": Rule(Kind.LIST, nri.FIELD_DEVICES, "path"),
    **{f"linux.resources.{path}": rule for path, rule in RESOURCES.items()},
    "linux.cgroups_path": Rule(Kind.SINGLE, nri.FIELD_CGROUPS_PATH),
    "linux.oom_score_adj": Rule(Kind.SINGLE, nri.FIELD_OOM_SCORE_ADJ),
    "linux.io_priority": Rule(Kind.SINGLE, nri.FIELD_IO_PRIORITY),
    "linux.seccomp_policy": Rule(Kind.SINGLE, nri.FIELD_SECCOMP_POLICY),
    "linux.namespaces": Rule(Kind.LIST, nri.FIELD_NAMESPACE, "type"),
    "linux.sysctl": Rule(Kind.MAP, nri.FIELD_SYSCTL),
    "linux.net_devices": Rule(Kind.MAP, nri.FIELD_LINUX_NET_DEVICES),
    "linux.scheduler": Rule(Kind.SINGLE, nri.FIELD_LINUX_SCHED),
    "linux.rdt.remove": Rule(Kind.RESET),  # before what it takes back
    "linux.rdt.clos_id": Rule(Kind.SINGLE, nri.FIELD_RDT_CLOS_ID),
    "linux.rdt.schemata": Rule(Kind.SINGLE, nri.FIELD_RDT_SCHEMATA),
    "linux.rdt.enable_monitoring": Rule(Kind.SINGLE, nri.FIELD_RDT_ENABLE_MONITORING),
    "linux.memory_policy": Rule(Kind.SINGLE, nri.FIELD_MEMORY_POLICY),
}
_RDT: Final = (nri.FIELD_RDT_CLOS_ID, nri.FIELD_RDT_SCHEMATA, nri.FIELD_RDT_ENABLE_MONITORING)


@dataclass(slots=True)
class Merged:
    """What the plugins that were asked so far want. container_id: of the container that is being made, changed or stopped.

    Attributes:
        adjustment: of that container, while it is made.
        updates: by container; ignore_failure where all who want it say so.
        owners: who set what, by container.
    """

    container_id: str
    adjustment: nri.ContainerAdjustment = field(default_factory=nri.ContainerAdjustment)
    updates: dict[str, nri.ContainerUpdate] = field(default_factory=dict)
    evictions: list[nri.ContainerEviction] = field(default_factory=list)
    owners: nri.OwningPlugins = field(default_factory=nri.OwningPlugins)

    def adjust(self, wanted: nri.ContainerAdjustment, plugin: str) -> None:
        """Add what a plugin wants of the container that is being made. Raises: FailedPrecondition (another one set it)."""
        _merge(ADJUSTMENT, self.adjustment, wanted, _Claims(self.owners, self.container_id, plugin))

    def update(self, wanted: Iterable[nri.ContainerUpdate], plugin: str, *, made: bool = True) -> None:
        """Add what a plugin wants of containers. made: False while the container itself is being made, which adjustments are for.

        Raises: InvalidArgument, FailedPrecondition (another one set it).
        """
        for update in wanted:
            if not made and update.container_id == self.container_id:
                raise InvalidArgument(f"NRI plugin {plugin} updates container {self.container_id} while it is being made")
            try:
                self._update(update, plugin)
            except FailedPrecondition:
                if not update.ignore_failure:
                    raise

    def _update(self, wanted: nri.ContainerUpdate, plugin: str) -> None:
        """All of an update or nothing."""
        owners, known = nri.OwningPlugins(), self.updates.get(wanted.container_id)
        owners.CopyFrom(self.owners)
        changed = nri.ContainerUpdate(container_id=wanted.container_id, ignore_failure=wanted.ignore_failure)
        if known:
            changed.CopyFrom(known)
            changed.ignore_failure = known.ignore_failure and wanted.ignore_failure
        _merge(RESOURCES, changed.linux.resources, wanted.linux.resources, _Claims(owners, wanted.container_id, plugin))
        self.owners, self.updates[wanted.container_id] = owners, changed


@dataclass(frozen=True, slots=True)
class _Claims:
    """One plugin's claims on one container."""

    owners: nri.OwningPlugins
    container_id: str
    plugin: str

    def take(self, number: int, key: str | None = None) -> None:
        """Raises: FailedPrecondition when another plugin has it."""
        owners = self.owners.owners[self.container_id]
        table: MutableMapping[Any, str] = owners.simple if key is None else owners.compound[number].owners
        slot = number if key is None else key
        if slot in table:
            what = nri.Field.DESCRIPTOR.values_by_number[number].name.removeprefix("FIELD_").replace("_", " ").lower()
            named = f' "{printable(key, 120)}"' if key else ""
            raise FailedPrecondition(f"NRI plugins {table[slot]} and {self.plugin} both set {what}{named} of container {self.container_id}")
        table[slot] = self.plugin

    def share(self, number: int) -> None:
        """Be one of its owners."""
        table = self.owners.owners[self.container_id].simple
        names = table[number].split(",") if number in table else []
        table[number] = ",".join([*names, *([] if self.plugin in names else [self.plugin])])

    def give_up(self, number: int, key: str | None = None) -> None:
        """Free the setting for the next plugin."""
        owners = self.owners.owners[self.container_id]
        if key is None:
            owners.simple.pop(number, "")
        else:
            owners.compound[number].owners.pop(key, "")


def _merge(rules: Mapping[str, Rule], target: Any, wanted: Any, claims: _Claims) -> None:
    for path, rule in rules.items():
        *above, name = path.split(".")
        source = wanted
        for step in above:
            source = getattr(source, step) if source is not None and source.HasField(step) else None
        if source is None or not is_set(source, name):
            continue
        place = target
        for step in above:
            place = getattr(place, step)
            place.SetInParent()
        _MERGES[rule.kind](rule, place, source, name, claims)


def is_set(message: Any, name: str) -> bool:
    """Whether a field of a message says something: a message that is there, or a value that is not the type's zero."""
    described = message.DESCRIPTOR.fields_by_name[name]
    return bool(message.HasField(name) if described.has_presence else getattr(message, name))


def _single(rule: Rule, target: Any, source: Any, name: str, claims: _Claims) -> None:
    value = getattr(source, name)
    if name == "args":
        if not value[0]:
            claims.give_up(rule.owner)
            value = value[1:]
        claims.take(rule.owner)
        del target.args[:]
        target.args.extend(value)
        return
    claims.take(rule.owner)
    if source.DESCRIPTOR.fields_by_name[name].has_presence:
        getattr(target, name).CopyFrom(value)
    else:
        setattr(target, name, value)


def _map(rule: Rule, target: Any, source: Any, name: str, claims: _Claims) -> None:
    known, values = getattr(target, name), getattr(source, name)
    for key in sorted(values, key=lambda text: not text.startswith(REMOVAL)):  # removals first
        if rule.removable and key.startswith(REMOVAL):
            claims.give_up(rule.owner, key[1:])
            known.pop(key[1:], None)
        else:
            claims.take(rule.owner, key)
        if isinstance(values[key], str):
            known[key] = values[key]
        else:
            known[key].CopyFrom(values[key])


def _list(rule: Rule, target: Any, source: Any, name: str, claims: _Claims) -> None:
    known, values = getattr(target, name), getattr(source, name)
    removals = [value for value in values if rule.removable and getattr(value, rule.key).startswith(REMOVAL)]
    gone = {getattr(value, rule.key) for value in removals} | {getattr(value, rule.key)[1:] for value in removals}
    for key in gone:
        claims.give_up(rule.owner, key)
    kept = [value for value in known if getattr(value, rule.key) not in gone]
    added = [value for value in values if value not in removals]
    for value in added:
        claims.take(rule.owner, getattr(value, rule.key))
    copies = [type(value).FromString(value.SerializeToString()) for value in [*kept, *removals, *added]]
    del known[:]
    known.extend(copies)


def _added(rule: Rule, target: Any, source: Any, name: str, claims: _Claims) -> None:
    if rule.owner:
        claims.share(rule.owner)
    getattr(target, name).extend(getattr(source, name))


def _reset(rule: Rule, target: Any, source: Any, name: str, claims: _Claims) -> None:
    for number in _RDT:
        claims.give_up(number)
    target.Clear()
    target.remove = True


_MERGES: Final = {Kind.SINGLE: _single, Kind.MAP: _map, Kind.LIST: _list, Kind.ADDED: _added, Kind.RESET: _reset}


def overlay(base: nri.LinuxResources, over: nri.LinuxResources) -> nri.LinuxResources:
    """`base` with what `over` says instead. A new memory limit takes the limit with swap along, unless that is given, too."""
    merged = nri.LinuxResources()
    merged.CopyFrom(base)
    merged.MergeFrom(over)
    if over.memory.HasField("limit") and base.memory.HasField("swap") and not over.memory.HasField("swap"):
        merged.memory.swap.value = over.memory.limit.value
    pages = {limit.page_size: limit.limit for limit in merged.hugepage_limits}
    del merged.hugepage_limits[:]
    merged.hugepage_limits.extend(nri.HugepageLimit(page_size=size, limit=limit) for size, limit in pages.items())
    return merged
