"""Exec, attach and port-forward with a real container: runc under conmon."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgsvc.base import kernel
from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, NotFound, Unavailable
from imgsvc.runtime.handlers.oci.attach import AttachTarget
from imgsvc.runtime.handlers.oci.exec import MAX_SYNC_OUTPUT, ExecFailed, ExecResult, ExecTarget, exec_process, exec_sync
from imgsvc.runtime.processes.reaper import Reaper
from imgsvc.runtime.streaming.interfaces import ContainerProcess, Streams, StreamWants
from imgsvc.runtime.streaming.port_target import PodPorts
from tests.runtime.streaming.targets import ALL, OUTPUT, TERMINAL
from tests.runtime.streaming.test_forward import open_pair
from tests.runtime.streaming.test_server import BIG, TRANSPORTS, Runner, serving
from tests.support.raw_container import RawContainer, raw_container
from tests.support.stream_client import SpdyClient, run_spdy, spdy_session, websocket_session
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.compat]
INPUT_OUTPUT = StreamWants(stdin=True, stdout=True, stderr=False, tty=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("conmon", "busybox"):
        if not shutil.which(needed):
            pytest.skip(f"{needed} is not installed")
    return tmp_path_factory.mktemp("streaming")


@pytest.fixture(scope="module", params=["runc", "crun"])
def program(request: pytest.FixtureRequest) -> str:
    """The OCI runtime."""
    name = str(request.param)
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    # crun refuses cgroup v1 with a unified hierarchy that has controllers beside it.
    if name == "crun" and Path("/sys/fs/cgroup/unified/cgroup.controllers").exists():
        pytest.skip("crun does not work with hybrid cgroups")
    return name


@pytest.fixture(scope="module", autouse=True)
def subreaper() -> Iterator[None]:
    """As the daemon: what a runtime leaves behind becomes our child."""
    kernel.become_subreaper()
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


@pytest.fixture(scope="module")
def container(directory: Path, program: str) -> Iterator[RawContainer]:
    with raw_container(directory, "sh", "-c", "while true; do sleep 1000; done", program=program) as running:
        yield running


def seam(running: RawContainer) -> ContainerProcess:
    return ContainerProcess(running.container_id, running.runtime, running.process, running.attach_socket, running.ctl_fifo, Reaper())


def shell(running: RawContainer, script: str, *, terminal: bool = False) -> ExecTarget:
    return ExecTarget(seam(running), ("sh", "-c", script), terminal, running.ctl_fifo.parent)


def sync(running: RawContainer, *command: str, timeout_s: float = 0.0, **more: Any) -> ExecResult:
    return asyncio.run(exec_sync(seam(running), command, timeout_s=timeout_s, scratch=running.ctl_fifo.parent, **more))


def footprint(running: RawContainer) -> tuple[int, int, int, int]:
    """What a session could leave: our descriptors and threads, processes in the container, files in the scratch directory."""
    with contextlib.suppress(ChildProcessError):  # orphans that nobody waits for are the reaper's business
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    scratch = len(list(running.ctl_fifo.parent.glob("exec-*")))
    threads = sum(not thread.name.startswith("shared") for thread in threading.enumerate())  # a pool keeps its own for the next call
    return len(os.listdir("/proc/self/fd")), threads, len(running.processes()), scratch


@contextlib.contextmanager
def leaves_nothing(running: RawContainer) -> Iterator[None]:
    before = footprint(running)
    yield
    deadline = time.monotonic() + 60
    while footprint(running) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    after = footprint(running)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def test_exec_process_is_the_container_s_with_another_command() -> None:
    container = {"args": ["sleep"], "env": ["A=1"], "user": {"uid": 7}, "consoleSize": {"width": 1}, "terminal": False}
    assert exec_process(container, ["ls", "-l"], terminal=False) == {
        "args": ["ls", "-l"],
        "env": ["A=1"],
        "user": {"uid": 7},
        "terminal": False,
    }
    assert exec_process(container, ["sh"], terminal=True)["env"] == ["A=1", "TERM=xterm"]
    assert exec_process({"env": ["TERM=linux"]}, ["sh"], terminal=True)["env"] == ["TERM=linux"]


@TRANSPORTS
def test_exec_50_mb_each_way_byte_for_byte(container: RawContainer, run: Runner) -> None:
    sent = random.Random(3).randbytes(BIG)

    async def scenario() -> None:
        async with serving() as server:
            ended = await run(server.exec_url(shell(container, "cat; echo end >&2; exit 4"), ALL), ("stdin", "stdout", "stderr"), sent)
            assert ended.stdout == sent
            assert (ended.stderr, ended.exit_code) == (b"end\n", 4)

    with leaves_nothing(container):
        asyncio.run(scenario())


def test_exec_without_stdin_reads_nothing(container: RawContainer) -> None:
    async def scenario() -> None:
        async with serving() as server:
            ended = await run_spdy(server.exec_url(shell(container, "wc -c; env"), OUTPUT), ("stdout", "stderr"))
            assert ended.stdout.startswith(b"0\n")
            assert b"FROM=container" in ended.stdout

    asyncio.run(scenario())


def test_a_command_that_does_not_read_its_input_still_ends(container: RawContainer) -> None:
    async def scenario() -> None:
        async with serving() as server:
            url = server.exec_url(shell(container, "exit 9"), INPUT_OUTPUT)
            ended = await run_spdy(url, ("stdin", "stdout"), bytes(20_000_000))
            assert ended.exit_code == 9

    with leaves_nothing(container):
        asyncio.run(scenario())


async def terminal(client: SpdyClient) -> dict[str, int]:
    return {role: await client.open({"streamtype": role}) for role in ("error", "stdin", "stdout", "resize")}


def test_exec_with_terminal_and_resize(container: RawContainer) -> None:
    async def scenario() -> None:
        async with serving() as server:
            url = server.exec_url(ExecTarget(seam(container), ("sh",), True, container.ctl_fifo.parent), TERMINAL)
            async with spdy_session(url) as client:
                ids = await terminal(client)
                seen = client.state.received[ids["stdout"]]
                await client.write(ids["resize"], b'{"Width":101,"Height":33}')
                await client.until(lambda _: b"#" in seen)
                await client.write(ids["stdin"], b"stty size; tty\n")
                await client.until(lambda _: b"33 101" in seen and b"/dev/pts/" in seen)
                await client.write(ids["resize"], b'{"Width":77,"Height":55}')
                await until_size(client, ids["stdin"], seen, b"55 77")
                await client.write(ids["stdin"], b"sleep 1000\n")
                await asyncio.sleep(0.2)
                await client.write(ids["stdin"], b"\x03")  # ^C
                await client.write(ids["stdin"], b"exit 5\n")
                await client.until(lambda s: s.ended >= set(ids.values()))
                assert json.loads(client.state.received[ids["error"]])["details"]["causes"][0]["message"] == "5"

    with leaves_nothing(container):
        asyncio.run(scenario())


async def until_size(client: SpdyClient, stdin: int, seen: bytearray, size: bytes) -> None:
    for _ in range(300):
        await client.write(stdin, b"stty size\n")
        await asyncio.sleep(0.1)
        if size in seen:
            return
    raise AssertionError(bytes(seen))


def test_end_of_input_on_a_terminal_is_ctrl_d(container: RawContainer) -> None:
    async def scenario() -> None:
        async with serving() as server, spdy_session(server.exec_url(shell(container, "cat; exit 6", terminal=True), TERMINAL)) as client:
            ids = await terminal(client)
            await client.write(ids["stdin"], b"line\n")
            await client.until(lambda s: s.received[ids["stdout"]].count(b"line") == 2)  # echoed, and written
            await client.write(ids["stdin"], b"", fin=True)
            await client.until(lambda s: s.ended >= set(ids.values()))
            assert b'"6"' in client.state.received[ids["error"]]

    asyncio.run(scenario())


@pytest.mark.parametrize("wants", [OUTPUT, TERMINAL], ids=["pipes", "terminal"])
def test_c_c8_execs_of_a_missing_binary_leave_nothing(container: RawContainer, wants: StreamWants) -> None:
    roles = ("stdin", "stdout", "resize") if wants.tty else ("stdout", "stderr")

    async def one(server: Any) -> None:
        target = ExecTarget(seam(container), ("no-such-program",), wants.tty, container.ctl_fifo.parent)
        ended = await run_spdy(server.exec_url(target, wants), roles)
        assert ended.status["reason"] == "InternalError"
        assert "no-such-program" in ended.status["message"]

    async def scenario() -> None:
        async with serving() as server:
            for _ in range(5):
                await asyncio.gather(*(one(server) for _ in range(4)))

    with leaves_nothing(container):
        asyncio.run(scenario())


@pytest.mark.parametrize("ignore_hangup", [False, True])
def test_c_c8_a_client_that_vanishes_takes_its_process_along(container: RawContainer, ignore_hangup: bool) -> None:
    script = "trap '' HUP; echo up; sleep 1000 & wait" if ignore_hangup else "echo up; sleep 1000 & wait"

    async def scenario() -> None:
        async with serving() as server:
            async with websocket_session(server.exec_url(shell(container, script), OUTPUT)) as client:
                await client.until(lambda: client.channels[1] == b"up\n")
            await until(lambda: not server._sessions)

    with leaves_nothing(container):
        asyncio.run(scenario())


@pytest.mark.parametrize("script", ["sleep 1000 & echo done", "(while echo noise; do sleep 0.01; done) & sleep 0.1; echo done"])
def test_c_c7_output_is_not_awaited_from_processes_that_stay_behind(container: RawContainer, script: str) -> None:
    before = container.processes()
    started = time.monotonic()
    result = sync(container, "sh", "-c", script, drain_s=0.5)
    assert time.monotonic() - started < 60
    assert result.exit_code == 0
    assert b"done\n" in result.stdout
    for pid in set(container.processes()) - set(before):
        with contextlib.suppress(ProcessLookupError):  # one that came and went
            os.kill(pid, signal.SIGKILL)


def test_late_output_within_the_drain_time_is_delivered(container: RawContainer) -> None:
    result = sync(container, "sh", "-c", "(sleep 0.3; echo late) & echo early", drain_s=5.0)
    assert result.stdout == b"early\nlate\n"


def test_exec_sync(container: RawContainer) -> None:
    assert sync(container, "sh", "-c", "echo out; echo err >&2; exit 3") == ExecResult(b"out\n", b"err\n", 3)


def test_exec_sync_by_signal(container: RawContainer) -> None:
    assert sync(container, "sh", "-c", "kill -KILL $$").exit_code == 137


def test_c_c7_exec_sync_timeout_kills_the_process_group(container: RawContainer) -> None:
    with leaves_nothing(container):
        before = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            sync(container, "sh", "-c", "trap '' HUP TERM; sleep 1000 & sleep 1000; wait", timeout_s=0.5)
        assert time.monotonic() - before < 60


def test_c_c7_exec_sync_output_is_bounded_and_the_rest_is_drained(container: RawContainer) -> None:
    script = f"head -c {MAX_SYNC_OUTPUT * 4} /dev/zero; head -c {MAX_SYNC_OUTPUT + 1} /dev/zero >&2; exit 2"
    result = sync(container, "sh", "-c", script)
    assert (len(result.stdout), len(result.stderr), result.exit_code) == (MAX_SYNC_OUTPUT, MAX_SYNC_OUTPUT, 2)


def test_exec_sync_of_a_missing_binary_is_an_error(container: RawContainer) -> None:
    with leaves_nothing(container), pytest.raises(ExecFailed, match="no-such-program"):
        sync(container, "no-such-program")


def test_exec_in_a_container_that_is_gone_is_an_error(container: RawContainer) -> None:
    gone = ContainerProcess("gone", container.runtime, container.process, container.attach_socket, container.ctl_fifo, Reaper())
    with pytest.raises(ExecFailed, match="cannot start the command"):
        asyncio.run(exec_sync(gone, ("true",), timeout_s=0, scratch=container.ctl_fifo.parent))


def test_exec_without_runtime_says_so(container: RawContainer) -> None:
    nothing = ContainerProcess("c", ("/no/runtime",), container.process, container.attach_socket, container.ctl_fifo, Reaper())
    with leaves_nothing(container), pytest.raises(NotFound, match="/no/runtime"):
        asyncio.run(exec_sync(nothing, ("true",), timeout_s=0, scratch=container.ctl_fifo.parent))


def test_200_parallel_execs_leave_nothing(container: RawContainer) -> None:
    async def one(n: int) -> ExecResult:
        return await exec_sync(seam(container), ("echo", str(n)), timeout_s=110, scratch=container.ctl_fifo.parent)

    async def scenario() -> list[ExecResult]:
        return await asyncio.gather(*(one(n) for n in range(200)))

    with leaves_nothing(container):
        results = asyncio.run(scenario())
    assert [r.stdout for r in results] == [b"%d\n" % n for n in range(200)]


def test_port_forward_into_the_pod(container: RawContainer) -> None:
    listener = shell(container, "nc -l -p 8080 -e cat & wait")

    async def scenario() -> None:
        async with serving() as server, websocket_session(server.exec_url(listener, OUTPUT)):
            url = server.port_forward_url(PodPorts(container.netns), [])
            await until_listening(container, 8080)
            async with spdy_session(url, "portforward.k8s.io") as client:
                data, error = await open_pair(client, 8080, 0)
                await client.write(data, b"through the namespace", fin=True)
                await client.until(lambda s: s.ended >= {data, error})
                assert client.state.received[data] == b"through the namespace"
                assert client.state.received[error] == b""

    with leaves_nothing(container):
        asyncio.run(scenario())


async def until_listening(running: RawContainer, port: int) -> None:
    await until(lambda: f":{port:04X} 0" in Path(f"/proc/{running.pid}/net/tcp").read_text() + tcp6(running))


def tcp6(running: RawContainer) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{running.pid}/net/tcp6").read_text()
    return ""


def test_a_closed_port_is_an_error_with_its_cause(container: RawContainer) -> None:
    with pytest.raises(Unavailable, match="port 9 in the pod: Connection refused"):
        asyncio.run(PodPorts(container.netns).connect(9))


def test_port_forward_to_a_pod_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        asyncio.run(PodPorts(tmp_path / "gone").connect(80))


def test_attach_output_input_and_end(directory: Path, program: str) -> None:
    async def scenario(running: RawContainer) -> None:
        async with serving() as server:
            url = server.attach_url(AttachTarget(seam(running)), ALL)
            ended = await run_spdy(url, ("stdin", "stdout", "stderr"), b"one\ntwo\n")
            assert ended.stdout == b"got one\ngot two\n"
            assert ended.stderr == b"end\n"
            assert ended.exit_code == 0

    with raw_container(
        directory, "sh", "-c", "while read x; do echo got $x; done; echo end >&2", stdin=True, stdin_once=True, program=program
    ) as running:
        asyncio.run(scenario(running))


def test_attach_large_input_byte_for_byte(directory: Path, program: str) -> None:
    sent = random.Random(4).randbytes(20_000_000)

    async def scenario(running: RawContainer) -> None:
        async with serving() as server:
            ended = await run_spdy(server.attach_url(AttachTarget(seam(running)), INPUT_OUTPUT), ("stdin", "stdout"), sent)
            assert ended.stdout.split()[0].decode() == hashlib.sha256(sent).hexdigest()

    with raw_container(directory, "sha256sum", stdin=True, stdin_once=True, program=program) as running:
        asyncio.run(scenario(running))


def test_50_clients_attach_and_leave_nothing(container: RawContainer) -> None:
    async def scenario() -> None:
        async with serving() as server, contextlib.AsyncExitStack() as stack:
            urls = [server.attach_url(AttachTarget(seam(container)), OUTPUT) for _ in range(50)]
            await asyncio.gather(*(stack.enter_async_context(websocket_session(url)) for url in urls))
            await until(lambda: len(server._sessions) == 50)

    with leaves_nothing(container):
        asyncio.run(scenario())


def test_two_clients_see_the_same_output(directory: Path, program: str) -> None:
    async def scenario(running: RawContainer) -> None:
        async with serving() as server:
            target = AttachTarget(seam(running))
            async with (
                websocket_session(server.attach_url(target, OUTPUT)) as first,
                websocket_session(server.attach_url(target, ALL)) as second,
            ):
                await until(lambda: len(server._sessions) == 2)
                while not (first.channels[1] and second.channels[1]):  # conmon sends from the moment it has accepted
                    await second.write(0, b"hello\n")
                    await asyncio.sleep(0.2)
                for client in (first, second):
                    assert set(bytes(client.channels[1]).split(b"\n")[:-1]) == {b"hello"}

    with raw_container(directory, "cat", stdin=True, program=program) as running:
        asyncio.run(scenario(running))


def test_attach_to_a_terminal_with_resize(directory: Path, program: str) -> None:
    async def scenario(running: RawContainer) -> None:
        async with serving() as server, spdy_session(server.attach_url(AttachTarget(seam(running)), TERMINAL)) as client:
            ids = await terminal(client)
            await client.write(ids["resize"], b'{"Width":120,"Height":40}')
            await until_size(client, ids["stdin"], client.state.received[ids["stdout"]], b"40 120")
            await client.write(ids["stdin"], b"exit\n")
            await client.until(lambda s: s.ended >= set(ids.values()))
            assert json.loads(client.state.received[ids["error"]])["status"] == "Success"

    with raw_container(directory, "sh", tty=True, program=program) as running:
        asyncio.run(scenario(running))


def test_attach_to_a_container_that_has_ended_is_an_error(directory: Path) -> None:
    gone = ContainerProcess("gone", ("runc",), {}, directory / "gone" / "attach", directory / "gone" / "ctl", Reaper())

    async def scenario() -> None:
        with pytest.raises(FailedPrecondition):
            await AttachTarget(gone).run(Streams())

    asyncio.run(scenario())
