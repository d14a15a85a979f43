"""config default|dump|check|import."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from imgsvc import config
from imgsvc.base.errors import from_os_error
from imgsvc.base.fsutil import write_atomic
from imgsvc.cli.client import add_address, connect
from imgsvc.cli.output import print_json, warn
from imgsvc.cli.usage import WrongUsage


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc config`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    default = actions.add_parser("default", help="print the embedded defaults")
    default.set_defaults(run=run_default)
    dump = actions.add_parser("dump", help="print what a daemon would run with, each value with its origin")
    dump.add_argument("file", nargs="?", type=Path, metavar="FILE", help="read this file instead of the default one")
    dump.add_argument("--running", action="store_true", help="ask the running daemon instead")
    dump.add_argument("--json", action="store_true", help="keys with value and origin")
    add_address(dump)
    dump.set_defaults(run=run_dump)
    check = actions.add_parser("check", help="say whether a configuration is good, with the files it refers to")
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="read this file instead of the default one")
    check.set_defaults(run=run_check)
    convert = actions.add_parser("import", help="turn a containerd configuration into ours, naming every key that is not carried over")
    convert.add_argument("file", type=Path, metavar="FILE", help="containerd's config.toml, version 2 or newer")
    convert.add_argument("--output", type=Path, metavar="F", help="write there instead of printing; readable by its owner only")
    convert.add_argument("--json", action="store_true", help="print the outcome of every key instead")
    convert.set_defaults(run=run_import)


def run_default(arguments: argparse.Namespace) -> int:
    """`imgsvc config default`."""
    print(config.to_toml(config.Config()), end="")
    return 0


def run_dump(arguments: argparse.Namespace) -> int:
    """`imgsvc config dump`."""
    if arguments.running:
        if arguments.file:
            raise WrongUsage("--running is about the daemon's configuration", hint="leave out FILE")
        from imgsvc.api import admin_pb2

        with connect(arguments) as daemon:
            reply = daemon.admin.Config(admin_pb2.ConfigRequest())
        if arguments.json:
            print_json(json.loads(reply.json))
        else:
            print(reply.toml, end="")
        return 0
    loaded = config.load(arguments.file)
    if arguments.json:
        print_json(config.to_json(loaded.config, loaded.origins))
    else:
        print(config.to_toml(loaded.config, loaded.origins), end="")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """`imgsvc config check`: with all files that the configuration refers to; 1 when something will not work."""
    from imgsvc.daemon import preflight

    loaded = config.load(arguments.file)
    found = preflight.inspect(loaded)
    for problem in found.problems:
        warn(problem)
    for warning in found.warnings:
        warn(f"warning: {warning}")
    if found.problems:
        return 1
    print(f"good: {', '.join(loaded.files)}" if loaded.files else "good: embedded defaults, no file")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """`imgsvc config import`: 1 when a key was refused; the result is written anyway."""
    from imgsvc.config.containerd import import_file
    from imgsvc.registry.hosts.legacy import parse_legacy

    imported = import_file(arguments.file, lambda tables: parse_legacy(tables, "registry"))
    if arguments.output:
        try:
            write_atomic(arguments.output, imported.toml.encode())
        except OSError as error:
            raise from_os_error(error, "writing the configuration", where=str(arguments.output)) from error
    if arguments.json:
        print_json([{"key": f.key, "where": f.where, "outcome": f.outcome, "note": f.note} for f in imported.findings])
    elif not arguments.output:
        print(imported.toml, end="")
    for finding in imported.refused:
        print(f"imgsvc: {finding.where}: {finding.key} refused: {finding.note}", file=sys.stderr)
    return 1 if imported.refused else 0
