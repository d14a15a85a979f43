"""Reading a tree with everything that has to be identical, and making the one to compare with: GNU tar, layer by layer."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


def read_tree(root: Path, *, unowned_times: Container[str] = frozenset()) -> dict[str, Any]:
    """Path → (type and mode, uid, gid, mtime, size, content or target or device, xattrs), and "" → the hard link groups.

    unowned_times: directories whose times nobody determined, because no layer had an entry for them.
    """
    found: dict[str, Any] = {}
    groups: dict[tuple[int, int], set[str]] = {}
    for path in [root, *root.rglob("*")]:
        name = str(path.relative_to(root))
        status = path.lstat()
        xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
        detail: object = None
        if stat.S_ISREG(status.st_mode):
            detail = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            detail = os.readlink(path)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            detail = (os.major(status.st_rdev), os.minor(status.st_rdev))
        directory = stat.S_ISDIR(status.st_mode)
        size = 0 if directory else status.st_size
        time = 0 if directory and name in unowned_times else status.st_mtime_ns
        if not directory and status.st_nlink > 1:
            groups.setdefault((status.st_dev, status.st_ino), set()).add(name)
        found[name] = (oct(status.st_mode), status.st_uid, status.st_gid, time, size, detail, xattrs)
    found[""] = sorted(sorted(group) for group in groups.values() if len(group) > 1)  # others' names are hidden
    return found


class ReferenceFailed(Exception):
    """GNU tar does not take this layer either."""


class Reference:
    """What GNU tar makes of layers applied in order. unowned_times: see read_tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unowned_times: set[str] = {"."}
        root.mkdir()
        root.chmod(0o755)

    def apply(self, layer: bytes) -> None:
        """One more layer: first what it hides, then its entries. Raises: ReferenceFailed.

        What is said to be hidden below something that the layer has put in place of a directory is gone with that already.
        """
        with tarfile.open(fileobj=io.BytesIO(layer), errors="surrogateescape") as archive:
            members = archive.getmembers()
        before = self._directories()
        others: set[str] = set()
        for member in members:
            name = os.path.normpath(member.name)
            if not os.path.basename(name).startswith(_WHITEOUT):
                others |= {name} if not member.isdir() else set()
            elif not any(str(parent) in others for parent in Path(name).parents):
                self._hide(name)
        for member in members:
            self._make_way(member)
        self._extract(layer)
        names = self._laid_directories([m for m in members if m.isdir()])
        for name, identity in self._directories().items():
            if name in names:
                self.unowned_times.discard(name)
            elif before.get(name, (None,))[0] == identity[0]:
                os.utime(self.root / name, ns=before[name][1:])
            else:
                self.unowned_times.add(name)
                os.chown(self.root / name, 0, 0)  # not what a set-group-ID parent passes on
                (self.root / name).chmod(0o755)

    def _directories(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for path in [self.root, *self.root.rglob("*")]:
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                found[str(path.relative_to(self.root))] = (status.st_ino, status.st_atime_ns, status.st_mtime_ns)
        return found

    def _laid_directories(self, entries: Sequence[tarfile.TarInfo]) -> set[str]:
        """Canonical names of directories with entries. Raises: ReferenceFailed where tar mixed them up.

        Where paths lead through links of the same layer, it gives late directory metadata to the wrong file.
        """
        modes: dict[str, set[int]] = {}
        for entry in entries:
            parent, name = os.path.split(os.path.normpath(self.root / entry.name))
            modes.setdefault(os.path.join(os.path.realpath(parent), name), set()).add(entry.mode & 0o7777)
        for real, wanted in modes.items():
            status = os.lstat(real)
            if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o7777 not in wanted:
                raise ReferenceFailed(f"tar did not give {real} the metadata of its entry")
        return {os.path.relpath(real, os.path.realpath(self.root)) for real in modes}

    def _hide(self, name: str) -> None:
        parent, _, base = name.rpartition("/")
        if not (self.root / parent).is_dir():
            return
        if base == _OPAQUE:
            for child in (self.root / parent).iterdir():
                _remove(child)
        elif base.startswith(_WHITEOUT):
            _remove(self.root / parent / base.removeprefix(_WHITEOUT))

    def _make_way(self, member: tarfile.TarInfo) -> None:
        """Unlike an engine, tar does not replace directories by other things."""
        path = self.root / os.path.normpath(member.name)
        if os.path.lexists(path) and path.name and path != self.root:
            is_dir = stat.S_ISDIR(path.lstat().st_mode)
            if is_dir != member.isdir():
                _remove(path)
            elif is_dir:  # an entry describes a directory completely; tar would keep attributes it does not have
                for xattr in os.listxattr(path):
                    os.removexattr(path, xattr)

    def _extract(self, layer: bytes) -> None:
        command = [
            "tar",
            "-x",
            "-p",
            "-P",
            "--numeric-owner",
            "--same-owner",
            "--xattrs",
            "--xattrs-include=*",
            "--delay-directory-restore",
        ]
        command += ["--exclude=.wh.*", "-C", str(self.root)]
        done = subprocess.run(command, input=layer, capture_output=True, check=False, umask=0o022)
        if done.returncode:
            raise ReferenceFailed(done.stderr.decode())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def as_seen(references: Sequence[bytes], root: Path) -> Reference:
    """The reference tree of some layers."""
    reference = Reference(root)
    for layer in references:
        reference.apply(layer)
    return reference
