"""CRI log lines from the FIFOs of shim containers (shim/logs.py, shim/logprocess.py), and what shims answer (shim/bootstrap.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

import pytest

from imgsvc.api import bootstrap_pb2
from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import DataLoss, FailedPrecondition, ImgsvcError, InvalidArgument, Unimplemented
from imgsvc.runtime.handlers.shim.bootstrap import Endpoint, parse_answer, program_name
from imgsvc.runtime.handlers.shim.logprocess import LineCutter, timestamp
from imgsvc.runtime.handlers.shim.logs import ContainerLog
from tests.runtime.harness import wait_for
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


def make_log(directory: Path, limit: int, log_directory: Path, log_path: str = "log") -> tuple[ContainerLog, int]:
    """The log of a made-up container, and where its standard output goes."""
    (directory / "io").mkdir()
    os.mkfifo(directory / "io/stdout")
    facts = {"log_directory": str(log_directory), "log_path": str(log_directory / log_path)}
    (directory / "io.json").write_text(json.dumps(facts))
    log = ContainerLog(directory, limit)
    log.start()
    return log, os.open(directory / "io/stdout", os.O_WRONLY)


def test_a_log_goes_on_after_a_reopen(tmp_path: Path) -> None:
    log, writer = make_log(tmp_path, 100, tmp_path)

    os.write(writer, b"first\n")
    wait_for(lambda: bool((tmp_path / "log").read_bytes()))

    async def scenario() -> None:
        (tmp_path / "log").rename(tmp_path / "log.1")
        await log.reopen()
        os.write(writer, b"second\nrest")
        os.close(writer)
        await log.finish()
        await log.finish()
        with pytest.raises(FailedPrecondition):
            await log.reopen()

    asyncio.run(scenario())
    assert (tmp_path / "log.1").read_bytes().endswith(b" stdout F first\n")
    assert [line.split(b" ", 1)[1] for line in (tmp_path / "log").read_bytes().splitlines()] == [b"stdout F second", b"stdout P rest"]


@pytest.mark.parametrize("limit", [0, -1])
def test_lines_without_a_limit(tmp_path: Path, limit: int) -> None:
    log, writer = make_log(tmp_path, limit, tmp_path)
    os.write(writer, b"x" * 40_000 + b"\nafter\n")
    os.close(writer)
    asyncio.run(log.finish())
    text = (tmp_path / "log").read_text()
    assert [(len(line.split(" ", 3)[3]), line.split(" ")[2]) for line in text.splitlines()] == [(40_000, "F"), (5, "F")]


def test_a_log_ends_although_its_stream_is_held_open(tmp_path: Path) -> None:
    log, writer = make_log(tmp_path, 100, tmp_path)
    os.write(writer, b"all")
    asyncio.run(log.finish())
    assert (tmp_path / "log").read_bytes().endswith(b" stdout P all\n")
    os.close(writer)


def test_a_slow_follower_is_left_behind(tmp_path: Path) -> None:
    log, writer = make_log(tmp_path, 0, tmp_path)

    async def scenario() -> int:
        received = 0
        output = log.follow()
        first = asyncio.ensure_future(anext(output))
        while not first.done():
            os.write(writer, b"x")
            await asyncio.sleep(0.01)
        for _ in range(400):
            await in_thread(os.write, writer, b"x" * 65535 + b"\n")

        async def read() -> None:
            nonlocal received
            async for _, data in output:
                received += len(data)

        with pytest.raises(FailedPrecondition, match="too slowly"):
            await read()
        os.close(writer)
        await log.finish()
        return received

    assert 0 < asyncio.run(scenario()) < 400 * 65536
    assert len((tmp_path / "log").read_bytes()) > 400 * 65536


def test_c_x4_a_log_stays_in_its_directory_while_somebody_swaps_it_for_a_link(tmp_path: Path) -> None:
    """As a container can that has the node's logs mounted. Rotation opens the log again and again meanwhile."""
    secret, pod, bundle = tmp_path / "secret", tmp_path / "pod", tmp_path / "bundle"
    for directory in (secret, pod, pod / DIRECTORY, bundle):
        directory.mkdir()
    (secret / "0.log").write_text("of the host")
    log, writer = make_log(bundle, 100, pod, f"{DIRECTORY}/0.log")

    async def run() -> None:
        async def rotate() -> None:
            for _ in range(200):
                with contextlib.suppress(InvalidArgument):
                    await log.reopen()
                os.write(writer, b"x\n")

        loop = asyncio.get_running_loop()
        with Swapper(str(pod), secret) as swapper:
            await asyncio.to_thread(swapper.race, lambda: asyncio.run_coroutine_threadsafe(rotate(), loop).result(), 20_000)
        os.close(writer)
        await log.finish()

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
