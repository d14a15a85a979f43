"""The machine of this directory's tests; those in inside/ run in the machine and are not collected here."""

from __future__ import annotations

import faulthandler
from typing import Any, Final

import pytest

from tests.vm import root
from tests.vm.parts import Parts

collect_ignore = ["inside"]

_PARTS: Final = pytest.StashKey[Parts]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with what will take longest: the parts of the selected tests, beside all tests before them."""
    names = [marker.args[0] for item in session.items if (marker := item.get_closest_marker("part"))]
    if names and not session.config.option.collectonly and not root.missing():
        parts = session.config.stash[_PARTS] = Parts()
        for name in names:
            parts.play(name)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """However the run ends."""
    if parts := session.config.stash.get(_PARTS, None):
        parts.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Minutes in one call are no hang here: every wait has a limit of its own, which shows the machine's console."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def played(request: pytest.FixtureRequest) -> Any:
    """What the part of this test returned."""
    if why := root.missing():
        pytest.skip(why)
    return request.config.stash[_PARTS].play(request.node.get_closest_marker("part").args[0]).result()
