"""From a Config to TOML that reads back, with the origin of every value where wanted."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Final

from imgsvc.config.schema import Config, Raw


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """Every key with its value, dotted, in file order; tables whose keys are free stay whole."""
    yield from _flatten(config, ())


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """The configuration as TOML that `load` reads back; with `origins`, each value says where it came from."""
    lines: list[str] = []
    _emit(config, (), lines, origins)
    return "\n".join(lines) + "\n"


def to_json(config: Config, origins: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Dotted key → {"value", "origin"}; secrets in foreign tables are left out, durations are seconds."""
    return {key: {"value": _redacted(key, value), "origin": origins.get(key, "default")} for key, value in flatten(config)}


def table_to_toml(values: Raw, at: tuple[str, ...] = ()) -> str:
    """Nested tables as TOML, plain keys before tables, nothing redacted."""
    lines = [f"{_toml_key(key)} = {_toml_value(value)}\n" for key, value in values.items() if not isinstance(value, dict)]
    header = f"\n[{'.'.join(map(_toml_key, at))}]\n" if at and (lines or not values) else ""
    tables = [table_to_toml(value, (*at, key)) for key, value in values.items() if isinstance(value, dict)]
    return header + "".join(lines) + "".join(tables)


def _flatten(section: object, at: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(section):  # type: ignore[arg-type]  # sections are dataclasses
        value = getattr(section, f.name)
        here = (*at, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flatten(value, here)
        elif isinstance(value, dict) and value and all(dataclasses.is_dataclass(v) for v in value.values()):
            for key, entry in value.items():
                yield from _flatten(entry, (*here, key))
        else:
            yield ".".join(here), value


def _emit(section: object, at: tuple[str, ...], lines: list[str], origins: Mapping[str, str] | None) -> None:
    tables: list[tuple[tuple[str, ...], object]] = []
    if at:
        lines += ["", "[" + ".".join(_toml_key(k) for k in at) + "]"]
    for f in dataclasses.fields(section):  # type: ignore[arg-type]  # sections are dataclasses
        value = getattr(section, f.name)
        here = (*at, f.name)
        if dataclasses.is_dataclass(value):
            tables.append((here, value))
        elif isinstance(value, dict):
            tables += [((*here, key), entry) for key, entry in value.items() if dataclasses.is_dataclass(entry)]
            if value and not any(dataclasses.is_dataclass(v) for v in value.values()):
                tables.append((here, types.MappingProxyType(value)))
        else:
            note = f"  # {origins.get('.'.join(here), 'default')}" if origins is not None else ""
            lines.append(f"{f.name} = {_toml_value(value)}{note}")
    for here, table in tables:
        if isinstance(table, types.MappingProxyType):
            lines += ["", "[" + ".".join(_toml_key(k) for k in here) + "]"]
            lines += [f"{_toml_key(k)} = {_toml_value(_redacted(k, v))}" for k, v in table.items()]
        else:
            _emit(table, here, lines, origins)


_SECRET_KEYS: Final = frozenset({"password", "auth", "identitytoken", "identity_token", "registrytoken", "authorization"})


def _redacted(key: str, value: object) -> object:
    """Foreign tables may carry secrets (legacy registry.configs.*.auth); a dump never does."""
    if isinstance(value, Mapping):
        return {k: _redacted(k, v) for k, v in value.items()}
    return "REDACTED" if key.lower() in _SECRET_KEYS else value


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _toml_string(f"{value:g}s")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    raise TypeError(f"no TOML for {type(value).__name__}")
