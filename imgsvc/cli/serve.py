"""The daemon's command."""

from __future__ import annotations

import argparse
import os

from imgsvc import config
from imgsvc.base import failpoints
from imgsvc.cli.usage import add_config


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc serve`."""
    add_config(parser)
    parser.add_argument("--root", metavar="DIR", help="directory for data that must survive a reboot")
    parser.add_argument("--state", metavar="DIR", help="directory for state that a reboot clears")
    parser.add_argument("--address", metavar="unix:///…", default=argparse.SUPPRESS, help="where to listen")
    parser.add_argument("--log-level", choices=config.LOG_LEVELS, help="lowest level that is logged; default: that of [debug], else info")
    parser.set_defaults(run=run_serve, takes_address=True)


def run_serve(arguments: argparse.Namespace) -> int:
    """`imgsvc serve`. Paths are made absolute, so that origins are right in every client's working directory."""
    from imgsvc.daemon import logs
    from imgsvc.daemon.main import run
    from imgsvc.daemon.settings import decrypt

    failpoints.arm(os.environ.get(failpoints.ENV, ""))
    address = arguments.address and (f"unix://{arguments.address}" if arguments.address.startswith("/") else arguments.address)
    given = {
        "root": ("--root", arguments.root and os.path.abspath(arguments.root)),
        "state": ("--state", arguments.state and os.path.abspath(arguments.state)),
        "grpc.address": ("--address", address),
        "debug.level": ("--log-level", arguments.log_level),
    }
    flags = {key: (option, value) for key, (option, value) in given.items() if value}
    path = arguments.config and arguments.config.absolute()

    def load() -> config.Loaded:
        return decrypt.check(config.load(path, flags))

    debug = load().config.debug
    logs.start(debug.level, debug.format)
    return run(load)
