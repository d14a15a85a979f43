"""The sockets of the daemon: gRPC for CRI and the CLI, HTTP for metrics and the mirror."""

from __future__ import annotations

import logging
import os
import ssl
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc.aio

from imgsvc.api import admin_pb2_grpc, cri_pb2_grpc, imagetools_pb2_grpc
from imgsvc.base.errors import Unavailable
from imgsvc.base.http1 import Handler, HttpServer
from imgsvc.base.places import socket_target
from imgsvc.config import Config
from imgsvc.daemon.rpc import ErrorInterceptor

if TYPE_CHECKING:
    from imgsvc.daemon.build import Services

log = logging.getLogger(__name__)


async def listen_grpc(settings: Config, services: Services) -> grpc.aio.Server:
    """Serve every gRPC service on the configured socket. Raises: Unavailable when it cannot be bound."""
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(services.telemetry.observer.rpc)],
        options=[
            ("grpc.max_receive_message_length", settings.grpc.max_recv_message_size),
            ("grpc.max_send_message_length", settings.grpc.max_send_message_size),
            ("grpc.so_reuseport", 0),
        ],
    )
    cri_pb2_grpc.add_ImageServiceServicer_to_server(services.images, server)
    cri_pb2_grpc.add_RuntimeServiceServicer_to_server(services.runtime, server)
    admin_pb2_grpc.add_AdminServicer_to_server(services.admin, server)
    imagetools_pb2_grpc.add_ImageToolsServicer_to_server(services.tools, server)
    private = os.umask(0o177 if not settings.grpc.gid else 0o117)
    try:
        server.add_insecure_port(socket_target(str(services.public.private)))
        await server.start()
        services.public.publish(settings.grpc.uid, settings.grpc.gid)
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
