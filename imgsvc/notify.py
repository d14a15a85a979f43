"""Readiness for systemd. Source: sd_notify(3)."""

from __future__ import annotations

import os
import socket


def notify(message: str) -> None:
    """Send one message ("READY=1") to $NOTIFY_SOCKET; nothing without one. Never raises: readiness is a courtesy."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.sendto(message.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            return
