"""The part of Go's text/template that CNI configuration templates use.

``{{.Name}}``, ``{{range $i, $v := .Names}} … {{$v}} … {{if $i}} … {{end}} … {{end}}``. Anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from imgsvc.base.errors import InvalidArgument, printable

Value = str | int | Sequence[str]

_ACTION: Final = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
_RANGE: Final = re.compile(r"range\s+(?:(\$\w+)\s*,\s*)?(\$\w+)\s*:=\s*\.(\w+)")
_IF: Final = re.compile(r"if\s+([.$]\w+)")
_NAME: Final = re.compile(r"[.$]\w+")


def render(template: str, values: Mapping[str, Value]) -> str:
    """The text of a template. Raises: InvalidArgument for an action outside the subset, an unknown name, a missing end."""
    tokens = _ACTION.split(template)  # text, action, text, action, … text
    scope: dict[str, Value] = {f".{name}": value for name, value in values.items()}
    out, position = _block(tokens, 0, scope, nested=False)
    if position < len(tokens):
        raise InvalidArgument("{{end}} without a beginning", where="conf_template")
    return out


def _block(tokens: Sequence[str], position: int, scope: Mapping[str, Value], *, nested: bool) -> tuple[str, int]:
    """Render from a text token on; returns the text and the position after the block's {{end}}."""
    out = []
    while position < len(tokens):
        out.append(tokens[position])
        if position + 1 >= len(tokens):
            break
        action = tokens[position + 1]
        position += 2
        if action == "end":
            return "".join(out), position
        if loop := _RANGE.fullmatch(action):
            text, position = _repeat(tokens, position, scope, loop)
            out.append(text)
        elif condition := _IF.fullmatch(action):
            text, position = _block(tokens, position, scope, nested=True)
            out.append(text if _lookup(scope, condition[1]) else "")
        else:
            out.append(str(_lookup(scope, action)))
    if nested:
        raise InvalidArgument("{{end}} is missing", where="conf_template")
    return "".join(out), len(tokens)


def _repeat(tokens: Sequence[str], position: int, scope: Mapping[str, Value], loop: re.Match[str]) -> tuple[str, int]:
    items = _lookup(scope, f".{loop[3]}")
    if isinstance(items, (str, int)):
        raise InvalidArgument(f".{loop[3]} is not a list", where="conf_template")
    out = []
    end = position
    for inner in _scopes(scope, loop, items or [""]):
        text, end = _block(tokens, position, inner, nested=True)
        out.append(text)
    return "".join(out) if items else "", end


def _scopes(scope: Mapping[str, Value], loop: re.Match[str], items: Sequence[str]) -> Iterator[dict[str, Value]]:
    for number, item in enumerate(items):
        inner = {**scope, loop[2]: item}
        if loop[1]:
            inner[loop[1]] = number
        yield inner


def _lookup(scope: Mapping[str, Value], name: str) -> Value:
    if not _NAME.fullmatch(name) or name not in scope:
        raise InvalidArgument(f'"{printable(name, 80)}" is not known here', where="conf_template", hint="see the comment in gotemplate.py")
    return scope[name]
