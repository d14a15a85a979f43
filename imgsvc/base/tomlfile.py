"""Strict TOML with positions: every complaint about a configuration file names file:line:column.

tomllib does the parsing; a small scanner walks the text it accepted and remembers where each key stands, which tomllib
does not tell. Shared by the daemon's configuration and hosts.toml.

Source: TOML 1.0.0; Go time.ParseDuration for durations.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from imgsvc.base.errors import InvalidArgument, from_os_error, printable

MAX_FILE: Final = 1024**2  # [bytes] a configuration file; real ones stay below 100 KiB

T = TypeVar("T")
KeyPath = tuple[str | int, ...]  # table keys, and indexes into arrays

_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_TYPE_NAMES: Final = {str: "a string", int: "an integer", bool: "true or false", float: "a number", list: "a list", dict: "a table"}
_DURATION_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file. `data` keeps the file's order; `positions` maps key paths to (line, column), both from 1."""

    name: str
    data: dict[str, Any]
    positions: Mapping[KeyPath, tuple[int, int]]

    def where(self, *keys: str | int) -> str:
        """`file:line:column` of a key, or of its nearest ancestor that is written in the file; the file alone without keys."""
        for length in range(len(keys), 0, -1):
            if position := self.positions.get(keys[:length]):
                return f"{self.name}:{position[0]}:{position[1]}"
        return self.name

    def error(self, what: str, *keys: str | int, hint: str = "") -> InvalidArgument:
        """The error to raise about one key."""
        return InvalidArgument(what, where=self.where(*keys), hint=hint)

    def get(self, *keys: str | int) -> Any:
        """The value at a key path, or None where the path ends early."""
        value: Any = self.data
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def typed(self, kind: type[T], *keys: str | int) -> T | None:
        """The value at a key path if it is a `kind`, None when absent. Raises: InvalidArgument for another type."""
        value = self.get(*keys)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted, given = _TYPE_NAMES.get(kind, kind.__name__), _TYPE_NAMES.get(type(value), type(value).__name__)
            raise self.error(f"{dotted(keys)} is {given}, expected {wanted}", *keys)
        return value

    def strings(self, *keys: str | int) -> list[str]:
        """A string or a list of strings, as a list; [] when absent. Raises: InvalidArgument for anything else."""
        value = self.get(*keys)
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{dotted(keys)} must be a string or a list of strings", *keys)
        return list(value)

    def duration(self, *keys: str | int) -> float | None:
        """A Go duration string such as "1m30s" [seconds], None when absent. Raises: InvalidArgument."""
        text = self.typed(str, *keys)
        if text is None:
            return None
        try:
            return parse_duration(text)
        except InvalidArgument as error:
            raise self.error(f"{dotted(keys)}: {error.what}", *keys, hint=error.hint) from error

    def check_keys(self, known: Iterable[str], *table: str | int) -> None:
        """Refuse keys of one table (the root without `table`) that are not in `known`. Raises: InvalidArgument."""
        value = self.get(*table) if table else self.data
        allowed = list(known)
        for key in value or {}:
            if key not in allowed:
                what = f'unknown key "{printable(key, 80)}"' + (f" in {dotted(table)}" if table else "")
                raise self.error(what, *table, key, hint=suggestion(key, allowed))


def load(path: Path | str) -> Document:
    """Read and parse a file. Blocking. Raises: NotFound, PermissionDenied, … (by errno); InvalidArgument with its position."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InvalidArgument("not a regular file", where=str(path))
        # Non-blocking, so that a pipe put there in between cannot hold us.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            raw = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise from_os_error(error, "reading configuration", where=str(path)) from error
    if len(raw) > MAX_FILE:
        raise InvalidArgument(f"larger than {MAX_FILE} bytes", where=str(path), hint="this is not a configuration file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = _line_column(raw[: error.start].decode("utf-8"), error.start)
        raise InvalidArgument("not UTF-8 text", where=f"{path}:{line}:{column}") from error
    return loads(text, str(path))


def loads(text: str, name: str) -> Document:
    """Parse text; `name` is the file's name in positions. Raises: InvalidArgument with the position."""
    # tomllib counts lines after this replacement too, so that its positions and the scanner's agree.
    text = text.replace("\r\n", "\n")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text, name) from error
    except (RecursionError, ValueError) as error:  # hostile nesting; an integer too long to convert
        raise InvalidArgument("nested too deeply or a number is too long", where=name) from error
    offsets = _Scanner(text).run()
    return Document(name, data, {path: _line_column(text, offset) for path, offset in offsets.items()})


def suggestion(key: str, known: Iterable[str]) -> str:
    """The hint for an unknown key: the nearest known one, else all of them."""
    allowed = list(known)
    simplified = {k.replace("-", "_").lower(): k for k in allowed}
    wanted = key.replace("-", "_").lower()
    near = [wanted] if wanted in simplified else difflib.get_close_matches(wanted, simplified, n=1, cutoff=0.6)
    if near:
        return f'did you mean "{simplified[near[0]]}"?'
    return "known keys: " + ", ".join(allowed)


