"""Failpoints: the registry is the source's, arming is strict, actions act."""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import imgsvc
from imgsvc.base import failpoints
from imgsvc.base.errors import InvalidArgument
from imgsvc.base.failpoints import POINTS, afailpoint, arm, failpoint

NAME = "content.write"


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    arm("")


def _used() -> Counter[str]:
    """Names in calls of failpoint and afailpoint, in the whole source."""
    found: Counter[str] = Counter()
    for file in Path(imgsvc.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("failpoint", "afailpoint"):
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{file}:{node.lineno}: a failpoint has a literal name"
                found[str(name.value)] += 1
    return found


def test_the_registry_is_what_the_source_uses() -> None:
    used = _used()
    assert set(used) == set(POINTS)
    assert [name for name, count in used.items() if count > 1] == [], "one name is one place"


def test_nothing_is_armed_by_itself() -> None:
    failpoint(NAME)
    asyncio.run(afailpoint(NAME))


@pytest.mark.parametrize("text, number", [("error", errno.EIO), ("error:ENOSPC", errno.ENOSPC), ("error:EMFILE", errno.EMFILE)])
def test_error_raises_as_the_system_does(text: str, number: int) -> None:
    arm(f"{NAME}={text}")
    for _ in range(2):
        with pytest.raises(OSError, match=NAME) as caught:
            failpoint(NAME)
        assert caught.value.errno == number
    failpoint("content.written")


def test_count_and_first_hit() -> None:
    arm(f"{NAME}=error*2@3")
    outcomes = []
    for _ in range(6):
        try:
            failpoint(NAME)
            outcomes.append("passed")
        except OSError:
            outcomes.append("failed")
    assert outcomes == ["passed", "passed", "failed", "failed", "passed", "passed"]


def test_delay_waits_without_holding_up_the_event_loop() -> None:
    arm(f"{NAME}=delay:50; content.written=delay:1")
    began = time.monotonic()
    failpoint(NAME)
    assert time.monotonic() - began >= 0.05

    async def two() -> float:
        began = time.monotonic()
        await asyncio.gather(*(afailpoint(NAME) for _ in range(20)))
        return time.monotonic() - began

    assert asyncio.run(two()) < 0.5


def test_kill_is_sigkill() -> None:
    code = f"from imgsvc.base import failpoints as f; f.arm('{NAME}=kill'); f.failpoint('{NAME}'); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "unknown.point=kill",
        f"{NAME}=panic",
        f"{NAME}=kill:1",
        f"{NAME}=error:EWHAT",
        f"{NAME}=delay",
        f"{NAME}=delay:E",
        f"{NAME}=kill*x",
    ],
)
def test_what_cannot_be_armed_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match=text.partition("=")[0]):
        arm(text)


def test_the_environment_variable_is_only_read_by_entry_points() -> None:
    environment = {**os.environ, failpoints.ENV: f"{NAME}=kill"}
    code = f"from imgsvc.base.failpoints import failpoint; failpoint('{NAME}')"
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=30).returncode == 0
