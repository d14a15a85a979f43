"""Where the runtime keeps what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Paths:
    """Directories of the runtime. State is on tmpfs and dies with the node; root is on disk."""

    state: Path
    root: Path

    def sandbox(self, sandbox_id: str) -> Path:
        """Generated files and pinned namespaces of a pod."""
        return self.state / "sandboxes" / sandbox_id

    def pins(self, sandbox_id: str) -> Path:
        """Where a pod's namespaces are bound."""
        return self.sandbox(sandbox_id) / "ns"

    @property
    def bundles(self) -> Path:
        """Parent of all bundles."""
        return self.state / "containers"

    def bundle(self, container_id: str) -> Path:
        """OCI bundle of a container."""
        return self.bundles / container_id

    def volumes(self, container_id: str) -> Path:
        """Volumes that images declare, on disk."""
        return self.root / "volumes" / container_id

    @property
    def exits(self) -> Path:
        """Exit codes of monitored containers."""
        return self.state / "exits"

    @property
    def sockets(self) -> Path:
        """Attach sockets; short, because a socket's path may have 107 bytes."""
        return self.state / "a"
