"""Records of sandboxes and containers: versioned JSON in the metadata database, with a copy in memory to read from.

A record says what is or was there; it never says a state. Writers replace the whole record.

Steps forward of what dies with the node anyway, a pod that is ready, a container that was made or started, are noted in its
directory in STATE, too: that is there at once, without waiting for a disk, and what the database lacks after the
daemon's sudden end is taken from there. After a power cut there is nothing that such a step could still be true of.
"""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from imgsvc.base.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, printable
from imgsvc.base.fsutil import write_atomic
from imgsvc.base.metadb.database import MetaDB, WriteTxn
from imgsvc.runtime.codec import from_json, to_json
from imgsvc.runtime.model import ContainerConfig, LinuxContainerResources, PodSandboxConfig, User

log = logging.getLogger(__name__)

VERSION: Final = 2  # 1: sandboxes with sandboxer, pause_pid, pause_start
SANDBOXES: Final = "sandboxes"
CONTAINERS: Final = "containers"
_NOTE: Final = "record.json"

R = TypeVar("R", "SandboxRecord", "ContainerRecord")


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """A pod. Times in ns since the epoch, 0 = not yet. handler: the resolved name of its runtime handler.

    Attributes:
        started_at: when everything was made; 0 means half-made, to be rolled back.
        stopped_at: when its network, namespaces and processes were taken away.
        network: CNI networks were asked for it, so a DEL is owed.
        owned_cgroup: the pod's cgroup when we made it and so remove it; "" when it is the kubelet's.
        selinux: label of its processes, "" where SELinux is off; its level is the pod's alone.
        runtime: what its handler ran as when the pod was made (HandlerSettings.describe), so that its pods can be stopped and removed when
            the handler has left the configuration, or means another program now. "" in records of earlier versions.
        holder: the driver that holds the pod, see holder/choice.py.
        holder_pid, holder_start: the process that holds the pod, or the one its shim named, and its start time [clock ticks];
            0 for none.
    """

    id: str
    config: PodSandboxConfig = field(default_factory=PodSandboxConfig)
    handler: str = ""
    runtime_handler: str = ""
    boot_id: str = ""
    created_at: int = 0
    started_at: int = 0
    stopped_at: int = 0
    network: bool = False
    owned_cgroup: str = ""
    ips: tuple[str, ...] = ()
    selinux: str = ""
    runtime: str = ""
    holder: str = ""
    holder_pid: int = 0
    holder_start: int = 0


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """A container. Times in ns since the epoch, 0 = not yet.

    Attributes:
        made_at: when its create was complete; 0 means half-made, to be rolled back.
        pid, pid_start: init process on the host and its start time [clock ticks], so that a reused pid is noticed.
        log_path: absolute, "" when nothing is logged.
        cgroup: path below the cgroup root, as given to the OCI runtime.
        resources: as updated last, for ContainerStatus.
        start_error: why its command cannot be started, known since its create: there is no process then. "" for all others.
    """

    id: str
    sandbox_id: str = ""
    config: ContainerConfig = field(default_factory=ContainerConfig)
    handler: str = ""
    image_id: str = ""
    image_ref: str = ""
    image_name: str = ""
    boot_id: str = ""
    created_at: int = 0
    made_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    pid: int = 0
    pid_start: int = 0
    log_path: str = ""
    cgroup: str = ""
    stop_signal: str = "SIGTERM"
    user: User | None = None
    resources: LinuxContainerResources | None = None
    start_error: str = ""


def sandbox_name(config: PodSandboxConfig) -> str:
    """What must be unique among pods: name, namespace, uid and attempt."""
    m = config.metadata
    return f"{m.name}_{m.namespace}_{m.uid}_{m.attempt}"


def container_name(sandbox_id: str, config: ContainerConfig) -> str:
    """What must be unique among containers: name and attempt within a pod."""
    return f"{config.metadata.name}_{sandbox_id}_{config.metadata.attempt}"


