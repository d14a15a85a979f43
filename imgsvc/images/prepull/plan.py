"""A pre-pull file: which images, how eagerly, when.

version = 1
windows = ["22:00-06:00"]              # when pulling is allowed, local time; nothing: always
concurrent = 2                         # pulls at a time
bandwidth = "20MiB"                    # per second, of all its pulls together; nothing: no limit
min_free = "10GiB"                     # pull only while that much is free where the images live

[[image]]
reference = "docker.io/library/nginx:1.27"
platform = "linux/arm64"               # nothing: the node's
pin = true                             # the kubelet's garbage collection leaves it alone
every = "1h"                           # look whether the tag has moved; left out: only until it is stored
username = "robot"                     # nothing: the node's own credentials for that registry
password_file = "/etc/imgsvc/robot.password"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imgsvc.base import tomlfile
from imgsvc.base.errors import InvalidArgument, from_os_error
from imgsvc.base.oci import GIB, KIB, MIB, Platform
from imgsvc.base.reference import Reference
from imgsvc.images.prepull.windows import Windows
from imgsvc.registry.interfaces import Credential

VERSION: Final = 1
MAX_IMAGES: Final = 10_000  # per file
MIN_EVERY: Final = 60.0  # [s] between two looks at a tag; registries limit clients that ask more often
_MAX_SECRET: Final = 64 * KIB
_ROOT_KEYS: Final = ("version", "windows", "concurrent", "bandwidth", "min_free", "image")
_IMAGE_KEYS: Final = ("reference", "platform", "pin", "every", "username", "password_file")
_SIZE = re.compile(r"([0-9]{1,12})(B|KiB|MiB|GiB)", re.ASCII)
_UNITS: Final = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One image. every [s]: 0 is once. where: its place in the file."""

    reference: Reference
    platform: Platform
    pin: bool = False
    every: float = 0.0
    username: str = ""
    password_file: str = ""
    where: str = ""

    @property
    def key(self) -> str:
        """What it is remembered under; short enough for a metadata key, cut only within a digest."""
        return f"{self.platform} {self.reference}"[:500]

    def credential(self) -> Credential | None:
        """The credential it names, read now. Blocking. Raises: NotFound, PermissionDenied, InvalidArgument."""
        if not self.password_file:
            return None
        try:
            with open(self.password_file, "rb") as stream:
                secret = stream.read(_MAX_SECRET).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise InvalidArgument("a password that is not UTF-8", where=self.password_file) from None
        except OSError as error:
            raise from_os_error(error, "reading a password", where=self.password_file) from error
        return Credential(self.password_file, self.username, secret, host=self.reference.host)


@dataclass(frozen=True, slots=True)
class Plan:
    """One file. bandwidth [bytes/s] and min_free [bytes]: 0 is none."""

    name: str
    images: tuple[Wanted, ...]
    windows: Windows = field(default_factory=Windows)
    concurrent: int = 1
    bandwidth: int = 0
    min_free: int = 0


def load_plan(path: Path) -> Plan:
    """Read a file. Blocking. Raises: InvalidArgument with the position."""
    document = tomlfile.load(path)
    document.check_keys(_ROOT_KEYS)
    if document.typed(int, "version") != VERSION:
        raise document.error(f"version must be {VERSION}", "version")
    entries = document.typed(list, "image") or []
    if len(entries) > MAX_IMAGES:
        raise document.error(f"more than {MAX_IMAGES} images in one file", "image")
    concurrent = document.typed(int, "concurrent")
    if concurrent is not None and not 1 <= concurrent <= 64:
        raise document.error("concurrent must be 1 to 64", "concurrent")
    try:
        windows = Windows.parse(document.strings("windows"))
    except InvalidArgument as error:
        raise document.error(error.what, "windows", hint=error.hint) from error
    images = tuple(_wanted(document, position) for position in range(len(entries)))
    _check_twice(document, images)
    return Plan(str(path), images, windows, concurrent or 1, _size(document, "bandwidth"), _size(document, "min_free"))


def _check_twice(document: tomlfile.Document, images: Iterable[Wanted]) -> None:
    seen: dict[str, str] = {}
    for position, wanted in enumerate(images):
        if wanted.key in seen:
            raise document.error(f"{wanted.reference} is named twice", "image", position, hint=f"also at {seen[wanted.key]}")
        seen[wanted.key] = wanted.where


def _wanted(document: tomlfile.Document, position: int) -> Wanted:
    at = ("image", position)
    document.check_keys(_IMAGE_KEYS, *at)
    text = document.typed(str, *at, "reference")
    if text is None:
        raise document.error("an image without reference", *at)
    platform = document.typed(str, *at, "platform")
    every = document.duration(*at, "every") or 0.0
    username, password_file = document.typed(str, *at, "username") or "", document.typed(str, *at, "password_file") or ""
    if bool(username) != bool(password_file):
        raise document.error("username and password_file need one another", *at)
    if every and every < MIN_EVERY:
        raise document.error(f"every must be at least {MIN_EVERY:g}s", *at, "every")
    try:
        reference = Reference.parse(text)
        chosen = Platform.parse(platform) if platform else Platform.host()
    except InvalidArgument as error:
        raise document.error(error.what, *at, hint=error.hint) from error
    pin = document.typed(bool, *at, "pin") or False
    return Wanted(reference, chosen, pin, every, username, password_file, document.where(*at))


def _size(document: tomlfile.Document, key: str) -> int:
    text = document.typed(str, key)
    if text is None:
        return 0
    match = _SIZE.fullmatch(text)
    if match is None or not int(match[1]):
        raise document.error(f'{key}: invalid size "{text}"', key, hint='write a number and B, KiB, MiB or GiB, e.g. "20MiB"')
    return int(match[1]) * _UNITS[match[2]]
