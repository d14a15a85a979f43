"""From TOML files and flags to a checked Config; one generic reader does all checking, so a new key is a new field."""

from __future__ import annotations

import dataclasses
import glob
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from imgsvc.base import places, tomlfile
from imgsvc.base.errors import InvalidArgument, NotFound, printable
from imgsvc.config.schema import LOG_LEVELS, REFUSED, SNAPSHOTTERS, VERSION, Config, Duration, Raw


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration with the origin of every value that is not a default: "a.b.c" → "file:line:column" or "--flag"."""

    config: Config
    origins: Mapping[str, str]
    files: tuple[str, ...] = ()  # that were read, in order of weight, the heaviest last

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from."""
        return self.origins.get(key, "default")


def load(path: Path | None, flags: Mapping[str, tuple[str, str]] | None = None) -> Loaded:
    """Read the configuration.

    Args:
        path: the file; None for the usual one (places.CONFIG_FILE), which alone may be absent.
        flags: dotted keys set on the command line, with the option's name and the value; they beat the files.
    Raises: InvalidArgument with file:line:column and the way out; NotFound when a named file does not exist.
    """
    values: Raw = {}
    origins: dict[str, str] = {}
    files: list[str] = []
    source = path or Path(places.CONFIG_FILE)
    if path is not None or source.exists():
        document = tomlfile.load(source)
        files.append(str(source))
        _merge(values, document.data, document, (), origins)
    imports = values.get("imports", Config().imports)
    if not isinstance(imports, list | tuple) or not all(isinstance(i, str) for i in imports):
        raise InvalidArgument("imports must be a list of paths", where=origins.get("imports", str(source)))
    for name in _imported(imports, source.parent, origins.get("imports", str(source))):
        document = tomlfile.load(name)
        if "imports" in document.data:
            raise InvalidArgument("a drop-in cannot import", where=document.where("imports"), hint="list it in the main file")
        files.append(str(name))
        _merge(values, document.data, document, (), origins)
    for key, (option, text) in (flags or {}).items():
        _set(values, key.split("."), text)
        origins[key] = option
    if os.geteuid() != 0:
        for key, directory in zip(("root", "state"), places.directories(), strict=True):
            if values.setdefault(key, directory) is directory:
                origins[key] = "default of a user other than root"
    config = _section(Config, values, (), origins)
    _check(config, origins)
    return Loaded(config, origins, tuple(files))


def parse(text: str, name: str) -> Loaded:
    """A configuration from text alone, without imports. `name` is the file's name in errors. Raises: InvalidArgument."""
    document = tomlfile.loads(text, name)
    values: Raw = {}
    origins: dict[str, str] = {}
    _merge(values, document.data, document, (), origins)
    config = _section(Config, values, (), origins)
    _check(config, origins)
    return Loaded(config, origins)


