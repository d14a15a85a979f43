"""CRI log lines from the FIFOs of shim containers (shim/logcopy.py), and what shims answer (shim/bootstrap.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from imgsvc.api import bootstrap_pb2
from imgsvc.errors import DataLoss, ImgsvcError, InvalidArgument, Unimplemented
from imgsvc.runtime.shim.bootstrap import Endpoint, parse_answer, program_name
from imgsvc.runtime.shim.logcopy import LineCutter, LogCopier, timestamp
from tests.support.swapper import DIRECTORY, Swapper

DATA = b"one\ntwo\r\n\n" + b"x" * 25 + b"\nlast"
WHOLE = b"T stdout F one\nT stdout F two\nT stdout F \nT stdout P xxxxxxxxxx\nT stdout P xxxxxxxxxx\nT stdout F xxxxx\nT stdout P last\n"


def test_lines_are_the_same_wherever_the_stream_is_split() -> None:
    for at in range(len(DATA) + 1):
        cutter = LineCutter(b"stdout", 10)
        text = cutter.feed(DATA[:at], b"T") + cutter.feed(DATA[at:], b"T") + cutter.finish(b"T")
        assert text == WHOLE, at


def test_time_stamps_are_rfc3339_with_nanoseconds() -> None:
    assert len(timestamp()) == len("2026-01-01T00:00:00.000000000Z")


def test_the_copier_goes_on_after_a_reopen(tmp_path: Path) -> None:
    async def scenario() -> None:
        fifo = tmp_path / "stdout"
        os.mkfifo(fifo)
        copier = LogCopier(str(tmp_path), "log", {"stdout": fifo}, 100)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"first\n")
        await asyncio.sleep(0.05)
        (tmp_path / "log").rename(tmp_path / "log.1")
        copier.reopen()
        os.write(writer, b"second\nrest")
        os.close(writer)
        copier.stop()
        copier.stop()

    asyncio.run(scenario())
    assert (tmp_path / "log.1").read_bytes().endswith(b" stdout F first\n")
    assert [line.split(b" ", 1)[1] for line in (tmp_path / "log").read_bytes().splitlines()] == [b"stdout F second", b"stdout P rest"]


@pytest.mark.parametrize("limit", [0, -1])
def test_lines_without_a_limit(tmp_path: Path, limit: int) -> None:
    fifo, log = tmp_path / "out", tmp_path / "log"
    os.mkfifo(fifo)

    async def run() -> None:
        copier = LogCopier(str(tmp_path), "log", {"stdout": fifo}, limit)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"x" * 40_000 + b"\nafter\n")
        os.close(writer)
        copier.stop()

    asyncio.run(run())
    assert [(len(line.split(" ", 3)[3]), line.split(" ")[2]) for line in log.read_text().splitlines()] == [(40_000, "F"), (5, "F")]


def test_c_x4_a_log_stays_in_its_directory_while_somebody_swaps_it_for_a_link(tmp_path: Path) -> None:
    """As a container can that has the node's logs mounted. Rotation opens the log again and again meanwhile."""
    secret, pod, fifo = tmp_path / "secret", tmp_path / "pod", tmp_path / "out"
    for directory in (secret, pod, pod / DIRECTORY):
        directory.mkdir()
    (secret / "0.log").write_text("of the host")
    os.mkfifo(fifo)

    async def run() -> None:
        copier = LogCopier(str(pod), f"{DIRECTORY}/0.log", {"stdout": fifo}, 100)
        writer = os.open(fifo, os.O_WRONLY)

        async def rotate() -> None:
            for _ in range(200):
                with contextlib.suppress(InvalidArgument):
                    copier.reopen()
                os.write(writer, b"x\n")
                await asyncio.sleep(0)

        loop = asyncio.get_running_loop()
        with Swapper(str(pod), secret) as swapper:
            await asyncio.to_thread(swapper.race, lambda: asyncio.run_coroutine_threadsafe(rotate(), loop).result(), 20_000)
        os.close(writer)
        copier.stop()

    asyncio.run(run())
    assert [path.name for path in secret.iterdir()] == ["0.log"]
    assert (secret / "0.log").read_text() == "of the host"


def test_answers_of_all_generations() -> None:
    result = bootstrap_pb2.BootstrapResult(version=3, address="unix:///run/x", protocol="ttrpc").SerializeToString()
    assert parse_answer(b"unix:///run/x\n") == Endpoint(2, "unix:///run/x")
    assert parse_answer(b'{"version":3,"address":"unix:///run/x","protocol":"ttrpc"}') == Endpoint(3, "unix:///run/x")
    assert parse_answer(result) == Endpoint(3, "unix:///run/x")
    for broken in (b"", b"{", b'{"version": "x"}', b"\xff\xff"):
        with pytest.raises(DataLoss):
            parse_answer(broken)
    for newer in (b'{"version":4,"address":"unix:///x"}', b'{"version":3,"address":"unix:///x","protocol":"grpc"}', b"vsock://3:1"):
        with pytest.raises(Unimplemented):
            parse_answer(newer)


@pytest.mark.parametrize(
    "name, program",
    [
        ("io.containerd.runc.v2", "containerd-shim-runc-v2"),
        ("io.containerd.kata.v2", "containerd-shim-kata-v2"),
        ("io.containerd.runsc.v1", "containerd-shim-runsc-v1"),
        ("/opt/shim", "/opt/shim"),
    ],
)
def test_program_names(name: str, program: str) -> None:
    assert program_name(name) == program


@pytest.mark.parametrize("name", ["", "runc", "a/b.c.d", ".a.b", "a..b"])
def test_names_that_are_no_runtime_type(name: str) -> None:
    with pytest.raises(InvalidArgument):
        program_name(name)
    assert issubclass(InvalidArgument, ImgsvcError)
