"""pull, push, images, inspect, rmi, tag."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from imgsvc.cli.client import Daemon, add_address, connect
from imgsvc.cli.output import PullDisplay, human_size, plural, print_json, print_table, print_timings, warn
from imgsvc.errors import NotFound
from imgsvc.reference import Reference

Commands = Any  # argparse's subparser collection has no public type


def add_commands(commands: Commands) -> None:
    """Add this module's commands."""
    pull = commands.add_parser("pull", help="pull and unpack images")
    pull.add_argument("references", nargs="+", metavar="REF")
    pull.add_argument("--platform", default="", help="os/architecture[/variant]; default: this node's")
    pull.add_argument("--creds", default="", metavar="USER:PASSWORD", help="credentials for the registry")
    pull.add_argument("--snapshotter", default="", help="unpack into this snapshotter")
    pull.add_argument("--timings", action="store_true", help="print seconds by phase")
    pull.set_defaults(run=run_pull)
    push = commands.add_parser("push", help="upload an image under one of its names")
    push.add_argument("reference", metavar="REF")
    push.add_argument("--creds", default="", metavar="USER:PASSWORD", help="credentials for the registry")
    push.set_defaults(run=run_push)
    listing = commands.add_parser("images", help="list images")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(run=run_images)
    inspect = commands.add_parser("inspect", help="show everything known of an image, as JSON")
    inspect.add_argument("reference", metavar="REF")
    inspect.add_argument("--json", action="store_true", help="the only format; accepted for uniformity")
    inspect.set_defaults(run=run_inspect)
    remove = commands.add_parser("rmi", help="remove images")
    remove.add_argument("references", nargs="+", metavar="REF", help="a name removes that name, an ID the whole image")
    remove.set_defaults(run=run_remove)
    tag = commands.add_parser("tag", help="give an image one more name")
    tag.add_argument("source", metavar="SRC")
    tag.add_argument("target", metavar="DST")
    tag.set_defaults(run=run_tag)
    mount = commands.add_parser("mount", help="show an image's files, read-only, in an empty directory")
    mount.add_argument("reference", metavar="REF")
    mount.add_argument("directory", metavar="DIR")
    mount.set_defaults(run=run_mount)
    unmount = commands.add_parser("unmount", help="end such a mount")
    unmount.add_argument("directory", metavar="DIR")
    unmount.set_defaults(run=run_unmount)
    for parser in (mount, unmount, pull, push, listing, inspect, remove, tag):
        add_address(parser)


def run_pull(arguments: argparse.Namespace) -> int:
    """`imgsvc pull`: every reference is tried; 1 when any failed."""
    failed = 0
    with connect(arguments) as daemon:
        for text in arguments.references:
            try:
                _pull(daemon, arguments, text)
            except Exception as error:
                if len(arguments.references) == 1:
                    raise
                failed = 1
                print(f"imgsvc: {text}: {_line(error)}", file=sys.stderr)
    return failed


def _line(error: Exception) -> str:
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)


def _pull(daemon: Daemon, arguments: argparse.Namespace, text: str) -> None:
    from imgsvc.api import admin_pb2

    reference = Reference.parse(text)
    username, _, password = arguments.creds.partition(":")
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

    reference = Reference.parse(arguments.reference)
    username, _, password = arguments.creds.partition(":")
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
        for name in (
            list(image.repo_tags) or [digest.partition("@")[0] + "@" + image.id[:19] for digest in image.repo_digests] or ["<none>"]
        )
    ]
    print_table(("IMAGE", "ID", "SIZE", "PINNED"), rows)
    return 0


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

    absent: list[str] = []
    with connect(arguments) as daemon:
        for text in arguments.references:
            if daemon.admin.Untag(admin_pb2.UntagRequest(image=text)).found:
                print(text)
            else:
                absent.append(text)
    if absent:
        raise NotFound(f"no such image: {', '.join(absent)}", hint="see `imgsvc images`")
    return 0


def run_tag(arguments: argparse.Namespace) -> int:
    """`imgsvc tag`."""
    from imgsvc.api import admin_pb2

    with connect(arguments) as daemon:
        print(daemon.admin.Tag(admin_pb2.TagRequest(source=arguments.source, target=arguments.target)).image_id)
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
