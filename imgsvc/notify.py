"""Readiness for systemd. Source: sd_notify(3)."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Talks to the service manager that started us, if one did."""

    def __init__(self) -> None:
        """Takes $NOTIFY_SOCKET out of the environment: an OCI runtime that inherits it would speak in our name."""
        self._path = os.environ.pop("NOTIFY_SOCKET", "")

    def __call__(self, message: str) -> None:
        """Send one message ("READY=1"). Never raises: readiness is a courtesy."""
        if not self._path.startswith(("/", "@")):
            return
        path = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            try:
                connection.sendto(message.encode(), path)
            except OSError:
                return
