"""Parser and entry point of the `imgsvc` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from imgsvc import __version__
from imgsvc.base.errors import ImgsvcError, from_os_error
from imgsvc.cli.usage import Parser, WrongUsage


class Command(NamedTuple):
    """One command: what `--help` says of it, and `module:function`, which adds its arguments to a parser."""

    help: str
    arguments: str

    def fill(self, parser: Parser) -> None:
        """Import the command's module and add its arguments."""
        module, _, function = self.arguments.partition(":")
        getattr(importlib.import_module(f"imgsvc.cli.{module}"), function)(parser)


# Only the module of the command that is run is imported: starting Python costs less than all of them.
COMMANDS: Final[Mapping[str, Command]] = {
    "serve": Command("run the daemon in the foreground", "serve:serve_arguments"),
    "pull": Command("pull and unpack images", "images:pull_arguments"),
    "push": Command("upload an image under one of its names", "images:push_arguments"),
    "images": Command("list images", "images:images_arguments"),
    "inspect": Command("show everything known about an image, as JSON", "images:inspect_arguments"),
    "rmi": Command("remove images", "images:remove_arguments"),
    "tag": Command("add a name to an image", "images:tag_arguments"),
    "mount": Command("show an image's files, read-only, in an empty directory", "images:mount_arguments"),
    "unmount": Command("unmount an image", "images:unmount_arguments"),
    "export": Command("write images to a file that imgsvc, Docker, Podman, containerd and skopeo read", "archives:export_arguments"),
    "import": Command("read images from an OCI layout or a Docker archive", "archives:import_arguments"),
    "prepull": Command(
        "pull many images ahead of use; --status shows the progress of the daemon's pre-pull files", "prepull:prepull_arguments"
    ),
    "hosts": Command("registries and their mirrors", "registry:hosts_arguments"),
    "df": Command("disk use by image, shared and unique bytes", "store:df_arguments"),
    "gc": Command("collect garbage now", "store:gc_arguments"),
    "fsck": Command("check the store", "store:fsck_arguments"),
    "events": Command("print what happens to images, until interrupted", "events:events_arguments"),
    "config": Command("the daemon's configuration", "config:config_arguments"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace: `run` is what to call with it. Raises: WrongUsage; SystemExit (2, help, version)."""
    parser = Parser(prog="imgsvc", description="Image service of a Kubernetes node.")
    parser.add_argument("--version", action="version", version=f"imgsvc {__version__}")
    parser.add_argument("--address", metavar="unix:///…", help="the daemon's socket, for every command that talks to it")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the daemon's configuration, for every command that reads it")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help)
        if name in argv:
            command.fill(one)
    arguments = parser.parsed(argv)
    for option in ("address", "config"):
        if getattr(arguments, option) is not None and not getattr(arguments, f"takes_{option}", False):
            raise WrongUsage(f"`imgsvc {arguments.command}` takes no --{option}", hint=f"see `imgsvc {arguments.command} --help`")
    return arguments


def _no_output() -> None:
    """Python would complain once more at exit about what it still has to write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: ImgsvcError, code: int) -> int:
    print(f"imgsvc: {error}", file=sys.stderr)
    return code
