"""Finds faults of a configuration before the daemon starts: reads everything it refers to and sends no request.

For `imgsvc config check`, and for the daemon itself, which goes on with what is wrong here where it can, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imgsvc.base.errors import ImgsvcError, InvalidArgument
from imgsvc.base.fsutil import resolved
from imgsvc.base.http1 import is_loopback, server_tls, split_address
from imgsvc.config import Config, Loaded
from imgsvc.daemon.settings import decrypt
from imgsvc.daemon.settings.registry import open_registries
from imgsvc.images.prepull.plan import load_plan
from imgsvc.images.records import pin_patterns
from imgsvc.images.verification.policy import load_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """problems: something will not work, or the daemon will not start. warnings: it will work, and the administrator should know."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


class Preflight:
    """Runs the checks, and keeps the last report for CRI's Status."""

    def __init__(self, tell: Callable[[Iterable[str]], None]) -> None:
        """tell: logs warnings, those of a registry's files only once, for a pull comes upon them, too."""
        self._tell = tell
        self.report = Report((), ())

    def run(self, loaded: Loaded) -> None:
        """Check again, and log what is not well. Blocking."""
        self.report = inspect(loaded)
        for problem in self.report.problems:
            log.error("%s", problem)
        self._tell(self.report.warnings)

    def notes(self) -> tuple[str, ...]:
        """All of it."""
        return self.report.problems + self.report.warnings


def inspect(loaded: Loaded) -> Report:
    """Read everything. Blocking."""
    problems: list[str] = []
    warnings: list[str] = list(_warnings(loaded.config))
    for check in (_directories, _decryption, _pins, _policy, _listeners, _prepull):
        try:
            problems += check(loaded)
        except ImgsvcError as error:
            problems.append(str(error))
    try:
        opened = open_registries(loaded)
        warnings += opened.warnings
        for namespace, prefix in opened.client.directories.namespaces():
            try:
                warnings += opened.client.directories.search(namespace, prefix)[0].warnings
            except ImgsvcError as error:
                problems.append(str(error))
    except ImgsvcError as error:
        problems.append(str(error))
    return Report(tuple(problems), tuple(dict.fromkeys(warnings)))


def _warnings(settings: Config) -> Iterator[str]:
    if settings.images.sync == "none":
        yield 'images.sync = "none": a power cut may lose images that were acknowledged'
    if settings.mirror.address and not settings.mirror.tls_cert_file and not is_loopback(settings.mirror.address):
        yield f"mirror.address {settings.mirror.address} is reachable from outside and speaks plain HTTP; set mirror.tls_cert_file"
    if settings.mirror.pull_through and not settings.mirror.address:
        yield "mirror.pull_through is set, but mirror.address is not: nothing is served"


def _directories(loaded: Loaded) -> Iterator[str]:
    settings = loaded.config
    root, state = resolved(settings.root), resolved(settings.state)
    if root == state:
        yield f"{loaded.origin('state')}: root and state are the same directory, {root}"
    if settings.images.snapshotter == "overlayfs" and set(":,\\") & set(str(root)):
        yield f"{loaded.origin('root')}: root: overlayfs cannot use a path with a colon, comma or backslash: {root}"


def _decryption(loaded: Loaded) -> Iterator[str]:
    decrypt.check(loaded)
    if problem := decrypt.provider_problem(loaded.config):
        yield problem


def _pins(loaded: Loaded) -> Iterator[str]:
    for pattern in loaded.config.images.pinned_images:
        try:
            pin_patterns([pattern])
        except InvalidArgument as error:
            yield f"{loaded.origin('images.pinned_images')}: images.pinned_images: {error}"


def _policy(loaded: Loaded) -> Iterable[str]:
    if loaded.config.verify.policy:
        load_policy(Path(loaded.config.verify.policy))
    return ()


def _listeners(loaded: Loaded) -> Iterable[str]:
    mirror, metrics, stream = loaded.config.mirror, loaded.config.metrics, loaded.config.stream
    for name, address in (("mirror", mirror.address), ("metrics", metrics.address)):
        if address:
            split_address(address, name)
    if mirror.tls_cert_file:
        server_tls(mirror.tls_cert_file, mirror.tls_key_file, mirror.client_ca_file)
    if stream.tls_cert_file:
        server_tls(stream.tls_cert_file, stream.tls_key_file)
    return ()


def _prepull(loaded: Loaded) -> Iterator[str]:
    for path in sorted(Path(loaded.config.prepull.directory).glob("*.toml")):
        try:
            load_plan(path)
        except ImgsvcError as error:
            yield str(error)
