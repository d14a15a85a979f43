"""The daemon's command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from imgsvc import config, decryption, failpoints


def add_commands(commands: Any) -> None:
    """Add this module's commands."""
    parser = commands.add_parser("serve", help="run the daemon in the foreground")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_PATH}, if it is there")
    parser.add_argument("--root", metavar="DIR", help="what must survive a reboot")
    parser.add_argument("--state", metavar="DIR", help="what dies with a reboot")
    parser.add_argument("--address", metavar="unix:///…", help="where to listen")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.set_defaults(run=run_serve)


def run_serve(arguments: argparse.Namespace) -> int:
    """`imgsvc serve`."""
    from imgsvc import server

    logging.basicConfig(stream=sys.stderr, level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # One line per HTTP request, with its URL (and so with signed queries), is not for our log.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    failpoints.arm(os.environ.get(failpoints.ENV, ""))
    given = {"root": arguments.root, "state": arguments.state, "grpc.address": arguments.address}
    flags = {key: value for key, value in given.items() if value}
    return server.run(lambda: decryption.check(config.load(arguments.config, flags)))
