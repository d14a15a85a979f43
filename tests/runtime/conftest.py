"""One daemon per test file for tests that only look; tests that kill or configure make their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.harness import Daemon, running


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    path.chmod(0o755)  # a process in a user namespace walks through it
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A running daemon with runc and host networking."""
    _require("runc", "conmon")
    path = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    path.chmod(0o755)
    with running(path, {"handlers": {"default": {"path": "runc"}}}) as daemon:
        yield daemon
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def make_node(directory: Path) -> Iterator[Callable[..., Daemon]]:
    """Make a running daemon with other settings."""
    _require("runc", "conmon")
    with ExitStack() as stack:

        def make(extra: dict[str, Any] | None = None, *, bridge: str = "", cgroups: str = "", failpoint: str = "") -> Daemon:
            settings = {"handlers": {"default": {"path": "runc"}}} | (extra or {})
            return stack.enter_context(running(directory, settings, bridge=bridge, cgroups=cgroups, failpoint=failpoint))

        yield make


def _require(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    if not Path("/bin/busybox").exists():
        pytest.skip("busybox-static is not installed")