class Records:
    """All records. Reads come from memory; writes return when they are durable. Belongs to the event loop."""

    def __init__(self, database: MetaDB) -> None:
        self._db = database
        self.sandboxes: dict[str, SandboxRecord] = {}
        self.containers: dict[str, ContainerRecord] = {}
        self._of_sandbox: dict[str, set[str]] = {}
        self._names: dict[str, str] = {}

    def load(self) -> None:
        """Read everything. A record of a newer version is refused, a broken one is logged and left alone."""
        with self._db.read() as txn:
            for key, raw in txn.items(SANDBOXES):
                if (sandbox := _decode(SandboxRecord, key, raw)) is not None:
                    self._keep_sandbox(sandbox)
            for key, raw in txn.items(CONTAINERS):
                if (container := _decode(ContainerRecord, key, raw)) is not None:
                    self._keep_container(container)

    def _keep_sandbox(self, record: SandboxRecord) -> None:
        self.sandboxes[record.id] = record
        self._names[sandbox_name(record.config)] = record.id

    def _keep_container(self, record: ContainerRecord) -> None:
        self.containers[record.id] = record
        self._of_sandbox.setdefault(record.sandbox_id, set()).add(record.id)
        self._names[container_name(record.sandbox_id, record.config)] = record.id

    def reserve(self, name: str, owner: str) -> None:
        """Take a name for a record that is about to exist. Raises: AlreadyExists naming the holder."""
        holder = self._names.setdefault(name, owner)
        if holder != owner:
            raise AlreadyExists(
                f'the name "{printable(name, 200)}" is taken by {holder}', hint="remove that one, or raise the attempt number"
            )

    def release(self, name: str, owner: str) -> None:
        """Give a name back. Idempotent."""
        if self._names.get(name) == owner:
            del self._names[name]

    def sandbox(self, sandbox_id: str) -> SandboxRecord:
        """One sandbox by its ID or a unique beginning of it. Raises: NotFound, InvalidArgument (the beginning of several)."""
        return _resolve(self.sandboxes, sandbox_id, "pod sandbox")

    def container(self, container_id: str) -> ContainerRecord:
        """One container by its ID or a unique beginning of it. Raises: NotFound, InvalidArgument (the beginning of several)."""
        return _resolve(self.containers, container_id, "container")

    def containers_of(self, sandbox_id: str) -> list[ContainerRecord]:
        """Containers of a pod, oldest first."""
        return sorted((self.containers[c] for c in self._of_sandbox.get(sandbox_id, ())), key=lambda c: (c.created_at, c.id))

    def put_sandbox(self, record: SandboxRecord) -> Future[None]:
        """Replace a record in memory at once; the future ends when it is durable."""
        self._keep_sandbox(record)
        return self._put(SANDBOXES, record.id, to_json(record))

    def put_container(self, record: ContainerRecord) -> Future[None]:
        """Replace a record in memory at once; the future ends when it is durable."""
        self._keep_container(record)
        return self._put(CONTAINERS, record.id, to_json(record))

    def advance_sandbox(self, record: SandboxRecord, directory: Path) -> None:
        """As put_sandbox, for a step of a pod whose directory in STATE this is. Survives the end of the process on return."""
        value = to_json(record)
        _note(directory, value)
        self._keep_sandbox(record)
        self._put(SANDBOXES, record.id, value).add_done_callback(_report)

    def advance_container(self, record: ContainerRecord, bundle: Path) -> None:
        """As put_container, for a step of a container in this bundle. Survives the end of the process on return."""
        value = to_json(record)
        _note(bundle, value)
        self._keep_container(record)
        self._put(CONTAINERS, record.id, value).add_done_callback(_report)

    def catch_up(self, sandboxes: Path, bundles: Path) -> None:
        """Take steps that were noted and did not reach the database from directories below these two. Blocking; after load()."""
        for pod in list(self.sandboxes.values()):
            noted = _noted(SandboxRecord, sandboxes / pod.id)
            if noted and noted.boot_id == pod.boot_id and noted.started_at and not pod.started_at:
                self.put_sandbox(noted)
        for container in list(self.containers.values()):
            step = _noted(ContainerRecord, bundles / container.id)
            if step and step.boot_id == container.boot_id and _further(step, container):
                self.put_container(step)

    def _put(self, table: str, key: str, value: dict[str, Any]) -> Future[None]:
        def change(txn: WriteTxn) -> None:
            txn.put(table, key, {"version": VERSION, **value})

        return self._db.submit(change)

    async def drop_sandbox(self, record: SandboxRecord) -> None:
        """Forget a sandbox, on disk first."""
        await self._drop(SANDBOXES, record.id)
        self.sandboxes.pop(record.id, None)
        self.release(sandbox_name(record.config), record.id)

    async def drop_container(self, record: ContainerRecord) -> None:
        """Forget a container, on disk first."""
        await self._drop(CONTAINERS, record.id)
        self.containers.pop(record.id, None)
        siblings = self._of_sandbox.get(record.sandbox_id, set())
        siblings.discard(record.id)
        if not siblings:
            self._of_sandbox.pop(record.sandbox_id, None)
        self.release(container_name(record.sandbox_id, record.config), record.id)

    async def _drop(self, table: str, key: str) -> None:
        await self._db.awrite(lambda txn: txn.delete(table, key))


async def durable(write: Future[None]) -> None:
    """Wait for a submitted write from the event loop."""
    await asyncio.wrap_future(write)


def _resolve(records: dict[str, R], key: str, what: str) -> R:
    if key in records:
        return records[key]
    found = [name for name in records if name.startswith(key)] if key else []
    if not found:
        raise NotFound(f'no {what} "{printable(key, 80)}"')
    if len(found) > 1:
        raise InvalidArgument(f'{what} ID "{printable(key, 80)}" is ambiguous', hint="give more digits")
    return records[found[0]]


def _further(step: ContainerRecord, known: ContainerRecord) -> bool:
    return not known.finished_at and (step.made_at > known.made_at or step.started_at > known.started_at)


def _note(directory: Path, value: dict[str, Any]) -> None:
    write_atomic(directory / _NOTE, json.dumps({"version": VERSION, **value}).encode(), sync=False)


def _noted(cls: type[R], directory: Path) -> R | None:
    try:
        raw = json.loads((directory / _NOTE).read_bytes())
    except (OSError, ValueError):
        return None
    return _decode(cls, directory.name, raw)


def _report(write: Future[None]) -> None:
    if not write.cancelled() and (error := write.exception()):
        log.error("a record could not be stored: %s", error)


def _decode(cls: type[R], key: str, raw: dict[str, Any]) -> R | None:
    if raw.get("version", 0) > VERSION:
        raise FailedPrecondition(f"{cls.__name__} {key} has version {raw['version']}, this imgsvc knows {VERSION}")
    try:
        return from_json(cls, _upgraded(cls, raw))
    except (KeyError, TypeError, ValueError) as error:
        log.error("record %s of %s cannot be read and is left alone: %s", key, cls.__name__, error)
        return None


def _upgraded(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    """A record of any version as this one writes it."""
    if cls is not SandboxRecord or raw.get("version", 0) > 1:
        return raw
    pid = raw.get("pause_pid", 0)
    # Of a half-made pod version 1 did not say whether it was to have a pause process: one is looked for.
    holder = "shim" if raw.get("sandboxer") else "pause" if pid or not raw.get("started_at") else "namespaces"
    return {**raw, "holder": holder, "holder_pid": pid, "holder_start": raw.get("pause_start", 0)}
