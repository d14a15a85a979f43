"""pull, push, images, inspect, rmi, tag."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from imgsvc.base.errors import ImgsvcError, NotFound
from imgsvc.cli import usage
from imgsvc.cli.client import Daemon, add_address, connect
from imgsvc.cli.output import human_size, plural, print_json, print_table, print_timings, warn
from imgsvc.cli.progress import PullDisplay

if TYPE_CHECKING:
    from imgsvc.base.reference import Reference

T = TypeVar("T")


def pull_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc pull`."""
    parser.add_argument("references", nargs="+", metavar="REF", type=usage.reference)
    parser.add_argument("--platform", default="", type=usage.platform, help="os/architecture[/variant]; default: this node's")
    _add_credentials(parser)
    parser.add_argument("--snapshotter", default="", help="unpack into this snapshotter")
    parser.add_argument("--timings", action="store_true", help="print seconds by phase")
    _to_the_daemon(parser, run_pull)


def push_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc push`."""
    parser.add_argument("reference", metavar="REF", type=usage.reference)
    _add_credentials(parser)
    _to_the_daemon(parser, run_push)


def images_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc images`."""
    parser.add_argument("--json", action="store_true")
    _to_the_daemon(parser, run_images)


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc inspect`."""
    parser.add_argument("reference", metavar="REF", type=usage.image)
    parser.add_argument("--json", action="store_true", help="the only format; accepted for uniformity")
    _to_the_daemon(parser, run_inspect)


def remove_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc rmi`."""
    parser.add_argument("references", nargs="+", metavar="REF", type=usage.image, help="a name removes that name, an ID the whole image")
    _to_the_daemon(parser, run_remove)


def tag_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc tag`."""
    parser.add_argument("source", metavar="SRC", type=usage.image)
    parser.add_argument("target", metavar="DST", type=usage.reference)
    _to_the_daemon(parser, run_tag)


def mount_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc mount`."""
    parser.add_argument("reference", metavar="REF", type=usage.image)
    parser.add_argument("directory", metavar="DIR")
    _to_the_daemon(parser, run_mount)


def unmount_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc unmount`."""
    parser.add_argument("directory", metavar="DIR")
    _to_the_daemon(parser, run_unmount)


def _add_credentials(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--creds", default=("", ""), type=usage.credentials, metavar="USER:PASSWORD", help="credentials for the registry")


def _to_the_daemon(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    add_address(parser)
    parser.set_defaults(run=run)


def run_pull(arguments: argparse.Namespace) -> int:
    """`imgsvc pull`: every reference is tried; 1 when any failed."""
    with connect(arguments) as daemon:
        return _each(daemon, arguments.references, lambda reference: _pull(daemon, arguments, reference))


def _each(daemon: Daemon, items: Sequence[T], work: Callable[[T], None]) -> int:
    """Do something to each, whatever becomes of the others. Returns the exit code: 1 when any failed."""
    import grpc

    failed = 0
    for item in items:
        try:
            try:
                work(item)
            except grpc.RpcError as error:
                raise daemon.error(error) from error
        except ImgsvcError as error:
            failed = 1
            warn(f"{error}" if len(items) == 1 or str(item) in str(error) else f"{item}: {error}")
    return failed


def _pull(daemon: Daemon, arguments: argparse.Namespace, reference: Reference) -> None:
    from imgsvc.api import admin_pb2

    username, password = arguments.creds
    request = admin_pb2.PullRequest(
        reference=str(reference),
        platform=arguments.platform,
        snapshotter=arguments.snapshotter,
        username=username,
        password=password,
    )
    display = PullDisplay(str(reference), sys.stderr)
    for event in daemon.admin.Pull(request):
        match event.WhichOneof("event"):
            case "resolved":
                display.resolved(event.resolved.digest, event.resolved.endpoint)
            case "layer":
                moved = event.layer
                display.layer(moved.digest, moved.size, moved.downloaded, moved.state, moved.unpacked)
            case "done":
                display.end()
                print(event.done.image_id)
                if arguments.timings:
                    print_timings(json.loads(event.done.timings_json))


def run_push(arguments: argparse.Namespace) -> int:
    """`imgsvc push`: prints the digest that the name has in the registry now."""
    from imgsvc.api import admin_pb2

    reference = arguments.reference
    username, password = arguments.creds
    display = PullDisplay(str(reference), sys.stderr)
    with connect(arguments) as daemon:
        for event in daemon.admin.Push(admin_pb2.PushRequest(reference=str(reference), username=username, password=password)):
            if event.WhichOneof("event") == "blob":
                display.layer(event.blob.digest, event.blob.size, event.blob.downloaded, event.blob.state)
                continue
            display.end()
            print(event.done.digest)
            if event.done.left_out:
                others = plural(event.done.left_out, "other manifest")
                warn(f"pushed the manifest of one platform; {others} of its index are not on this node")
    return 0


def run_images(arguments: argparse.Namespace) -> int:
    """`imgsvc images`."""
    from imgsvc.api import cri_pb2

    with connect(arguments) as daemon:
        images = list(daemon.images.ListImages(cri_pb2.ListImagesRequest()).images)
    if arguments.json:
        print_json(
            [
                {"id": i.id, "repoTags": list(i.repo_tags), "repoDigests": list(i.repo_digests), "size": i.size, "pinned": i.pinned}
                for i in images
            ]
        )
        return 0
    rows = [
        (name, image.id[7:19], human_size(image.size), "yes" if image.pinned else "")
        for image in images
        for name in (list(image.repo_tags) or [_short(digest) for digest in image.repo_digests] or ["<none>"])
    ]
    print_table(("IMAGE", "ID", "SIZE", "PINNED"), rows)
    return 0


def _short(repo_digest: str) -> str:
    """A name by digest, so that it fits into a table."""
    name, _, digest = repo_digest.partition("@")
    return f"{name}@{digest[: len('sha256:') + 12]}"


def run_inspect(arguments: argparse.Namespace) -> int:
    """`imgsvc inspect`."""
    from imgsvc.api import admin_pb2

    with connect(arguments) as daemon:
        reply = daemon.admin.Inspect(admin_pb2.InspectRequest(image=arguments.reference))
    print_json(json.loads(reply.json))
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    """`imgsvc rmi`: every reference is tried; an absent image is an error here, unlike in CRI."""
    from imgsvc.api import admin_pb2

    with connect(arguments) as daemon:

        def remove(text: str) -> None:
            if not daemon.admin.Untag(admin_pb2.UntagRequest(image=text)).found:
                raise NotFound(f"no such image: {text}", hint="see `imgsvc images`")
            print(text)

        return _each(daemon, arguments.references, remove)


def run_tag(arguments: argparse.Namespace) -> int:
    """`imgsvc tag`."""
    from imgsvc.api import admin_pb2

    with connect(arguments) as daemon:
        print(daemon.admin.Tag(admin_pb2.TagRequest(source=arguments.source, target=str(arguments.target))).image_id)
    return 0


def run_mount(arguments: argparse.Namespace) -> int:
    """`imgsvc mount`."""
    from imgsvc.api import imagetools_pb2

    with connect(arguments) as daemon:
        request = imagetools_pb2.MountRequest(image=arguments.reference, directory=os.path.abspath(arguments.directory))
        print(daemon.tools.Mount(request).image_id)
    return 0


def run_unmount(arguments: argparse.Namespace) -> int:
    """`imgsvc unmount`."""
    from imgsvc.api import imagetools_pb2

    with connect(arguments) as daemon:
        daemon.tools.Unmount(imagetools_pb2.UnmountRequest(directory=os.path.abspath(arguments.directory)))
    return 0
