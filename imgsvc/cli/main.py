"""Parser and entry point of the `imgsvc` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from imgsvc import __version__
from imgsvc.cli import archives, config, events, images, prepull, registry, serve, store
from imgsvc.cli.usage import Parser, WrongUsage
from imgsvc.errors import ImgsvcError, from_os_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    try:
        arguments = build_parser().parse_args(argv)
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()  # what cannot be written is said here, and not by Python on its way out
        return code
    except WrongUsage as error:
        return _complain(error, 2)
    except ImgsvcError as error:
        return _complain(error, 1)
    except BrokenPipeError:
        _no_output()  # the reader (head, less) left; what it wanted it has
        return 0
    except OSError as error:
        _no_output()
        return _complain(from_os_error(error, "writing the output"), 1)
    except KeyboardInterrupt:
        return 130


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="imgsvc", description="Image service of a Kubernetes node.")
    parser.add_argument("--version", action="version", version=f"imgsvc {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (serve, images, archives, prepull, registry, store, events, config):
        group.add_commands(commands)
    return parser


def _no_output() -> None:
    """Python would complain once more at exit about what it still has to write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: ImgsvcError, code: int) -> int:
    print(f"imgsvc: {error}", file=sys.stderr)
    return code
