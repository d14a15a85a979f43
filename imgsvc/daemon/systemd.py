"""Readiness and signs of life for systemd. Source: sd_notify(3), sd_watchdog_enabled(3)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class Notifier:
    """Talks to the service manager that started us, if one did."""

    def __init__(self) -> None:
        """Takes $NOTIFY_SOCKET out of the environment: an OCI runtime that inherits it would speak in our name."""
        self._path = os.environ.pop("NOTIFY_SOCKET", "")
        period, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        for_us = pid in ("", str(os.getpid())) and period.isascii() and period.isdigit()
        self._watchdog_s = int(period) / 1e6 if for_us else 0.0

    async def keep_alive(self, is_well: Callable[[], Awaitable[object]]) -> None:
        """Tell systemd twice per period that the daemon is healthy, whenever `is_well` returns. Returns at once without a watchdog."""
        while self._watchdog_s:
            try:
                await is_well()
            except Exception as error:  # noqa: BLE001  # one bad moment is none: systemd acts when they last for a period
                log.error("unhealthy; systemd is not notified: %s", error)
            else:
                self("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 2)

    def __call__(self, message: str) -> None:
        """Send one message ("READY=1"). Never raises: readiness is a courtesy."""
        if not self._path.startswith(("/", "@")):
            return
        path = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.sendto(message.encode(), path)
