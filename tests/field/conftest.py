"""Fixtures of the runtime's own tests, for faults of pods and containers."""

from tests.runtime.conftest import directory, make_node

__all__ = ["directory", "make_node"]
