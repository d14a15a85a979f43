"""pull, push, images, inspect, rmi, tag."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from imgsvc.cli import usage
from imgsvc.cli.client import Daemon, add_address, connect
from imgsvc.cli.output import human_size, plural, print_json, print_table, print_timings, warn
from imgsvc.cli.progress import PullDisplay
from imgsvc.errors import ImgsvcError, NotFound
from imgsvc.reference import Reference

T = TypeVar("T")
Commands = Any  # argparse's subparser collection has no public type


def add_commands(commands: Commands) -> None:
    """Add this module's commands."""
    pull = commands.add_parser("pull", help="pull and unpack images")
    pull.add_argument("references", nargs="+", metavar="REF", type=usage.reference)
    pull.add_argument("--platform", default="", type=usage.platform, help="os/architecture[/variant]; default: this node's")
    pull.add_argument("--creds", default=("", ""), type=usage.credentials, metavar="USER:PASSWORD", help="credentials for the registry")
    pull.add_argument("--snapshotter", default="", help="unpack into this snapshotter")
    pull.add_argument("--timings", action="store_true", help="print seconds by phase")
    pull.set_defaults(run=run_pull)
    push = commands.add_parser("push", help="upload an image under one of its names")
    push.add_argument("reference", metavar="REF", type=usage.reference)
    push.add_argument("--creds", default=("", ""), type=usage.credentials, metavar="USER:PASSWORD", help="credentials for the registry")
    push.set_defaults(run=run_push)
    listing = commands.add_parser("images", help="list images")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(run=run_images)
    inspect = commands.add_parser("inspect", help="show everything known of an image, as JSON")
    inspect.add_argument("reference", metavar="REF", type=usage.image)
    inspect.add_argument("--json", action="store_true", help="the only format; accepted for uniformity")
    inspect.set_defaults(run=run_inspect)
    remove = commands.add_parser("rmi", help="remove images")
    remove.add_argument("references", nargs="+", metavar="REF", type=usage.image, help="a name removes that name, an ID the whole image")
    remove.set_defaults(run=run_remove)
    tag = commands.add_parser("tag", help="give an image one more name")
    tag.add_argument("source", metavar="SRC", type=usage.image)
    tag.add_argument("target", metavar="DST", type=usage.reference)
    tag.set_defaults(run=run_tag)
    mount = commands.add_parser("mount", help="show an image's files, read-only, in an empty directory")
    mount.add_argument("reference", metavar="REF", type=usage.image)
    mount.add_argument("directory", metavar="DIR")
    mount.set_defaults(run=run_mount)
    unmount = commands.add_parser("unmount", help="end such a mount")
    unmount.add_argument("directory", metavar="DIR")
    unmount.set_defaults(run=run_unmount)
    for parser in (mount, unmount, pull, push, listing, inspect, remove, tag):
        add_address(parser)


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
