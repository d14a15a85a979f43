"""Contracts of the runtime service: what it needs from the image side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from imgsvc.oci import Digest, ImageConfig


@dataclass(frozen=True, slots=True)
class RunnableImage:
    """An image a container can be made from. repo_tags and repo_digests as CRI lists them."""

    image_id: Digest
    config: ImageConfig
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RootMount:
    """One mount(2) that makes a root file system. options as in /etc/fstab."""

    type: str
    source: str
    options: tuple[str, ...] = ()


class Images(Protocol):
    """What the runtime needs from the image side; built by the edge. All asynchronous, on the event loop."""

    async def runnable(self, reference: str) -> RunnableImage | None:
        """Look an image up by ID, short ID, tag or digest; None when it is not here."""

    async def prepare_root(self, container_id: str, image_id: Digest, *, handler: str, readonly: bool = False) -> Sequence[RootMount]:
        """A snapshot for this container on top of the image; the image's layers stay as long as it exists.

        Idempotent per container_id. Raises: NotFound, PermissionDenied (an encrypted image without its keys).
        """

    async def remove_root(self, container_id: str) -> None:
        """Drop the container's snapshot. Absent is a success."""

    async def root_usage(self, container_id: str) -> tuple[int, int]:
        """Writable layer: (bytes, inodes)."""
