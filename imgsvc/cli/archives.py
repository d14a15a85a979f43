"""export, import."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from imgsvc.base.errors import from_os_error
from imgsvc.cli import usage
from imgsvc.cli.client import Daemon, add_address, connect
from imgsvc.cli.output import print_json

if TYPE_CHECKING:
    from imgsvc.api import imagetools_pb2


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc export`."""
    parser.add_argument("references", nargs="+", metavar="REF", type=usage.image)
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="file to write; - is standard output")
    parser.set_defaults(run=run_export)
    add_address(parser)


def import_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc import`."""
    parser.add_argument("file", metavar="FILE", help="a tar file, compressed or not, or the directory of a layout; - is standard input")
    parser.add_argument("--name", default=None, metavar="REPOSITORY", type=usage.repository, help="for images the archive does not name")
    parser.add_argument("--platform", default="", type=usage.platform, help="os/architecture[/variant]; default: this node's")
    parser.add_argument("--snapshotter", default="", help="unpack into this snapshotter")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run_import)
    add_address(parser)


def run_export(arguments: argparse.Namespace) -> int:
    """`imgsvc export`: the file is there whole or not at all."""
    if arguments.output == "-":
        if sys.stdout.isatty():
            raise usage.WrongUsage("an archive is not for a terminal", hint="give -o FILE, or redirect")
        with connect(arguments) as daemon:
            _receive(daemon, arguments.references, sys.stdout.buffer)
        return 0
    target = Path(arguments.output)
    partial = target.with_name(f"{target.name}.partial")
    try:
        with connect(arguments) as daemon, partial.open("wb") as stream:
            _receive(daemon, arguments.references, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except OSError as error:
        raise from_os_error(error, "writing the archive", where=str(target)) from error
    finally:
        partial.unlink(missing_ok=True)
    return 0


def _receive(daemon: Daemon, references: list[str], stream: IO[bytes]) -> None:
    from imgsvc.api import imagetools_pb2

    for chunk in daemon.tools.Export(imagetools_pb2.ExportRequest(images=references)):
        stream.write(chunk.data)


def run_import(arguments: argparse.Namespace) -> int:
    """`imgsvc import`."""
    from imgsvc.cli.archivefile import open_archive

    try:
        with connect(arguments) as daemon, open_archive(arguments.file) as chunks:
            reply = _send(daemon, _requests(arguments, chunks))
    except OSError as error:
        raise from_os_error(error, "reading the archive", where=arguments.file) from error
    if arguments.json:
        print_json([{"reference": image.reference, "id": image.image_id} for image in reply.images])
    else:
        for image in reply.images:
            print(f"{image.reference} {image.image_id}")
    return 0


def _send(daemon: Daemon, requests: Iterable[imagetools_pb2.ImportRequest]) -> imagetools_pb2.ImportReply:
    """Raises: what `requests` raises, which gRPC would keep to itself (and its log)."""
    import grpc

    failed: list[Exception] = []

    def watched() -> Iterator[imagetools_pb2.ImportRequest]:
        try:
            yield from requests
        except Exception as error:
            failed.append(error)
            raise

    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    try:
        reply: imagetools_pb2.ImportReply = daemon.tools.Import(watched())
    except grpc.RpcError:
        if failed:
            raise failed[0] from None
        raise
    return reply


def _requests(arguments: argparse.Namespace, chunks: Iterable[bytes]) -> Iterator[imagetools_pb2.ImportRequest]:
    from imgsvc.api import imagetools_pb2

    options = imagetools_pb2.ImportOptions(
        name=arguments.file, repository=arguments.name or "", platform=arguments.platform, snapshotter=arguments.snapshotter
    )
    yield imagetools_pb2.ImportRequest(options=options)
    for data in chunks:
        yield imagetools_pb2.ImportRequest(data=data)
