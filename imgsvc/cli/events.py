"""events: what happens to images, as it happens."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from imgsvc.cli.client import add_address, connect


def events_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc events`."""
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    add_address(parser)
    parser.set_defaults(run=run_events)


def run_events(arguments: argparse.Namespace) -> int:
    """`imgsvc events`."""
    from imgsvc.api import imagetools_pb2

    with connect(arguments) as daemon:
        for event in daemon.tools.Events(imagetools_pb2.EventsRequest()):
            print(event.json if arguments.json else _line(json.loads(event.json)), flush=True)
    return 0


def _line(event: dict[str, Any]) -> str:
    details = {key: value for key, value in event.items() if key not in ("time", "event", "subject")}
    shown = " ".join(f"{key}={value}" for key, value in details.items() if value not in ("", [], {}))
    return f"{time.strftime('%H:%M:%S', time.localtime(event['time']))} {event['event']} {event['subject']} {shown}".rstrip()
