"""What `make quick` leaves out. A new test needs no mark: a test that starts a process is noticed the first time it runs.

Directories whose tests all need a daemon or a machine are not collected. Tests marked root, slow, compat or vm, and tests that
use a fixture that starts a daemon or a foreign program, are deselected. Of the others, those that start a process are
remembered in pytest's cache and left out from the next run on, so the first run in a new checkout takes longer.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Final

import pytest

_DIRECTORIES: Final = ("e2e", "vm", "field")
_MARKS: Final = ("root", "slow", "compat", "vm")
_FIXTURES: Final = frozenset({"registry", "make_daemon", "outside"})
_STARTS: Final = frozenset({"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.system"})
_KEY: Final = "quick/starts-processes"


class Quick:
    """The plugin that `--quick` registers."""

    def __init__(self, config: pytest.Config) -> None:
        assert config.cache is not None, "--quick needs pytest's cacheprovider"
        self._cache = config.cache
        self._root = config.rootpath
        self._known: set[str] = set(self._cache.get(_KEY, ()))
        self._running = ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _arguments: object) -> None:
        if self._running and event in _STARTS:
            self._known.add(self._running)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave whole directories out."""
        return True if collection_path.parent == self._root / "tests" and collection_path.name in _DIRECTORIES else None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect what starts processes or is slow."""
        dropped = [item for item in items if self._is_left_out(item)]
        config.hook.pytest_deselected(items=dropped)
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]

    def _is_left_out(self, item: pytest.Item) -> bool:
        marked = any(item.get_closest_marker(mark) for mark in _MARKS)
        return marked or item.nodeid in self._known or bool(_FIXTURES & set(getattr(item, "fixturenames", ())))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Watch one test, with its fixtures."""
        self._running = item.nodeid
        try:
            return (yield)
        finally:
            self._running = ""

    def pytest_sessionfinish(self) -> None:
        """Remember for the next run."""
        self._cache.set(_KEY, sorted(self._known))
