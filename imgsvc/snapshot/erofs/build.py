"""From layers' indexes to the image that shows them, one on top of the other: what a worker does for `seal`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from imgsvc.base.errors import DataLoss
from imgsvc.snapshot.erofs.image import Written, write_image
from imgsvc.snapshot.erofs.index import unpack
from imgsvc.snapshot.erofs.merge import FileTree


@dataclass(frozen=True, slots=True)
class OpenLayer:
    """Readable descriptors of a layer's tar stream and index."""

    tar: int
    index: int


def build_image(layers: Sequence[OpenLayer], output: int) -> Written:
    """Write the image of `layers`, base first, to the descriptor `output` and put it on disk. Blocking.

    Raises: BadLayer where a layer does not fit on those below, DataLoss, ResourceExhausted (2 TiB, the disk), OSError.
    """
    tree = FileTree()
    for layer in layers:
        tree.apply(unpack(_exactly(layer.index, 0, os.fstat(layer.index).st_size)))

    written = write_image(
        tree,
        [os.fstat(layer.tar).st_size for layer in layers],
        partial(write_all, output),
        lambda layer, offset, size: _exactly(layers[layer].tar, offset, size),
    )
    os.fsync(output)
    return written


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`. Raises: OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _exactly(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size:
        data = os.pread(fd, size, offset)
        if not data:
            raise DataLoss("a file of a layer is shorter than it was", hint="pull the image again")
        parts.append(data)
        offset, size = offset + len(data), size - len(data)
    return b"".join(parts)
