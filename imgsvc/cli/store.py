"""df, gc, fsck."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from imgsvc.cli.client import add_address, connect
from imgsvc.cli.output import human_size, plural, print_json, print_table


def df_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc df`."""
    _add_common(parser)
    parser.set_defaults(run=run_df)


def gc_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc gc`."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--explain", action="store_true", help="explain what would be removed and why, and remove nothing")
    how.add_argument("--migrate", action="store_true", help="first unpack images of other snapshotters for the one that is configured now")
    _add_common(parser)
    parser.set_defaults(run=run_gc)


def fsck_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc fsck`."""
    parser.add_argument("--deep", action="store_true", help="read every blob and compare its digest; compare layers with their blobs")
    parser.add_argument("--repair", action="store_true", help="forget what is broken, so that the next pull brings it back")
    parser.add_argument("--root", metavar="DIR", type=Path, help="check the store in DIR without a daemon; none may be running on it")
    _add_common(parser)
    parser.set_defaults(run=run_fsck)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")
    add_address(parser)


def run_df(arguments: argparse.Namespace) -> int:
    """`imgsvc df`."""
    from imgsvc.api import admin_pb2

    with connect(arguments) as daemon:
        reply = json.loads(daemon.admin.DiskUsage(admin_pb2.DiskUsageRequest()).json)
    if arguments.json:
        print_json(reply)
        return 0
    rows = [
        (image["names"][0] if image["names"] else image["image_id"][7:19], human_size(image["unique"]), human_size(image["shared"]))
        for image in reply["images"]
    ]
    print_table(("IMAGE", "UNIQUE", "SHARED"), rows)
    print()
    print_table(
        ("CLASS", "COUNT", "SIZE"), [(kind, str(c["count"]), human_size(c["bytes"])) for kind, c in sorted(reply["classes"].items())]
    )
    print(f"\nnot used by any image: {human_size(reply['unreferenced'])}")
    return 0


def run_gc(arguments: argparse.Namespace) -> int:
    """`imgsvc gc`: 1 when something could not be removed."""
    from imgsvc.api import admin_pb2

    with connect(arguments) as daemon:
        reply = json.loads(daemon.admin.Collect(admin_pb2.CollectRequest(explain=arguments.explain, migrate=arguments.migrate)).json)
    if arguments.json:
        print_json(reply)
    elif arguments.explain:
        rows = [("stays" if v["stays"] else "goes", v["kind"], v["id"], " > ".join(v["why"])) for v in reply["verdicts"]]
        print_table(("", "KIND", "ID", "WHY"), rows)
    else:
        for name in reply["moved"]:
            print(f"moved {name}")
        for node in reply["removed"]:
            print(f"removed {node}")
        for node, why in reply["failed"].items():
            print(f"failed {node}: {why}")
        print(f"removed {plural(len(reply['removed']), 'object')}; {reply['live']} in use")
    return 1 if reply.get("failed") else 0


def run_fsck(arguments: argparse.Namespace) -> int:
    """`imgsvc fsck`: 1 when something is broken and was not repaired."""
    reply = _check_offline(arguments) if arguments.root else _check(arguments)
    if arguments.json:
        print_json(reply)
    else:
        for finding in reply["findings"]:
            print(f"{finding['kind']} {finding['id']}: {finding['problem']}" + (f"; {finding['repaired']}" if finding["repaired"] else ""))
        print("clean" if reply["clean"] else "broken; `imgsvc fsck --repair` mends what it can")
    return 0 if reply["clean"] else 1


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    from imgsvc.api import admin_pb2

    with connect(arguments) as daemon:
        request = admin_pb2.CheckRequest(deep=arguments.deep, repair=arguments.repair)
        report: dict[str, Any] = json.loads(daemon.admin.Check(request).json)
    return report


def _check_offline(arguments: argparse.Namespace) -> dict[str, Any]:
    from imgsvc.cli.offline_fsck import check_offline

    return check_offline(arguments.root, deep=arguments.deep, repair=arguments.repair).to_json()
