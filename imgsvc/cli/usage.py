"""What is typed: arguments are checked before anything is done with them. What cannot be right is exit code 2, in one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from imgsvc.base import places
from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.base.numerals import whole_number

if TYPE_CHECKING:
    from imgsvc.base.reference import Reference

T = TypeVar("T")
_MAX_COUNT: Final = 10**6
_SHOWN: Final = re.compile("[a-z-]{1,20}")  # a mistyped word of ours


class WrongUsage(InvalidArgument):
    """Arguments that do not go together, or cannot be meant. Exit code 2."""


class Parser(argparse.ArgumentParser):
    """Complains in one line, which repeats nothing that may be a password in the wrong place."""

    def parsed(self, argv: Sequence[str]) -> argparse.Namespace:
        """As parse_args."""
        known, more = self.parse_known_args(argv)
        if more:
            options = [text.partition("=")[0] for text in more if text.startswith("-")]
            what = f"there is no option {', '.join(options)}" if options else "there are more arguments than it takes"
            self.error(f"{what} (not all is shown, it may be secret)")
        return known

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices and not _SHOWN.fullmatch(str(value)):
            raise argparse.ArgumentError(action, f"choose from {', '.join(map(str, action.choices))}")
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        """See ArgumentParser."""
        self.exit(2, f"imgsvc: {message}; see `{self.prog} --help`\n")


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """An argparse type whose complaint is that of `parse`."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except InvalidArgument as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option of every command that reads the configuration itself; it may also stand before the command."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,  # keeps what stood before the command
        help=f"the daemon's configuration file (default: {places.CONFIG_FILE}, if it is there)",
    )
    parser.set_defaults(takes_config=True)


# The parsers of names are imported when something is parsed: most commands are asked for without one.
def _reference(text: str) -> Reference:
    from imgsvc.base.reference import Reference

    return Reference.parse(text)


def _image(text: str) -> str:
    from imgsvc.base.reference import Reference, may_be_id

    if not may_be_id(text):
        Reference.parse(text)
    return text


def _repository(text: str) -> str:
    """Normalised, and without a tag that the user did not type."""
    from imgsvc.base.reference import Reference

    reference = Reference.parse(text)
    return str(reference) if reference.digest or text.rpartition("/")[2].count(":") else reference.name


def _platform(text: str) -> str:
    from imgsvc.base.oci import Platform

    return str(Platform.parse(text)) if text else ""  # the default


def _credentials(text: str) -> tuple[str, str]:
    username, colon, password = text.partition(":")
    if not username or not colon:
        raise InvalidArgument("credentials are USER:PASSWORD")
    return username, password


def count(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def read(text: str) -> int:
        number = whole_number(text, _MAX_COUNT)
        if number is None or not least <= number <= _MAX_COUNT:
            raise argparse.ArgumentTypeError(f'"{printable(text, 40)}" is not a number from {least} to {_MAX_COUNT}')
        return number

    return read


reference = _checked(_reference)  # an image's name, normalised
image = _checked(_image)  # a name, or an ID or its beginning, as it was typed
repository = _checked(_repository)  # a repository, normalised; or a whole name
platform = _checked(_platform)
credentials = _checked(_credentials)
