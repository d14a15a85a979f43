"""prepull: many images at once, or how far the daemon's own files are."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgsvc.base.oci import Platform
from imgsvc.cli import usage
from imgsvc.cli.client import Daemon, add_address, connect
from imgsvc.cli.output import print_json, print_table

RETRY_PAUSE_S: Final = 2.0  # before the first retry; doubled with every further one
_FINAL: Final = ("INVALID_ARGUMENT", "PERMISSION_DENIED", "UNIMPLEMENTED")  # trying again changes nothing


def prepull_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc prepull`."""
    parser.add_argument("references", nargs="*", metavar="REF", type=usage.reference)
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", help="a pre-pull file; its images are pulled now, whatever its windows")
    parser.add_argument("--concurrent", type=usage.count(1), default=0, metavar="N", help="pulls at a time (default: the file's, else 2)")
    parser.add_argument("--retries", type=usage.count(0), default=2, metavar="N", help="retries of an image that failed (default: 2)")
    parser.add_argument("--status", action="store_true", help="show the daemon's pre-pull files instead")
    parser.add_argument("--now", action="store_true", help="make the daemon try all images of its files now")
    parser.add_argument("--json", action="store_true")
    add_address(parser)
    parser.set_defaults(run=run_prepull)


@dataclass(frozen=True, slots=True)
class _Job:
    reference: str
    platform: str = ""
    username: str = ""
    password: str = ""


@dataclass(frozen=True, slots=True)
class _Result:
    reference: str
    image_id: str
    seconds: float
    tries: int
    error: str


def run_prepull(arguments: argparse.Namespace) -> int:
    """`imgsvc prepull`: every image is tried; 1 when any failed."""
    if arguments.status or arguments.now:
        if arguments.references or arguments.file:
            raise usage.WrongUsage("--status and --now are about the daemon's own files", hint="leave out REF and --file")
        return _show_status(arguments)
    jobs, concurrent = _jobs(arguments)
    if not jobs:
        raise usage.WrongUsage("no images", hint="name images, or give a file with -f")
    with connect(arguments) as daemon, ThreadPoolExecutor(arguments.concurrent or concurrent) as pool:
        results = list(pool.map(lambda job: _pull(daemon, job, arguments.retries), jobs))
    _report(results, as_json=arguments.json)
    return 1 if any(result.error for result in results) else 0


def _jobs(arguments: argparse.Namespace) -> tuple[list[_Job], int]:
    jobs = [_Job(str(reference)) for reference in arguments.references]
    if not arguments.file:
        return jobs, 2
    from imgsvc.images.prepull.plan import load_plan

    plan = load_plan(arguments.file)
    for wanted in plan.images:
        credential = wanted.credential()
        platform = "" if wanted.platform == Platform.host() else str(wanted.platform)
        username, password = (credential.username, credential.password) if credential else ("", "")
        jobs.append(_Job(str(wanted.reference), platform, username, password))
    return jobs, plan.concurrent


def _pull(daemon: Daemon, job: _Job, retries: int) -> _Result:
    import grpc

    from imgsvc.api import admin_pb2

    began, tries = time.monotonic(), 0
    request = admin_pb2.PullRequest(reference=job.reference, platform=job.platform, username=job.username, password=job.password)
    while True:
        tries += 1
        try:
            image_id = next((event.done.image_id for event in daemon.admin.Pull(request) if event.WhichOneof("event") == "done"), "")
            return _Result(job.reference, image_id, time.monotonic() - began, tries, "")
        except grpc.RpcError as error:
            failed = daemon.error(error)
            if tries > retries or failed.code in _FINAL:
                return _Result(job.reference, "", time.monotonic() - began, tries, str(failed))
            print(f"imgsvc: {job.reference}: {failed}; trying again", file=sys.stderr)
            time.sleep(RETRY_PAUSE_S * 2.0 ** (tries - 1))


def _report(results: Sequence[_Result], *, as_json: bool) -> None:
    if as_json:
        print_json(
            [{"reference": r.reference, "id": r.image_id, "seconds": r.seconds, "tries": r.tries, "error": r.error} for r in results]
        )
        return
    print_table(
        ("IMAGE", "RESULT", "SECONDS", "TRIES"),
        [(r.reference, "failed" if r.error else r.image_id[7:19], f"{r.seconds:.1f}", str(r.tries)) for r in results],
    )
    for result in results:
        if result.error:
            print(f"imgsvc: {result.reference}: {result.error}", file=sys.stderr)


def _show_status(arguments: argparse.Namespace) -> int:
    from imgsvc.api import imagetools_pb2

    with connect(arguments) as daemon:
        status = json.loads(daemon.tools.Prepull(imagetools_pb2.PrepullRequest(now=arguments.now)).json)
    broken = [entry for entry in status["files"] if entry["error"]]
    if arguments.json:
        print_json(status)
        return 1 if broken else 0
    rows = [
        (image["reference"], _state(image), "yes" if image["pin"] else "", entry["file"], _when(image["nextTry"]))
        for entry in status["files"]
        for image in entry["images"]
    ]
    print_table(("IMAGE", "STATE", "PINNED", "FILE", "NEXT LOOK"), rows)
    for entry in status["files"]:
        for image in entry["images"]:
            if image["error"]:
                print(f"imgsvc: {image['reference']}: {image['error']}", file=sys.stderr)
    for entry in broken:
        print(f"imgsvc: {entry['error']}", file=sys.stderr)
    return 1 if broken else 0


def _state(image: dict[str, Any]) -> str:
    return f"{image['state']}: {image['waitsFor']}" if image["waitsFor"] else str(image["state"])


def _when(at: float | None) -> str:
    if at is None:
        return ""
    return "now" if at <= time.time() else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
