"""What `imgsvc import` is given as one stream of tar: a tar file, compressed or not, a layout's directory, or standard input.

The daemon takes plain tar alone. What has to be inflated or packed first is so here, with the rights of who imports.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Final, cast

import zstandard

from imgsvc.base.errors import DataLoss, InvalidArgument
from imgsvc.base.oci import MIB

_MARKERS: Final = ("oci-layout", "index.json", "manifest.json")  # what makes a directory a layout or an unpacked archive
_BLOCK: Final = 512


@contextmanager
def open_archive(name: str) -> Iterator[Iterator[bytes]]:
    """The tar stream in chunks of some MiB at most, for a `with` block. "-" is standard input.

    Raises: OSError; InvalidArgument for a directory that holds no images; DataLoss, while reading, when it cannot be inflated.
    """
    if name != "-" and os.path.isdir(name):
        yield _packed(Path(name))
        return
    with open(sys.stdin.fileno() if name == "-" else name, "rb", closefd=name != "-") as stream:
        yield _read(_inflated(stream), name)


def _inflated(stream: BufferedReader) -> IO[bytes]:
    head = stream.peek(6)
    if head.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stream))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return cast("IO[bytes]", zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True))
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(stream)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(stream)
    return stream


def _read(stream: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        while data := stream.read(MIB):
            yield data
    except (EOFError, ValueError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError) as error:
        raise DataLoss(f"cannot be inflated: {error}", where=name, hint="it is cut short or damaged") from error


def _packed(directory: Path) -> Iterator[bytes]:
    """A directory as a tar stream: regular files only, links are followed nowhere."""
    if not any((directory / marker).is_file() for marker in _MARKERS):
        raise InvalidArgument(
            "neither an OCI layout nor an unpacked Docker archive",
            where=str(directory),
            hint="it has index.json or manifest.json at its top",
        )
    for parent, _, names in os.walk(directory):
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield from _member(path, str(path.relative_to(directory)))
    yield bytes(2 * _BLOCK)


def _member(path: Path, name: str) -> Iterator[bytes]:
    with path.open("rb") as stream:
        header = tarfile.TarInfo(name)
        header.size = left = os.fstat(stream.fileno()).st_size
        yield header.tobuf(tarfile.PAX_FORMAT)
        while left:
            data = stream.read(min(left, MIB))
            if not data:
                raise DataLoss("the file shrank while it was read", where=str(path))
            left -= len(data)
            yield data
        yield bytes(-header.size % _BLOCK)
