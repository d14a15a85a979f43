"""Disk use by image and by class, each byte counted once where it is and once per image that needs it. Pure.

An image's bytes are its stored blobs and its unpacked layers. unique: what removing this image alone would free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from imgsvc.images.leases import Node
from imgsvc.images.records import Image


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """Sizes [bytes]; unique + shared is what the image takes on this node."""

    image_id: str
    names: tuple[str, ...]
    unique: int
    shared: int


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """classes: bytes and count by kind of thing. garbage [bytes]: needed by no image (a lease or container may need it)."""

    images: tuple[ImageUsage, ...]
    classes: Mapping[str, tuple[int, int]]
    unreferenced: int

    def to_json(self) -> dict[str, Any]:
        """For `imgsvc df --json`."""
        return {
            "images": [asdict(image) for image in self.images],
            "classes": {kind: {"bytes": size, "count": count} for kind, (size, count) in self.classes.items()},
            "unreferenced": self.unreferenced,
        }


def disk_usage(images: Iterable[tuple[Image, Sequence[Node]]], sizes: Mapping[Node, int]) -> DiskUsage:
    """Account for everything in `sizes`.

    Args:  images: each with the nodes it needs (nodes.Images.needs).  sizes: bytes on disk by node (nodes.stored_sizes).
    """
    needs = [(image, {node for node in nodes if node in sizes}) for image, nodes in images]
    users = Counter(node for _, nodes in needs for node in nodes)
    usages = []
    for image, nodes in needs:
        unique = sum(sizes[node] for node in nodes if users[node] == 1)
        usages.append(ImageUsage(image.image_id, image.names, unique, sum(sizes[node] for node in nodes) - unique))
    classes: dict[str, tuple[int, int]] = {}
    for node, size in sizes.items():
        total, count = classes.get(node.kind, (0, 0))
        classes[node.kind] = (total + size, count + 1)
    unreferenced = sum(size for node, size in sizes.items() if node not in users)
    return DiskUsage(tuple(sorted(usages, key=lambda usage: usage.unique, reverse=True)), classes, unreferenced)
