"""Finding the daemon and calling it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from imgsvc import errors
from imgsvc.config import default_address

if TYPE_CHECKING:
    from imgsvc.api import admin_pb2_grpc, cri_pb2_grpc, imagetools_pb2_grpc

# Some commands answer only when all work is done; a stuck daemon is noticed by the connection, not by the clock.
CONNECT_TIMEOUT_S = 5.0


def add_address(parser: argparse.ArgumentParser) -> None:
    """The option every client command has."""
    parser.add_argument("--address", metavar="unix:///…", help="the daemon's socket (default: $IMGSVC_ADDRESS or the usual place)")


def address(arguments: argparse.Namespace) -> str:
    """--address, else $IMGSVC_ADDRESS, else $CONTAINER_RUNTIME_ENDPOINT, else the default socket."""
    found = arguments.address or os.environ.get("IMGSVC_ADDRESS") or os.environ.get("CONTAINER_RUNTIME_ENDPOINT") or default_address()
    return f"unix://{found}" if found.startswith("/") else str(found)


class Daemon:
    """Stubs on one channel; create with `connect`."""

    def __init__(
        self, images: cri_pb2_grpc.ImageServiceStub, admin: admin_pb2_grpc.AdminStub, tools: imagetools_pb2_grpc.ImageToolsStub
    ) -> None:
        self.images = images
        self.admin = admin
        self.tools = tools


class RemoteError(errors.ImgsvcError):
    """The daemon's own error line, with its code."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code  # type: ignore[misc]  # an instance carries the category it was answered with


@contextmanager
def connect(arguments: argparse.Namespace) -> Iterator[Daemon]:
    """A connection for a `with` block; gRPC failures inside it become our errors.

    Raises: Unavailable when nobody answers there; RemoteError for what the daemon said.
    """
    import grpc

    from imgsvc.api import admin_pb2_grpc, cri_pb2_grpc, imagetools_pb2_grpc

    target = address(arguments)
    limit = 64 * 1024 * 1024
    options = [("grpc.max_receive_message_length", limit), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(target, options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            hint = "start it with `imgsvc serve`, or name its socket with --address"
            raise errors.Unavailable("no imgsvc daemon answers", where=target, hint=hint) from error
        try:
            yield Daemon(
                cri_pb2_grpc.ImageServiceStub(channel), admin_pb2_grpc.AdminStub(channel), imagetools_pb2_grpc.ImageToolsStub(channel)
            )
        except grpc.RpcError as error:
            call = cast("grpc.Call", error)  # every RpcError a call raises is that call
            raise RemoteError(call.code().name, str(call.details())) from error
