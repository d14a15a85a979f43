"""Parser and entry point of the `imgsvc` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from imgsvc import __version__
from imgsvc.cli import archives, config, events, images, prepull, registry, serve, store
from imgsvc.errors import ImgsvcError, InvalidArgument


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except InvalidArgument as error:
        return _complain(error, 2 if getattr(error, "usage", False) else 1)
    except ImgsvcError as error:
        return _complain(error, 1)
    except BrokenPipeError:
        # The reader (head, less) left; what it wanted it has. Python would complain again at exit without this.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="imgsvc", description="Image service of a Kubernetes node.")
    parser.add_argument("--version", action="version", version=f"imgsvc {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (serve, images, archives, prepull, registry, store, events, config):
        group.add_commands(commands)
    return parser


def _complain(error: ImgsvcError, code: int) -> int:
    print(f"imgsvc: {error}", file=sys.stderr)
    return code
