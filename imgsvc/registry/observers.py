"""The observer of clients without metrics: the command line, tests."""

from __future__ import annotations

import logging

from imgsvc.registry.interfaces import RegistryObserver

log = logging.getLogger(__name__)


class LoggingObserver:
    """Ignores everything but warnings, which are logged."""

    def queued(self, seconds: float) -> None:
        """Ignored."""

    def token(self, outcome: str, seconds: float) -> None:
        """Ignored."""

    def failed(self, phase: str, failure: str) -> None:
        """Ignored."""

    def decided(self, failure: str, action: str) -> None:
        """Ignored."""

    def warned(self, namespace: str, repository: str, endpoint: str, text: str) -> None:
        """Logged."""
        log.warning("%s says of %s/%s: %s", endpoint, namespace, repository, text)


def as_observer(observer: LoggingObserver) -> RegistryObserver:
    """Lets mypy prove that the contract is met."""
    return observer
