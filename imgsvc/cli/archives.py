"""export, import."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from imgsvc.cli.client import Daemon, add_address, connect
from imgsvc.cli.output import print_json
from imgsvc.errors import InvalidArgument, from_os_error
from imgsvc.oci import MIB
from imgsvc.reference import Reference

if TYPE_CHECKING:
    from imgsvc.api import imagetools_pb2


def add_commands(commands: Any) -> None:
    """Add this module's commands."""
    export = commands.add_parser("export", help="write images to a file that imgsvc, Docker, Podman, containerd and skopeo read")
    export.add_argument("references", nargs="+", metavar="REF")
    export.add_argument("-o", "--output", default="-", metavar="FILE", help="file to write; - is standard output")
    export.set_defaults(run=run_export)
    load = commands.add_parser("import", help="read images from an OCI layout or a Docker archive, both as tar")
    load.add_argument("file", metavar="FILE", help="file to read; - is standard input")
    load.add_argument("--name", default="", metavar="REPOSITORY", help="for images the archive does not name")
    load.add_argument("--platform", default="", help="os/architecture[/variant]; default: this node's")
    load.add_argument("--snapshotter", default="", help="unpack into this snapshotter")
    load.add_argument("--json", action="store_true")
    load.set_defaults(run=run_import)
    for parser in (export, load):
        add_address(parser)


def run_export(arguments: argparse.Namespace) -> int:
    """`imgsvc export`: the file is there whole or not at all."""
    if arguments.output == "-":
        if sys.stdout.isatty():
            raise InvalidArgument("an archive is not for a terminal", hint="give -o FILE, or redirect")
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
    if arguments.name:
        Reference.parse(arguments.name)
    try:
        with open(sys.stdin.fileno() if arguments.file == "-" else arguments.file, "rb") as stream, connect(arguments) as daemon:
            reply = daemon.tools.Import(_requests(arguments, stream))
    except OSError as error:
        raise from_os_error(error, "reading the archive", where=arguments.file) from error
    if arguments.json:
        print_json([{"reference": image.reference, "id": image.image_id} for image in reply.images])
    else:
        for image in reply.images:
            print(f"{image.reference} {image.image_id}")
    return 0


def _requests(arguments: argparse.Namespace, stream: IO[bytes]) -> Iterator[imagetools_pb2.ImportRequest]:
    from imgsvc.api import imagetools_pb2

    options = imagetools_pb2.ImportOptions(
        name=arguments.file, repository=arguments.name, platform=arguments.platform, snapshotter=arguments.snapshotter
    )
    yield imagetools_pb2.ImportRequest(options=options)
    while data := stream.read(MIB):
        yield imagetools_pb2.ImportRequest(data=data)
