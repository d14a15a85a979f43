"""Contracts of the runtime service: what it needs from the image side, from runtime handlers and from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.oci import Digest, ImageConfig
from imgsvc.runtime.model import PodSandboxConfig
from imgsvc.runtime.model import UserNamespace as UserNamespace  # noqa: PLC0414  # shown again: part of the contract with the image side
from imgsvc.runtime.numbers.usage import Usage
from imgsvc.runtime.streaming.interfaces import CommandTarget


@dataclass(frozen=True, slots=True)
class RunnableImage:
    """An image a container can be made from. repo_tags and repo_digests as CRI lists them."""

    image_id: Digest
    config: ImageConfig
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RootMount:
    """One mount(2) that makes a root file system. options as in /etc/fstab. shifted: its owners are those of the pod's namespace."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    shifted: bool = False


class Images(Protocol):
    """What the runtime needs from the image side; built by the edge. All asynchronous, on the event loop."""

    async def runnable(self, reference: str) -> RunnableImage | None:
        """Look an image up by ID, short ID, tag or digest; None when it is not stored."""

    async def prepare_root(
        self, container_id: str, image_id: Digest, *, snapshotter: str, readonly: bool = False, user: UserNamespace | None = None
    ) -> Sequence[RootMount]:
        """A snapshot for this container on top of the image; the image's layers stay as long as it exists.

        user: of the pod; where owners cannot be mapped while mounting, what is not read-only becomes a copy with its owners.

        Idempotent per container_id. Raises: NotFound, PermissionDenied (an encrypted image without its keys).
        """

    async def remove_root(self, container_id: str) -> None:
        """Drop the container's snapshot. Absent is a success."""

    async def root_usage(self, container_id: str) -> tuple[int, int]:
        """Writable layer: (bytes, inodes)."""

    def describe(self) -> Mapping[str, Any]:
        """For Status(verbose)."""


@dataclass(frozen=True, slots=True)
class HandlerFeatures:
    """What a runtime handler can do on this node; shown by Status.

    needs_pause: its pods need a sandbox container even without a shared PID namespace.
    own_figures: what a container uses is not what its cgroup says: its processes are in a kernel of their own.
    """

    recursive_read_only_mounts: bool = False
    user_namespaces: bool = False
    needs_pause: bool = False
    own_figures: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NewTask:
    """A container that is about to be created. `bundle` holds config.json and the mounted rootfs/.

    log_path: absolute, "" for no log; below log_directory, and no symlink from there on is followed. stdin: keep a pipe open for attached clients; stdin_once: until the first leaves.
    """

    container_id: str
    sandbox_id: str
    bundle: Path
    terminal: bool = False
    stdin: bool = False
    stdin_once: bool = False
    log_directory: str = ""
    log_path: str = ""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended. finished_at: ns since the epoch. known: False when the code is unknown (then 255)."""

    code: int
    finished_at: int
    oom_killed: bool = False
    known: bool = True


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command printed (bounded) and how it ended."""

    stdout: bytes
    stderr: bytes
    exit_code: int


@dataclass(frozen=True, slots=True)
class NewPod:
    """A pod that its handler makes itself. netns: its pinned network namespace, "" for the host's."""

    sandbox_id: str
    config: PodSandboxConfig
    netns: str
    annotations: Mapping[str, str]


class PodRuntime(Protocol):
    """What a handler can do whose pods are more than namespaces: a virtual machine each, say."""

    async def run_pod(self, pod: NewPod) -> int:
        """Make and start a pod; the pid it names on this node, 0 for none. On failure nothing stays.

        Raises: Unimplemented (it makes no pods), FailedPrecondition, Unavailable.
        """

    async def wait_pod(self, sandbox_id: str) -> None:
        """Until the pod has ended, or what serves it has died or does not answer; also for a pod of an earlier daemon."""

    async def end_pod(self, sandbox_id: str) -> None:
        """End a pod and what serves it. Gone already is a success."""

    async def pod_info(self, sandbox_id: str) -> Mapping[str, Any]:
        """For PodSandboxStatus(verbose)."""

    async def pod_usage(self, sandbox_id: str) -> Usage | None:
        """What the pod has used; None when it does not say."""


