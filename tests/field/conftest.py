"""Fixtures of the runtime's own tests, for faults of pods and containers."""

from tests.e2e.conftest import busybox
from tests.runtime.conftest import directory, make_node, node

__all__ = ["busybox", "directory", "make_node", "node"]
