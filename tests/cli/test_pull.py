"""What people see of `imgsvc pull`: bars on a terminal, plain lines in a pipe, the table of timings."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from imgsvc.cli.output import PHASES, print_timings
from imgsvc.cli.progress import Speed
from tests.fakes.registry import FakeRegistry
from tests.support import images
from tests.support.daemon import Daemon
from tests.support.images import Entry
from tests.support.registries import RealRegistry

NAME = "docker.io/shown/app:1"
SIZE = 6_000_000
BAR = re.compile(r"([0-9a-f]{12}) ([█·]{14}) +(\S+ \S+) / (\S+ \S+) +([█·]{14}) (\w+)")


@pytest.fixture
def slow(image_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that takes more than a second for NAME."""
    with FakeRegistry(rate=5_000_000) as registry:
        made = [images.layer([Entry("f", os.urandom(SIZE))]), images.layer([Entry("g", os.urandom(SIZE // 6))])]
        registry.add(images.image(made), "shown/app", "1")
        image_daemon.map_host("docker.io", registry.address)
        yield image_daemon


def on_a_terminal(daemon: Daemon, *arguments: str, rows: int = 24, columns: int = 80) -> str:
    """What the command writes when its output is a terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "imgsvc.cli", *arguments, "--address", daemon.address]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # EIO: nobody writes any more
            while data := os.read(ours, 65536):
                written += data
        assert process.wait(timeout=30) == 0, written
    os.close(ours)
    return written.decode()


def test_bars_speed_and_time_left_are_drawn_on_a_terminal(slow: Daemon) -> None:
    shown = on_a_terminal(slow, "pull", NAME)

    frames = re.split(r"\x1b\[\d+A\x1b\[J", shown)
    assert len(frames) > 5
    rows = [BAR.search(line) for line in shown.replace("\r", "").splitlines()]
    partial = [row for row in rows if row and 0 < row[2].count("█") < 14]
    assert partial, "no download is shown half done"
    assert any(row and 0 < row[5].count("█") < 14 for row in rows), "no unpacking is shown half done"
    assert re.search(r"total +\S+ MiB of 6\.7 MiB, \S+ \S+/s, \S+ s, \d+ s left", shown)
    last = [row for line in frames[-1].splitlines() if (row := BAR.search(line))]
    assert [(row[2], row[5], row[6]) for row in last] == [("█" * 14, "█" * 14, "done")] * 2
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;]*[A-Z]", "", frames[-1]).replace("\r", "").splitlines()[:3]) < 80


def test_more_layers_than_rows_do_not_smear_the_screen(image_daemon: Daemon, registry: RealRegistry) -> None:
    registry.push(images.image([images.layer([Entry(f"f{n}", os.urandom(50_000))]) for n in range(12)]), "shown/many", "1")

    shown = on_a_terminal(image_daemon, "pull", "docker.io/shown/many:1", rows=6)

    assert all(int(up) <= 5 for up in re.findall(r"\x1b\[(\d+)A", shown))


def test_what_is_to_come_is_counted_from_the_start_and_fits_a_narrow_terminal(image_daemon: Daemon, registry: RealRegistry) -> None:
    registry.push(images.image([images.layer([Entry(f"f{n}", os.urandom(50_000))]) for n in range(12)]), "shown/all", "1")

    shown = on_a_terminal(image_daemon, "pull", "docker.io/shown/all:1", columns=50)

    totals = re.findall(r"total +\S+ \S+ of (\S+ \S+),", shown)
    assert len(set(totals)) == 1, totals
    lines = re.sub(r"\x1b\[[0-9;]*[A-Z]", "", shown).replace("\r", "").splitlines()[1:]
    assert max(len(line) for line in lines if not line.startswith("sha256:")) < 50
    assert any(re.fullmatch(r"[0-9a-f]{12} [█·]+ [█·]+ \w+", line) for line in lines)


def test_a_pipe_gets_plain_lines_and_each_state_once(slow: Daemon) -> None:
    done = slow.cli("pull", "--timings", NAME)

    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"{NAME}: sha256:")
    states = [line for line in lines[1:] if not re.fullmatch(r"[0-9a-f]{12}: (downloading|unpacking|done) \(\S+ \S+\)", line)]
    assert states == []
    assert len(set(lines)) == len(lines)
    table = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert table == ["PHASE", *(phase for phase in PHASES if phase != "unwrap"), "total"]


def test_timings_come_in_one_order(capsys: pytest.CaptureFixture[str]) -> None:
    print_timings({"total": 3.0, "unpacked": 1.0, "strange": 0.5, "download": 2.0, "resolve": 0.1})

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "PHASE", "resolve", "download", "unpacked", "strange", "total",
    ]  # fmt: skip


def test_speed_is_that_of_the_last_seconds() -> None:
    now = [0.0]
    speed = Speed(lambda: now[0])
    readings = []
    for at, total in ((0.0, 1000), (1.0, 1100), (2.0, 1200), (8.0, 1200), (14.0, 1200)):
        now[0] = at
        readings.append(speed.note(total))

    assert readings[:3] == [0.0, 100.0, 100.0]
    assert readings[-1] == 0.0
