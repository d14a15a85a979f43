"""What holds a pod: the contract of the drivers in this directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from imgsvc.runtime.core import Core
from imgsvc.runtime.numbers.usage import Usage
from imgsvc.runtime.records import SandboxRecord


class PodHolder(Protocol):
    """Keeps pods of one kind there while none of their containers runs, and answers what only it knows of them.

    One object serves all pods of its kind; a record says which pod is meant. It remembers nothing between calls, so each
    call works for pods of an earlier daemon, too.
    """

    async def start(self, record: SandboxRecord) -> int:
        """Hold a pod whose namespaces are pinned; the pid on this node that it has from now on, 0 for none.

        end() is owed after a failure, too.
        Raises: Unimplemented (it cannot hold this pod: the next kind is tried), FailedPrecondition, Unavailable.
        """

    async def end(self, record: SandboxRecord) -> None:
        """End what holds a pod, whole or half-made. Gone already is a success. Raises: ImgsvcError when it does not go."""

    def has_ended(self, record: SandboxRecord) -> bool:
        """Whether it is certain, without asking another process, that a pod that was ready is no longer held."""

    async def wait(self, record: SandboxRecord) -> None:
        """Until a pod is no longer held; see Kind.can_end."""

    def pid(self, record: SandboxRecord) -> int:
        """The process whose PID namespace containers of the pod may share; 0 when there is none."""

    async def info(self, record: SandboxRecord) -> Mapping[str, Any]:
        """Members for PodSandboxStatus(verbose)."""

    async def usage(self, record: SandboxRecord) -> Usage | None:
        """What the pod has used, where its cgroup does not say it; else None."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One driver, as the choice knows it.

    name: as written to SandboxRecord.holder. suits: whether a pod that is about to be made is to be held so.
    can_end: whether such a pod can end by itself, and so is watched.
    """

    name: str
    suits: Callable[[Core, SandboxRecord], bool]
    make: Callable[[Core], PodHolder]
    can_end: bool = True
