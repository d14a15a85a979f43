"""Dataclasses to and from JSON objects and protobuf messages, driven by the dataclass's own type hints.

Knows: bool, int, str, bytes, IntEnum, `T | None`, tuple[T, ...], Mapping[str, str], Path-free nested dataclasses.
JSON: members that equal their default are left out; unknown members are ignored, missing ones take their default, so
that a record survives one version up and down. Protobuf: fields are matched by name; messages that only wrap a `value`
(Int64Value) are plain optional numbers here.
"""

from __future__ import annotations

import base64
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def _cached_hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _hints(cls: type) -> dict[str, Any]:
    return _cached_hints(typing.cast("Hashable", cls))


def _default(spec: Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return spec.default


@cache
def _members(cls: Hashable) -> tuple[tuple[str, Any], ...]:
    """Names of a dataclass's members and what they are by default; to compare with, not to hand out."""
    return tuple((spec.name, _default(spec)) for spec in fields(typing.cast("Any", cls)))


def _inner(hint: Any) -> tuple[Any, bool]:
    """The type inside `T | None`, and whether None was allowed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None)), True
    return hint, False


def to_json(value: Any) -> Any:
    """A JSON value for a dataclass instance."""
    if is_dataclass(value):
        named = ((name, getattr(value, name), default) for name, default in _members(typing.cast("Hashable", type(value))))
        return {name: to_json(v) for name, v, default in named if v != default}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return int(value) if isinstance(value, IntEnum) else value


def from_json(cls: type[T], record: Mapping[str, Any]) -> T:
    """The dataclass instance a JSON object describes. Raises: KeyError, TypeError, ValueError on a broken record."""
    hints = _hints(cls)
    return cls(**{f.name: _from_json(hints[f.name], record[f.name]) for f in fields(cls) if f.name in record})  # type: ignore[arg-type]


def _from_json(hint: Any, value: Any) -> Any:
    hint, _ = _inner(hint)
    if value is None:
        return None
    if is_dataclass(hint):
        return from_json(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        return tuple(_from_json(typing.get_args(hint)[0], item) for item in value)
    if hint is bytes:
        return base64.b64decode(value)
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return hint(value)
    return value


def from_proto(cls: type[T], message: Any) -> T:
    """The dataclass instance for a protobuf message. Raises: ValueError for an enum number we do not know."""
    hints = _hints(cls)
    return cls(**{f.name: _from_proto(hints[f.name], message, f.name) for f in fields(cls)})  # type: ignore[arg-type]


def _from_proto(hint: Any, message: Any, name: str) -> Any:
    hint, optional = _inner(hint)
    value = getattr(message, name)
    if optional and not message.HasField(name):
        return None
    if is_dataclass(hint):
        return from_proto(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(from_proto(typing.cast("type", item), v) for v in value) if is_dataclass(item) else tuple(value)
    if optional:
        return value.value
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return hint(value)
    return dict(value) if isinstance(value, Mapping) or hasattr(value, "items") else value


def fill_proto(message: Any, value: Any) -> Any:
    """Copy a dataclass instance into a protobuf message of the same shape, and return the message."""
    for spec in fields(value):
        item = getattr(value, spec.name)
        if item is None:
            continue
        target = getattr(message, spec.name)
        if is_dataclass(item):
            target.SetInParent()
            fill_proto(target, item)
        elif isinstance(item, tuple):
            for entry in item:
                if is_dataclass(entry):
                    fill_proto(target.add(), entry)
                else:
                    target.append(entry)
        elif isinstance(item, Mapping):
            target.update(item)
        elif hasattr(target, "SetInParent"):
            target.SetInParent()
            target.value = item
        else:
            setattr(message, spec.name, int(item) if isinstance(item, IntEnum) else item)
    return message
