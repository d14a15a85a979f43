"""One daemon per root, state directory and socket: what is another daemon's is neither swept nor replaced nor deleted."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imgsvc.base.errors import FailedPrecondition, Unavailable, from_os_error, printable
from imgsvc.base.fsutil import lock_exclusive, private_dir, resolved, write_atomic
from imgsvc.config import Config

log = logging.getLogger(__name__)

_OWNER: Final = "root"  # in the state directory: the root of the daemon whose pods these are
_PODS: Final = ("sandboxes", "containers")  # directories of pods, as the runtime names them
_KNOCK_S: Final = 5.0


@contextlib.contextmanager
def own_directories(settings: Config) -> Iterator[tuple[Path, Path]]:
    """Root and state by their real paths, the latter locked for the block. The lock on the root is that of its metadata.

    Raises: FailedPrecondition (another daemon runs here, or has pods here), InvalidArgument, PermissionDenied, ResourceExhausted.
    """
    root, state = private_dir(resolved(settings.root)), _state_directory(settings)
    lock = lock_exclusive(state / "daemon.lock", "the state directory")
    try:
        _claim(state, root)
        yield root, state
    finally:
        os.close(lock)


def _state_directory(settings: Config) -> Path:
    """The state directory; a group that may use the socket may also reach it, and nothing else in there."""
    if not settings.grpc.gid:
        return private_dir(resolved(settings.state))
    state = private_dir(resolved(settings.state), 0o710)
    os.chown(state, -1, settings.grpc.gid)
    return state


def _claim(state: Path, root: Path) -> None:
    """Note whose pods are in a locked state directory. What no record of ours names is swept, so none may be another's."""
    note = state / _OWNER
    try:
        owner = os.fsdecode(note.read_bytes()) if note.exists() else str(root)
        if owner != str(root) and any(os.listdir(state / name) for name in _PODS if (state / name).is_dir()):
            raise FailedPrecondition(
                f"there are pods of the imgsvc whose root is {printable(owner, 200)}",
                where=str(state),
                hint=f"choose another state directory, remove those pods first, or delete {note} if that root was moved to {root}",
            )
    except OSError as error:
        raise from_os_error(error, "taking the state directory", where=str(note)) from error
    if owner != str(root) or not note.exists():
        try:
            write_atomic(note, os.fsencode(root), sync=False)  # state is on tmpfs
        except OSError as error:  # a full disk is no reason to leave its pods alone
            log.warning("not noted whose state directory this is: %s: %s", note, error.strerror)


class PublicSocket:
    """The socket that clients know. The server binds another name beside it, which is moved to its place when it serves.

    So a client never meets a socket with the wrong owner, and the server, which deletes the name it has bound when it
    stops, never deletes one that another daemon has created since.
    """

    def __init__(self, path: Path) -> None:
        """Raises: FailedPrecondition when a server answers there, or something else than a socket is there."""
        self.path = path
        self.private = path.with_name(f".{os.getpid()}")  # short: a socket's path may have 107 bytes
        self._identity: tuple[int, int] | None = None
        _require_free(path)
        self.private.unlink(missing_ok=True)

    def publish(self, uid: int, gid: int) -> None:
        """Put the bound socket in its place. Raises: OSError."""
        if os.geteuid() == 0:
            os.chown(self.private, uid, gid)
        self._identity = _identity(self.private)
        os.rename(self.private, self.path)

    def withdraw(self) -> None:
        """Delete it, if it is still ours. Never raises."""
        with contextlib.suppress(OSError):
            if self._identity is not None and _identity(self.path) == self._identity:
                self.path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _require_free(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise FailedPrecondition(
            "the path of the socket is taken by something that is not a socket", where=str(path), hint="name another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_KNOCK_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # left by a daemon that was killed
        except TimeoutError:
            pass  # its queue is full: there is a server
        except OSError as error:
            raise Unavailable(f"cannot tell whether a server is running: {error.strerror}", where=str(path)) from error
    raise FailedPrecondition(
        "another server listens on the socket", where=str(path), hint="stop it, or choose another grpc.address or state"
    )
