"""YAML that others write: the kubelet's files, CDI specifications, key files of tokens. Complaints name file:line:column."""

from __future__ import annotations

from typing import Any

from imgsvc.base.errors import InvalidArgument, printable


def loads(text: bytes, name: str) -> Any:
    """One document of plain data; nothing in it makes an object of another kind. Raises: InvalidArgument; it quotes no line."""
    import yaml  # most daemons never need it

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InvalidArgument(f"not valid YAML: {printable(error.problem or '', 160)}", where=where) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidArgument("not valid YAML", where=name) from error
