"""The directory of key files: found, read, and read again when something changes.

Walked recursively, symbolic links followed, so that Secret volumes of Kubernetes work: there every name is a link through
`..data` into a hidden directory, which is itself not walked. An unusable file is logged once and skipped; a bad
key never hides a good one. A passphrase is taken from the file configured for the key, else from `KEYFILE.password`
beside it; one line end at its end is dropped.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.errors import ImgsvcError, from_os_error, printable
from imgsvc.decrypt.keys import KeyFileError, KeyRing, parse_key_file

PASSWORD_SUFFIX: Final = ".password"  # noqa: S105 - a file name
MAX_FILES: Final = 10_000  # per key directory; more means that keys_path points at the wrong place
MAX_KEY_FILE: Final = 4 * 1024**2  # [bytes]; an OpenPGP ring of hundreds of keys stays below

_log = logging.getLogger(__name__)

# What tells one state of a file from another; inode and change time catch a replaced file with a preserved mtime.
Signature = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    name: str  # relative to the directory
    signature: Signature
    mode: int


def signature(path: str | Path) -> Signature | None:
    """The state of a file or directory; None when it is not there or may not be seen."""
    try:
        return _signature(os.stat(path))
    except OSError:
        return None


def tree_signature(root: str) -> tuple[tuple[str, Signature], ...]:
    """The state of a file, or of every file below a directory; empty when nothing can be seen."""
    try:
        return tuple((f.path, f.signature) for f in _files(root))
    except OSError:
        return ()


class KeyDirectory:
    """Keys below one path (a directory or one file). Thread-safe; blocking."""

    def __init__(self, path: Path | None, password_files: Mapping[str, Path] | None = None) -> None:
        self._path = path
        self._password_files = dict(password_files or {})
        self._lock = threading.Lock()
        self._parsed: dict[str, tuple[object, KeyRing]] = {}
        self._state: object = None
        self._ring = KeyRing()
        self.generation = 0  # grows whenever the ring may have changed

    def load(self) -> tuple[KeyRing, int]:
        """The current keys and their generation; files that have not changed are not read again.

        A missing directory is an empty ring. Raises: PermissionDenied and others when it cannot be listed.
        """
        with self._lock:
            try:
                files = list(_files(str(self._path))) if self._path else []
                state = [(f, self._password_state(f)) for f in files]
                if state != self._state:
                    self._refresh(state)
                    self._state = state
            except OSError as error:
                raise from_os_error(error, "cannot read the directory of decryption keys", where=str(self._path)) from error
            return self._ring, self.generation

    def _refresh(self, state: list[tuple[_File, Signature | None]]) -> None:
        parsed: dict[str, tuple[object, KeyRing]] = {}
        for file, password_state in state:
            if file.name.endswith(PASSWORD_SUFFIX):
                continue
            known = self._parsed.get(file.path)
            mark = (file, password_state)
            parsed[file.path] = known if known and known[0] == mark else (mark, self._read(file))
        self._parsed = parsed
        missing = " (which does not exist)" if self._path and not os.path.lexists(self._path) else ""
        self._ring = KeyRing.join((ring for _, ring in parsed.values()), source=f"{self._path or ''}{missing}")
        self.generation += 1

    def _read(self, file: _File) -> KeyRing:
        """One file's keys; on trouble an empty ring that says why."""
        try:
            ring = parse_key_file(read_bounded(file.path), file.name, self._passphrases(file))
        except (KeyFileError, ImgsvcError) as error:
            _log.warning("decryption key file %s skipped: %s", file.path, error)
            return KeyRing(skipped=(f"{printable(file.name, 120)}: {error}",))
        if len(ring) and file.mode & 0o077 and not ring.tokens:
            # Not refused: Secret volumes are 0644 unless told otherwise.
            _log.warning("decryption key file %s has mode %04o; others on this node can read it", file.path, file.mode & 0o777)
        return ring

    def _passphrases(self, file: _File) -> list[bytes]:
        path = self._password_path(file)
        return [read_bounded(path).removesuffix(b"\n").removesuffix(b"\r")] if signature(path) else []

    def _password_state(self, file: _File) -> Signature | None:
        return signature(self._password_path(file))

    def _password_path(self, file: _File) -> str:
        return str(self._password_files.get(file.name, file.path + PASSWORD_SUFFIX))


def read_bounded(path: str, limit: int = MAX_KEY_FILE) -> bytes:
    """A small regular file. Raises: ImgsvcError (missing, unreadable), KeyFileError (a device, too large)."""
    try:
        # Without O_NONBLOCK a FIFO in the directory would stop everything.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise KeyFileError("not a regular file")
            data = stream.read(limit + 1)
    except OSError as error:
        raise from_os_error(error, "cannot read") from error
    if len(data) > limit:
        raise KeyFileError(f"larger than {limit} bytes")
    return data


def _signature(status: os.stat_result) -> Signature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _files(root: str) -> Iterator[_File]:
    """Regular files below `root`, sorted by name, each once. Raises: OSError for the root only."""
    if not os.path.lexists(root):
        return
    if not os.path.isdir(root):
        status = os.stat(root)
        yield _File(root, os.path.basename(root), _signature(status), status.st_mode)
        return
    seen: set[tuple[int, int]] = set()
    for count, (path, status) in enumerate(_walk(root, seen)):
        if count == MAX_FILES:
            _log.error("more than %d files below %s; the rest is not read", MAX_FILES, root)
            return
        yield _File(path, os.path.relpath(path, root), _signature(status), status.st_mode)


def _walk(directory: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result]]:
    """Depth first. `seen` holds what was visited, so that links in circles or to one file end here."""
    for name in sorted(os.listdir(directory)):
        if name.startswith(".."):
            continue  # the hidden directories of a Secret volume; its plain names lead there
        path = os.path.join(directory, name)
        try:
            status = os.stat(path)
        except OSError:
            continue  # dangling, or gone since it was listed
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if stat.S_ISREG(status.st_mode):
            yield path, status
        elif stat.S_ISDIR(status.st_mode):
            try:
                yield from _walk(path, seen)
            except OSError:
                yield path, status  # reading it fails like an unreadable file, and is logged like one
