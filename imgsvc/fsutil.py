"""Durable files and safe paths: the only place that knows what survives a power cut.

A file is durable when its data is synced *and* the directory that names it is. Source: fsync(2), rename(2).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from imgsvc.errors import InvalidArgument, printable


def sync_dir(path: Path | str) -> None:
    """Put a directory's entries on disk. Blocking."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600, sync: bool = True) -> None:
    """Replace a small file: readers see the old or the new bytes, also after a power cut (sync=True). Blocking."""
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if sync:
        sync_dir(path.parent)


def private_dir(path: Path, mode: int = 0o700) -> Path:
    """Create a directory that lets no other user in, and tighten one that does (CVE-2024-25621). Returns it."""
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)
    return path


def safe_component(text: str, what: str) -> str:
    """`text` if it can be one path component of ours. Raises: InvalidArgument."""
    if not text or text in (".", "..") or "/" in text or "\0" in text or len(text.encode()) > 255:
        raise InvalidArgument(f'{what} "{printable(text, 120)}" cannot be a file name')
    return text
