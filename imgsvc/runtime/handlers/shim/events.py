"""The daemon's side of the events of a handler's shims: starting the process that takes them (eventprocess.py), reading its notes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from imgsvc.base.fsutil import private_dir
from imgsvc.runtime.handlers.shim import eventprocess

_CONNECT_S: Final = 1.0

_children: list[subprocess.Popen[bytes]] = []  # of this daemon; they are waited for when the next one is started


class ShimEvents:
    """socket_path: where shims deliver; directory: a file for each container that was out of memory."""

    def __init__(self, socket_path: Path, directory: Path) -> None:
        self.socket_path = socket_path
        self._directory = directory

    def start(self, *, again: bool = False) -> None:
        """See that its process runs; again: only where an earlier daemon had one. Blocking. Raises: OSError."""
        if self._answers() or (again and not self.socket_path.exists()):
            return
        _children[:] = [child for child in _children if child.poll() is None]
        private_dir(self._directory)
        self.socket_path.unlink(missing_ok=True)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(self.socket_path))
                self.socket_path.chmod(0o600)
                listener.listen()
                given = listener.fileno(), directory
                child = subprocess.Popen(
                    [sys.executable, "-I", "-S", eventprocess.__file__, *map(str, given)],
                    pass_fds=given,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                    env={},
                )
        finally:
            os.close(directory)
        _children.append(child)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_S)
            try:
                probe.connect(str(self.socket_path))
            except TimeoutError:
                return True  # it is busy
            except OSError:
                return False
        return True

    def out_of_memory(self, container_id: str) -> bool:
        """Whether a process of this container was killed for want of memory."""
        return (self._directory / container_id).exists()

    def forget(self, container_id: str) -> None:
        """The container is gone. Idempotent."""
        (self._directory / container_id).unlink(missing_ok=True)
