"""Finding the daemon and calling it."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Final, cast

from imgsvc.base import errors, places
from imgsvc.cli.usage import WrongUsage

if TYPE_CHECKING:
    import grpc

    from imgsvc.api import admin_pb2_grpc, cri_pb2_grpc, imagetools_pb2_grpc

# Some commands answer only when all work is done; a stuck daemon is noticed by the connection, not by the clock.
CONNECT_TIMEOUT_S: Final = 5.0
_HINT: Final = "start it with `imgsvc serve`, or name its socket with --address"
_NOT_OURS: Final = ("Method not found!", "unknown service imgsvc")  # what gRPC servers in C and in Go say


def add_address(parser: argparse.ArgumentParser) -> None:
    """The option of every command that talks to the daemon; it may also stand before the command."""
    parser.add_argument(
        "--address",
        metavar="unix:///…",
        default=argparse.SUPPRESS,  # keeps what stood before the command
        help="the daemon's socket (default: $IMGSVC_ADDRESS or the usual place)",
    )
    parser.set_defaults(takes_address=True)


def address(arguments: argparse.Namespace) -> str:
    """--address, else $IMGSVC_ADDRESS, else $CONTAINER_RUNTIME_ENDPOINT, else the default socket, as unix:///….

    Raises: WrongUsage naming which of these is not a Unix socket.
    """
    given = {"--address": arguments.address} | {
        f"${name}": os.environ.get(name) for name in ("IMGSVC_ADDRESS", "CONTAINER_RUNTIME_ENDPOINT")
    }
    for source, text in given.items():
        if text:
            path = text.removeprefix("unix:").removeprefix("//")
            if not path.startswith("/"):
                raise WrongUsage(
                    f'{source}: "{errors.printable(text, 120)}" is not a Unix socket', hint="write unix:///path/to/imgsvc.sock"
                )
            return f"unix://{path}"
    return places.socket_address()


class Daemon:
    """Stubs on one channel, each imported when it is first used; create with `connect`."""

    def __init__(self, channel: grpc.Channel, target: str) -> None:
        self._channel = channel
        self._target = target

    @cached_property
    def images(self) -> cri_pb2_grpc.ImageServiceStub:
        """CRI's ImageService."""
        from imgsvc.api import cri_pb2_grpc

        return cri_pb2_grpc.ImageServiceStub(self._channel)

    @cached_property
    def admin(self) -> admin_pb2_grpc.AdminStub:
        """What CRI has no call for: pulls with progress, inspection, store care."""
        from imgsvc.api import admin_pb2_grpc

        return admin_pb2_grpc.AdminStub(self._channel)

    @cached_property
    def tools(self) -> imagetools_pb2_grpc.ImageToolsStub:
        """Archives, pre-pulls, events, mounts."""
        from imgsvc.api import imagetools_pb2_grpc

        return imagetools_pb2_grpc.ImageToolsStub(self._channel)

    def error(self, failed: grpc.RpcError) -> RemoteError:
        """What the daemon said; or that it is not ours."""
        call = cast("grpc.Call", failed)  # every RpcError a call raises is that call
        text = str(call.details())
        if text.startswith(_NOT_OURS):
            text = f"{self._target}: what answers there is not this version of imgsvc; name imgsvc's socket with --address"
        return RemoteError(call.code().name, text)


class RemoteError(errors.ImgsvcError):
    """The daemon's own error line, with its code."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code  # type: ignore[misc]  # an instance carries the category it was answered with


@contextmanager
def connect(arguments: argparse.Namespace) -> Iterator[Daemon]:
    """A connection for a `with` block; gRPC failures inside it become our errors.

    Raises: WrongUsage, Unavailable and PermissionDenied when no daemon answers there; RemoteError for what the daemon said.
    """
    target = address(arguments)
    _knock(target)
    import grpc

    limit = 64 * 1024 * 1024
    options = [("grpc.max_receive_message_length", limit), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(places.socket_target(target.removeprefix("unix://")), options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise errors.Unavailable("the socket accepts connections but does not answer", where=target, hint=_HINT) from error
        daemon = Daemon(channel, target)
        try:
            yield daemon
        except grpc.RpcError as error:
            raise daemon.error(error) from error


def _knock(target: str) -> None:
    """Say at once why no daemon answers; gRPC would go on trying."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(target.removeprefix("unix://"))
        except FileNotFoundError as error:
            raise errors.Unavailable("no imgsvc daemon answers: no such socket", where=target, hint=_HINT) from error
        except PermissionError as error:
            hint = "run this as root, or have the daemon's [grpc] gid name a group of yours"
            raise errors.PermissionDenied("this user may not use the daemon's socket", where=target, hint=hint) from error
        except OSError as error:
            raise errors.Unavailable(f"no imgsvc daemon answers: {error.strerror or error}", where=target, hint=_HINT) from error
