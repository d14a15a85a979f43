"""A directory that a container or a builder has written, as the tar stream of a layer: how a snapshot that was mounted is committed.

Overlayfs's own marks become whiteouts. Source: Linux Documentation/filesystems/overlayfs.rst; OCI image-spec layer.md.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from imgsvc.snapshot.unpack.tree import is_whiteout

_OPAQUE_MARKS: Final = ("trusted.overlay.opaque", "user.overlay.opaque")
_OWN_MARKS: Final = ("trusted.overlay.", "user.overlay.")
_FORMS: Final = {
    stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFBLK: tarfile.BLKTYPE, stat.S_IFIFO: tarfile.FIFOTYPE,
}  # fmt: skip


def pack_directory(directory: Path, output: IO[bytes]) -> None:
    """Write an upper directory as a tar stream. Sockets, which no layer can have, are left out. Blocking. Raises: OSError."""
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT, errorlevel=2) as archive:
        names: dict[tuple[int, int], str] = {}
        for path, name in _walk(directory):
            status = path.lstat()
            form = _FORMS.get(stat.S_IFMT(status.st_mode))
            if form is None:
                continue
            if is_whiteout(status):
                parent, _, base = name.rpartition("/")
                archive.addfile(tarfile.TarInfo(f"{parent}/.wh.{base}" if parent else f".wh.{base}"))
                continue
            entry = _described(path, name, status, form)
            first = names.setdefault((status.st_dev, status.st_ino), name)
            if first != name and form != tarfile.DIRTYPE:
                entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, first, 0
            if entry.type == tarfile.REGTYPE:
                with path.open("rb") as content:
                    archive.addfile(entry, content)
            else:
                archive.addfile(entry)
            if form == tarfile.DIRTYPE and _is_opaque(path):
                archive.addfile(tarfile.TarInfo(f"{name}/.wh..wh..opq"))


def _walk(directory: Path) -> Iterator[tuple[Path, str]]:
    """The directory itself and everything below, parents first, with names as in a layer."""
    yield directory, "."
    todo = [(directory, "")]
    while todo:
        here, prefix = todo.pop()
        for child in sorted(os.scandir(here), key=lambda entry: entry.name):
            yield Path(child.path), prefix + child.name
            if child.is_dir(follow_symlinks=False):
                todo.append((Path(child.path), f"{prefix}{child.name}/"))


def _described(path: Path, name: str, status: os.stat_result, form: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = form
    entry.mode = stat.S_IMODE(status.st_mode)
    entry.uid, entry.gid = status.st_uid, status.st_gid
    entry.mtime = status.st_mtime_ns // 10**9
    entry.pax_headers = {"mtime": f"{status.st_mtime_ns / 10**9:.9f}"} if status.st_mtime_ns % 10**9 else {}
    if form == tarfile.REGTYPE:
        entry.size = status.st_size
    elif form == tarfile.SYMTYPE:
        entry.linkname = os.readlink(path)
    elif form in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        entry.devmajor, entry.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    for attribute in os.listxattr(path, follow_symlinks=False):
        if not attribute.startswith(_OWN_MARKS):
            value = os.getxattr(path, attribute, follow_symlinks=False)
            entry.pax_headers[f"SCHILY.xattr.{attribute}"] = value.decode("utf-8", "surrogateescape")
    return entry


def _is_opaque(path: Path) -> bool:
    return any(name in _OPAQUE_MARKS for name in os.listxattr(path))
