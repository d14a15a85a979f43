"""The sockets of the daemon: gRPC for CRI and the CLI, HTTP for metrics and the mirror."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc.aio

from imgsvc.base.errors import Unavailable
from imgsvc.base.http1 import Handler, HttpServer
from imgsvc.base.places import socket_target
from imgsvc.config import Config
from imgsvc.daemon.ownership import PublicSocket
from imgsvc.daemon.rpc import ErrorInterceptor, Observe

log = logging.getLogger(__name__)


async def listen_grpc(
    settings: Config, public: PublicSocket, add_services: Callable[[grpc.aio.Server], None], observe: Observe
) -> grpc.aio.Server:
    """Serve gRPC on the configured socket. observe: told method, code and seconds of every call. Raises: Unavailable when it cannot be bound."""
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(observe)],
        options=[
            ("grpc.max_receive_message_length", settings.grpc.max_recv_message_size),
            ("grpc.max_send_message_length", settings.grpc.max_send_message_size),
            ("grpc.so_reuseport", 0),
        ],
    )
    add_services(server)
    private = os.umask(0o177 if not settings.grpc.gid else 0o117)
    try:
        server.add_insecure_port(socket_target(str(public.private)))
        await server.start()
        public.publish(settings.grpc.uid, settings.grpc.gid)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"cannot listen: {error}", where=settings.address) from error
    finally:
        os.umask(private)
    return server


async def listen_http(name: str, address: str, handler: Handler, stack: AsyncExitStack, tls: ssl.SSLContext | None = None) -> None:
    """Serve until the stack is closed; nothing without an address. name: for the log. Raises: Unavailable (the address is taken)."""
    if not address:
        return
    server = HttpServer(handler, name)
    await server.start(address, tls)
    stack.push_async_callback(server.close)
    log.info("%s: listening on %s://%s, port %d", name, "https" if tls else "http", address, server.port)