class OCIRuntime(Protocol):
    """One runtime handler. Container IDs are ours; the bundle directory is STATE/containers/ID."""

    @property
    def features(self) -> HandlerFeatures:
        """What it can do here; found by start()."""

    @property
    def pods(self) -> PodRuntime | None:
        """Its way to make pods itself; None when it has none."""

    @property
    def description(self) -> str:
        """What it runs as; see HandlerSettings.describe. Known after start()."""

    async def start(self, *, test: bool = True) -> None:
        """Find the programs, test them. Raises: NotFound, FailedPrecondition.

        test: False for one that makes no new pods: it need not work as a whole to end what it made.
        """

    async def close(self) -> None:
        """Let go; containers keep running."""

    async def create(self, task: NewTask) -> int:
        """Create the container's init process, stopped before its exec; its pid. On failure nothing stays.

        Raises: FailedPrecondition carrying the runtime's own complaint, NotFound (no such runtime).
        """

    async def start_pause(self, sandbox_id: str, bundle: Path) -> int:
        """Create and start the pause process of a pod from its own small bundle; its pid. delete() ends it."""

    async def start_task(self, container_id: str) -> None:
        """Let init exec. Raises: FailedPrecondition."""

    async def kill(self, container_id: str, signal: int, *, everyone: bool = False) -> None:
        """Send a signal to init, or to every process. Gone already is a success."""

    async def wait(self, container_id: str, pid: int, pid_start: int) -> Exit:
        """Until init has ended and its exit code is stored; also for a container of an earlier daemon."""

    async def delete(self, container_id: str) -> None:
        """Kill what still runs and remove the runtime's state, cgroup and monitor. Absent is a success."""

    async def usage(self, container_id: str) -> Usage | None:
        """What a container has used that has no cgroup on this node; None when it is unknown."""

    async def update(self, container_id: str, resources: Mapping[str, Any]) -> None:
        """Change limits: an OCI `linux.resources` object. Raises: FailedPrecondition."""

    async def checkpoint(self, container_id: str, images: Path, work: Path, timeout_s: float) -> None:
        """Dump a running container's processes into two existing directories, and let it go on; also after a failure.

        Raises: FailedPrecondition (no criu here, or it cannot), DeadlineExceeded.
        """

    async def reopen_log(self, container_id: str, log_path: str) -> None:
        """Close the log and open its path again, after a rotation; returns when the new file exists."""

    async def exec_sync(self, container_id: str, command: Sequence[str], timeout_s: float) -> ExecResult:
        """Run a command in the container. Raises: DeadlineExceeded (it was killed), FailedPrecondition."""

    def exec_target(self, container_id: str, command: Sequence[str], *, terminal: bool) -> CommandTarget:
        """A session for the streaming server: a command in the container."""

    def attach_target(self, container_id: str) -> CommandTarget:
        """A session for the streaming server: the container's first process. Raises: FailedPrecondition."""


class NetworkPlugin(Protocol):
    """The pod network."""

    async def setup(
        self,
        sandbox_id: str,
        netns: str,
        config: PodSandboxConfig,
        *,
        conf_dir: str = "",
        max_conf_num: int | None = None,
        cgroup_path: str = "",
    ) -> tuple[str, ...]:
        """Attach a pod; its addresses, the primary one first. After a failure teardown() is owed."""

    async def teardown(self, sandbox_id: str, netns: str) -> None:
        """Detach a pod. netns may be "" when it is gone. Idempotent; may be repeated after a failure."""

    async def status(self) -> ImgsvcError | None:
        """None when a pod could be attached now, else why not."""

    async def collect(self, alive: set[str]) -> None:
        """After a restart: detach whatever belongs to no living pod."""

    def update_pod_cidr(self, pod_cidr: str) -> None:
        """Tell the network the node's pod address ranges, comma-separated. Blocking. Raises: InvalidArgument."""

    def describe(self) -> Mapping[str, Any]:
        """For Status(verbose)."""