def dotted(keys: Iterable[str | int]) -> str:
    """A key path as TOML writes it; indexes in brackets."""
    out = ""
    for key in keys:
        if isinstance(key, int):
            out += f"[{key}]"
            continue
        quoted = key if re.fullmatch(r"[A-Za-z0-9_-]+", key, re.ASCII) else f'"{printable(key, 120)}"'
        out += f".{quoted}" if out else quoted
    return out


def parse_duration(text: str) -> float:
    """A Go duration ("300ms", "1m30s", "0") in seconds. Raises: InvalidArgument; negative ones are refused too."""
    if text == "0":
        return 0.0
    total, position = 0.0, 0
    while match := _DURATION_PART.match(text, position):
        total += float(match[1]) * _DURATION_UNITS[match[2]]
        position = match.end()
    if not text or position != len(text):
        raise InvalidArgument(f'invalid duration "{printable(text, 40)}"', hint='write a number and a unit, e.g. "30s" or "1m30s"')
    return total


def _syntax_error(message: str, text: str, name: str) -> InvalidArgument:
    found = _POSITION.search(message)
    line, column = (int(found[1]), int(found[2])) if found and found[1] else _line_column(text, len(text.rstrip()))
    return InvalidArgument(f"not valid TOML: {printable(_POSITION.sub('', message), 160)}", where=f"{name}:{line}:{column}")


def _line_column(text: str, offset: int) -> tuple[int, int]:
    before = text[:offset]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


_BLANK = re.compile(r"[ \t]*")
_FILL = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_SCALAR = re.compile(r"[^,\]}\n#]*")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")|'  # up to two quotes may stand before the closing three
    r"'''.*?'{3,5}(?!')|"
    r'"(?:[^"\\\n]|\\.)*"|'
    r"'[^'\n]*'",
    re.DOTALL,
)


class _Scanner:
    """Walks text that tomllib accepted, so it needs no error handling, and notes the offset of every key and element."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._table: KeyPath = ()
        self._array_lengths: dict[KeyPath, int] = {}
        self._offsets: dict[KeyPath, int] = {}

    def run(self) -> dict[KeyPath, int]:
        """Key path → offset into the text."""
        self._take(_FILL)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                self._header()
            else:
                self._pair(self._table)
            self._take(_FILL)
        return self._offsets

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise InvalidArgument("unexpected text", where=f"offset {self._at}")
        self._at = match.end()
        return match[0]

    def _header(self) -> None:
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        *parents, (last, offset) = self._keys()
        path: KeyPath = ()
        for key, parent_offset in parents:
            path = self._enter((*path, key), parent_offset)
        path = (*path, last)
        if is_array:
            self._offsets.setdefault(path, offset)
            index = self._array_lengths.get(path, 0)
            self._array_lengths[path] = index + 1
            path = (*path, index)
        self._offsets[path] = offset
        self._table = path
        self._at += 2 if is_array else 1

    def _enter(self, path: KeyPath, offset: int) -> KeyPath:
        """A header names an array of tables without index: it means the array's last element."""
        self._offsets.setdefault(path, offset)
        length = self._array_lengths.get(path, 0)
        return (*path, length - 1) if length else path

    def _pair(self, table: KeyPath) -> None:
        path = table
        for key, offset in self._keys():
            path = (*path, key)
            self._offsets.setdefault(path, offset)
        self._at += 1  # "="
        self._value(path)

    def _keys(self) -> list[tuple[str, int]]:
        """A dotted key as [(part, offset)]; stops at what follows it."""
        keys = []
        while True:
            self._take(_BLANK)
            start = self._at
            quoted = self._text[start] in "\"'"
            raw = self._take(_STRING if quoted else _BARE_KEY)
            keys.append((tomllib.loads(f"k = {raw}")["k"] if quoted else raw, start))
            self._take(_BLANK)
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        self._take(_BLANK)
        first = self._text[self._at]
        if first in "\"'":
            self._take(_STRING)
        elif first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._take(_SCALAR)

    def _array(self, path: KeyPath) -> None:
        self._at += 1
        index = 0
        while True:
            self._take(_FILL)
            if self._text[self._at] == "]":
                break
            self._offsets[(*path, index)] = self._at
            self._value((*path, index))
            index += 1
            self._take(_FILL)
            if self._text[self._at] == ",":
                self._at += 1
        self._at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self._at += 1
        while True:
            self._take(_FILL)
            if self._text[self._at] == "}":
                break
            self._pair(path)
            self._take(_FILL)
            if self._text[self._at] == ",":
                self._at += 1
        self._at += 1
