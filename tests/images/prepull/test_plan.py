"""Pre-pull files and windows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from imgsvc.base.errors import InvalidArgument, NotFound
from imgsvc.base.oci import GIB, MIB, Platform
from imgsvc.images.prepull.plan import load_plan
from imgsvc.images.prepull.windows import Windows

WHOLE = """
version = 1
windows = ["Mon-Fri 22:00-06:00", "Sun 00:00-24:00"]
concurrent = 3
bandwidth = "20MiB"
min_free = "10GiB"
[[image]]
reference = "nginx:1.27"
pin = true
every = "1h"
[[image]]
reference = "registry.example/app@sha256:0000000000000000000000000000000000000000000000000000000000000000"
platform = "linux/arm64"
username = "robot"
password_file = "FILE"
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "p.toml"
    file.write_text(text.replace("FILE", str(tmp_path / "secret")))
    return file


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\n")

    plan = load_plan(written(tmp_path, WHOLE))

    assert (plan.concurrent, plan.bandwidth, plan.min_free) == (3, 20 * MIB, 10 * GIB)
    nginx, app = plan.images
    assert (str(nginx.reference), nginx.pin, nginx.every, nginx.platform) == ("docker.io/library/nginx:1.27", True, 3600.0, Platform.host())
    assert app.platform == Platform.parse("linux/arm64")
    assert nginx.credential() is None
    credential = app.credential()
    assert credential is not None
    assert (credential.username, credential.password, credential.host) == ("robot", "hunter2", "registry.example")


def test_a_missing_password_is_an_error_when_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_plan(written(tmp_path, WHOLE)).images[1].credential()


@pytest.mark.parametrize(
    "text, line",
    [
        ("version = 2\n", 1),
        ("version = 1\nimages = []\n", 2),
        ('version = 1\nwindows = ["22-6"]\n', 2),
        ("version = 1\nconcurrent = 0\n", 2),
        ('version = 1\nbandwidth = "20"\n', 2),
        ('version = 1\nbandwidth = "0MiB"\n', 2),
        ("version = 1\n[[image]]\npin = true\n", 2),
        ('version = 1\n[[image]]\nreference = "App"\n', 2),
        ('version = 1\n[[image]]\nreference = "a"\nevery = "1s"\n', 4),
        ('version = 1\n[[image]]\nreference = "a"\nusername = "u"\n', 2),
        ('version = 1\n[[image]]\nreference = "a"\npull = true\n', 4),
        ('version = 1\n[[image]]\nreference = "a"\n[[image]]\nreference = "docker.io/library/a:latest"\n', 4),
    ],
)
def test_mistakes_are_refused_at_their_place(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_plan(written(tmp_path, text))
    assert caught.value.where.startswith(f"{tmp_path}/p.toml:{line}:")


MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.mark.parametrize(
    "windows, hours, closes, opens",
    [
        ([], 5, 7 * 24.0, 0),
        (["22:00-06:00"], 23, 7, 0),
        (["22:00-06:00"], 2, 4, 0),
        (["22:00-06:00"], 6, None, 16),
        (["Mon-Fri 22:00-06:00"], 5 * 24 + 5, 1, 0),
        (["Mon-Fri 22:00-06:00"], 5 * 24 + 7, None, 2 * 24 + 15),
        (["Sun 00:00-24:00"], 6 * 24 + 12, 12, 0),
        (["Sat-Mon 10:00-12:00"], 11, 1, 0),
        (["Sat-Mon 10:00-12:00"], 3 * 24, None, 2 * 24 + 10),
        (["00:00-24:00"], 12, 12, 0),
        (["10:00-11:00", "10:30-12:00"], 10.75, 1.25, 0),
    ],
)
def test_windows(windows: list[str], hours: float, closes: float | None, opens: float) -> None:
    parsed, now = Windows.parse(windows), MONDAY + timedelta(hours=hours)

    assert parsed.closes_in(now) == (None if closes is None else timedelta(hours=closes))
    assert parsed.opens_in(now) == timedelta(hours=opens)


@pytest.mark.parametrize(
    "text", ["", "22:00", "25:00-26:00", "10:60-11:00", "10:00-10:00", "Mo 10:00-11:00", "Abc 10:00-11:00", "24:00-01:00"]
)
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Windows.parse([text])
