"""The daemon's log as text and JSON, and systemd's watchdog."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from imgsvc.daemon.systemd import Notifier

CODE = """
import logging
from imgsvc.daemon import logs
logs.start("info", {style!r})
log = logging.getLogger("a.b")
log.debug("not yet")
logs.set_level("debug")
log.debug("now: %s", "x\\ny")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broken")
"""


def logged(style: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE.format(style=style)], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_one_object_per_line_whatever_is_in_it() -> None:
    first, second = (json.loads(line) for line in logged("json"))

    assert (first["level"], first["logger"], first["message"]) == ("debug", "a.b", "now: x\ny")
    assert first["time"].endswith("Z")
    assert "ZeroDivisionError" in second["traceback"]


def test_text_says_level_and_logger() -> None:
    assert "DEBUG a.b: now: x" in logged("text")[0]


@pytest.mark.parametrize("pid, heard", [("", True), (str(os.getpid()), True), ("1", False)], ids=("any", "ours", "another"))
def test_the_watchdog_hears_of_us_while_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: str, heard: bool) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", pid)
    asked: list[int] = []

    async def is_well() -> None:
        asked.append(1)
        if len(asked) == 3:
            await asyncio.Event().wait()

    async def live() -> None:
        notifier = Notifier()
        assert "WATCHDOG_USEC" not in os.environ, "children would speak in our name"
        with pytest.raises(TimeoutError) if heard else monkeypatch.context():
            async with asyncio.timeout(0.5):
                await notifier.keep_alive(is_well)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "s"))
        systemd.setblocking(False)
        asyncio.run(live())
        said = []
        while True:
            try:
                said.append(systemd.recv(64))
            except BlockingIOError:
                break
    assert said == ([b"WATCHDOG=1"] * 2 if heard else [])


def test_one_bad_moment_does_not_end_the_watchdog_s_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", "")
    asked: list[int] = []

    async def is_well() -> None:
        asked.append(1)
        if len(asked) == 1:
            raise OSError("Too many open files")
        if len(asked) == 3:
            raise asyncio.CancelledError

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "s"))
        systemd.settimeout(10)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(Notifier().keep_alive(is_well))
        assert systemd.recv(64) == b"WATCHDOG=1"
    assert "Too many open files" in caplog.text
