"""Port-forward: a connection to a loopback port inside a pod's network namespace.

A socket belongs to the namespace of the thread that made it, for ever. So a thread of its own enters the namespace, makes
the sockets and ends; it is never used for anything else, as it cannot safely come back.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.concurrency import in_thread, time_limit
from imgsvc.base.errors import Unavailable, from_os_error
from imgsvc.base.kernel import CLONE_NEWNET, in_fresh_thread, setns
from imgsvc.runtime.streaming.fdio import SocketConnection
from imgsvc.runtime.streaming.interfaces import Connection

CONNECT_TIMEOUT_S: Final = 30.0
_ADDRESSES: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


@dataclass(frozen=True, slots=True)
class PodPorts:
    """The ports of a pod. netns: path of its network namespace, None for the host's."""

    netns: Path | None

    async def connect(self, port: int) -> Connection:
        """As PortTarget.connect: IPv4 first, then IPv6. Raises: Unavailable, NotFound (the namespace is gone)."""
        error: OSError | None = None
        for family, address in _ADDRESSES:
            sock = await _socket_in(self.netns, family)
            if sock is None:
                continue
            try:
                async with time_limit(CONNECT_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_connect(sock, (address, port))
            except OSError as refused:  # TimeoutError is one
                sock.close()
                error = error or refused
            except BaseException:
                sock.close()
                raise
            else:
                return SocketConnection(sock)
        reason = _reason(error)
        raise Unavailable(f"cannot connect to port {port} in the pod: {reason}") from error


def _reason(error: OSError | None) -> str:
    if error is None:
        return "the kernel has neither IPv4 nor IPv6"
    return os.strerror(error.errno) if error.errno else "timed out"  # asyncio puts the address into strerror


async def _socket_in(netns: Path | None, family: int) -> socket.socket | None:
    """A non-blocking TCP socket of a namespace; None when the kernel lacks the family. Raises: NotFound, ImgsvcError."""
    if netns is None:
        return _socket(family)
    made: list[socket.socket | None] = []
    try:
        await in_thread(in_fresh_thread, lambda: made.append(_socket_inside(netns, family)))
    except asyncio.CancelledError:
        if made and made[0]:
            made[0].close()
        raise
    except OSError as error:
        raise from_os_error(error, "entering the network of the pod", where=str(netns)) from error
    return made[0]


def _socket_inside(netns: Path, family: int) -> socket.socket | None:
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET)
    finally:
        os.close(fd)
    return _socket(family)


def _socket(family: int) -> socket.socket | None:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return None
    sock.setblocking(False)
    return sock