def parse_duration(value: object, where: str) -> float:
    """Go's "1h2m3.5s", or a plain number of seconds, as seconds. Raises: InvalidArgument."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    try:
        return tomlfile.parse_duration(value if isinstance(value, str) else repr(value))
    except InvalidArgument as error:
        raise InvalidArgument(error.what, where=where, hint=error.hint) from error


def _imported(patterns: typing.Iterable[str], base: Path, where: str) -> list[Path]:
    """Files in the order of the patterns, those of one pattern by name, each once. Raises: NotFound for a missing file that is named without a pattern."""
    found: list[Path] = []
    for pattern in patterns:
        names = sorted(Path(name) for name in glob.glob(str(base / pattern)))
        if not names and not glob.has_magic(pattern):
            raise NotFound(
                f"imports: no such file: {base / pattern}", where=where, hint="a pattern (*.toml) may match nothing, a name may not"
            )
        found += names
    return list(dict.fromkeys(found))


def _merge(into: Raw, new: Mapping[str, Any], document: tomlfile.Document, at: tuple[str, ...], origins: dict[str, str]) -> None:
    for key, value in new.items():
        here = (*at, key)
        if isinstance(value, dict):
            target = into.setdefault(key, {})
            if not isinstance(target, dict):
                raise InvalidArgument(f"{'.'.join(here)} is a table here and a value elsewhere", where=document.where(*here))
            origins.setdefault(".".join(here), document.where(*here))
            _merge(target, value, document, here, origins)
        else:
            into[key] = value
            origins[".".join(here)] = document.where(*here)


def _set(values: Raw, keys: list[str], value: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value


S = TypeVar("S")


def _section(kind: type[S], values: Mapping[str, Any], at: tuple[str, ...], origins: Mapping[str, str]) -> S:
    hints = typing.get_type_hints(kind, include_extras=True)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # every section is a dataclass
    out: dict[str, Any] = {}
    for key, value in values.items():
        here = (*at, key)
        where = origins.get(".".join(here), "")
        if not at and key in REFUSED:
            raise InvalidArgument(f"[{key}] is not for imgsvc: {REFUSED[key]}", where=where, hint="drop the table")
        if key not in known:
            raise InvalidArgument(f'unknown key "{printable(".".join(here), 120)}"', where=where, hint=tomlfile.suggestion(key, known))
        out[key] = _value(known[key], value, here, where, origins)
        if typing.get_origin(known[key]) is dict:
            # A named table adds to the built-in ones; it does not remove them.
            out[key] = {**getattr(kind(), key), **out[key]}
    return kind(**out)


def _value(hint: Any, value: object, here: tuple[str, ...], where: str, origins: Mapping[str, str]) -> Any:
    name = ".".join(here)
    if hint == Duration:
        return parse_duration(value, where)
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), _typed(dict, value, name, where), here, origins)
    if origin is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
        section = typing.get_args(hint)[1]
        table = _typed(dict, value, name, where)
        return {
            key: _value(section, entry, (*here, key), origins.get(".".join((*here, key)), where), origins) for key, entry in table.items()
        }
    if origin is dict and typing.get_args(hint)[1] is str:
        table = _typed(dict, value, name, where)
        return {key: _typed(str, entry, f"{name}.{key}", where) for key, entry in table.items()}
    if origin is dict:
        return _typed(dict, value, name, where)
    if origin is tuple:
        return tuple(_typed(str, item, f"{name} (an entry)", where) for item in _typed(list, value, name, where))
    return _typed(hint, value, name, where)


_OWN_MOUNT_OPTIONS: Final = ("lowerdir", "upperdir", "workdir", "uidmap", "gidmap", "userxattr", "ro", "rw")  # imgsvc says these itself
_KIND_NAMES: Final = {str: "a string", int: "an integer", bool: "true or false", dict: "a table", list: "a list"}


def _typed(kind: type[S], value: object, name: str, where: str) -> S:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidArgument(f"{name} must be {_KIND_NAMES.get(kind, kind.__name__)}, not {printable(repr(value), 60)}", where=where)
    return value


def _check(config: Config, origins: Mapping[str, str]) -> None:
    """What types cannot say."""

    def need(good: bool, key: str, problem: str) -> None:
        if not good:
            raise InvalidArgument(f"{key}: {problem}", where=origins.get(key, "default"))

    need(config.version == VERSION, "version", f"this imgsvc reads version {VERSION}")
    need(config.root.startswith("/"), "root", "must be an absolute path")
    need(config.state.startswith("/"), "state", "must be an absolute path")
    need(config.address.startswith("unix:///"), "grpc.address", "must be unix:///…; CRI is never served over TCP")
    need(config.images.sync in ("full", "none"), "images.sync", 'must be "full" or "none"')
    need(config.debug.level in LOG_LEVELS, "debug.level", f"must be {', '.join(LOG_LEVELS)}")
    need(config.debug.format in ("text", "json"), "debug.format", 'must be "text" or "json"')
    need(config.images.snapshotter in ("auto", *SNAPSHOTTERS), "images.snapshotter", "must be auto, overlayfs, erofs or native")
    for name, handler in config.runtime.runtimes.items():
        key = f"runtime.runtimes.{name}.snapshotter"
        need(handler.snapshotter in ("", *SNAPSHOTTERS), key, "must be overlayfs, erofs or native; without it, that of [images]")
    for option in config.images.overlayfs.mount_options:
        good = option.partition("=")[0] not in ("", *_OWN_MOUNT_OPTIONS) and "," not in option
        need(good, "images.overlayfs.mount_options", f'"{printable(option, 60)}" is not an option to give there; one an entry')
    for key in ("max_concurrent_downloads", "max_concurrent_downloads_per_image", "max_concurrent_unpacks"):
        need(getattr(config.images, key) > 0, f"images.{key}", "must be at least 1")
    need(config.decrypt.key_model in ("node", ""), "decrypt.key_model", 'must be "node" or ""')
    need(config.runtime.cgroup_driver in ("auto", "systemd", "cgroupfs"), "runtime.cgroup_driver", "must be auto, systemd or cgroupfs")
    default = config.runtime.default_runtime_name
    need(default in config.runtime.runtimes, "runtime.default_runtime_name", f'no table [runtime.runtimes."{default}"]')
    need(0 <= config.stream.port < 65536, "stream.port", "must be 0 to 65535")
    need(bool(config.stream.tls_cert_file) == bool(config.stream.tls_key_file), "stream.tls_cert_file", "needs tls_key_file too")
    need(config.cni.max_conf_num >= 0, "cni.max_conf_num", "must not be negative")
    mirror = config.mirror
    need(bool(mirror.tls_cert_file) == bool(mirror.tls_key_file), "mirror.tls_cert_file", "needs tls_key_file too")
    need(not mirror.client_ca_file or bool(mirror.tls_cert_file), "mirror.client_ca_file", "needs tls_cert_file")
    need(mirror.keep > 0, "mirror.keep", "must be above zero")
    need(mirror.private_images in ("never", "certificate"), "mirror.private_images", 'must be "never" or "certificate"')
    need(
        mirror.private_images == "never" or bool(mirror.client_ca_file),
        "mirror.private_images",
        "certificates are only checked with client_ca_file",
    )
