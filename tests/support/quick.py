"""What `make quick` leaves out. A new test needs no mark: whatever starts a process is found out while it runs.

Directories whose tests all need a daemon or a machine are not even collected; tests marked root, slow or compat, and tests that
use a fixture that starts a daemon or a foreign program, are deselected. Every other test runs, and the moment it starts a process it
counts as skipped: `make test` runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Final

import pytest

_DIRECTORIES: Final = ("e2e", "vm")
_MARKS: Final = ("root", "slow", "compat", "vm")
_FIXTURES: Final = frozenset({"registry", "make_daemon", "outside"})
_STARTS: Final = frozenset({"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec", "os.system"})
_REASON: Final = "starts a process; make test runs it"


class Quick:
    """The plugin that `--quick` registers."""

    def __init__(self) -> None:
        self._running = False
        self._started = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _arguments: object) -> None:
        if self._running and event in _STARTS:
            self._started = True
            pytest.skip(_REASON)

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        """Leave whole directories out."""
        return (collection_path.parent == config.rootpath / "tests" and collection_path.name in _DIRECTORIES) or None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect what is known to be slow or to start processes."""
        dropped = [item for item in items if _marked(item) or _FIXTURES & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=dropped)
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """Watch one test, with its fixtures."""
        self._running, self._started = True, False
        try:
            return (yield)
        finally:
            self._running = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """A test that tried to start a process is skipped, whatever it made of the refusal."""
        report = yield
        if self._started and report.outcome != "passed":
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {_REASON}")
        return report


def _marked(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in _MARKS)
