"""Chains that run: descriptors, failures, floods, and what is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from imgsvc.base.errors import FailedPrecondition
from imgsvc.decrypt import payload
from imgsvc.decrypt.external import MAX_STDERR, ProcessorFailed, start_chain
from imgsvc.decrypt.interfaces import ChainRun
from imgsvc.decrypt.processors import Processor, plan_chain
from tests.decrypt.vectors import GZIP, TAR, seal

SEALED = seal(b"plain text")
DESCRIPTOR = SEALED.descriptor(jwe=b"packet")
T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 120))


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "blob").write_bytes(SEALED.blob)
    fd = os.open(tmp_path / "blob", os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


async def start(source: int, *scripts: str, send_payload: bool = True, env: tuple[str, ...] = ()) -> ChainRun:
    """One shell script per step."""
    types = [DESCRIPTOR.media_type, *(f"application/x-{i}" for i in range(len(scripts) - 1)), GZIP]
    steps = zip(types, types[1:], scripts, strict=False)
    table = [Processor(f"step {i}", (a,), r, "sh", ("-c", text), env) for i, (a, r, text) in enumerate(steps)]
    chain = plan_chain(table, DESCRIPTOR.media_type)
    return await start_chain(chain, DESCRIPTOR, source, send_payload=send_payload, environment=os.environ)


async def read_all(fd: int) -> bytes:
    def read() -> bytes:
        chunks = []
        while chunk := os.read(fd, 1 << 20):
            chunks.append(chunk)
        return b"".join(chunks)

    return await asyncio.to_thread(read)


async def outcome(source: int, *scripts: str, **more: Any) -> bytes:
    """The output of a chain that must succeed."""
    running = await start(source, *scripts, **more)
    try:
        output = await read_all(running.output)
        await running.wait()
        return output
    finally:
        await running.kill()


def test_bytes_pass_through_every_step_in_order(source: int) -> None:
    assert run(outcome(source, "cat; printf 1", "cat; printf 2", "cat; printf 3")) == SEALED.blob + b"123"


def test_the_payload_is_on_descriptor_three_of_encrypted_steps_only(source: int) -> None:
    first = run(outcome(source, "cat <&3", "cat; [ ! -e /proc/self/fd/3 ]"))
    value = payload.decode(first)

    assert value.descriptor == DESCRIPTOR
    assert dict(value.parameters) == {}
    assert json.loads(first[first.index(b"{") :])["DecryptConfig"] == {"Parameters": None}


def test_without_the_node_key_model_there_is_no_payload(source: int) -> None:
    assert run(outcome(source, "[ ! -e /proc/self/fd/3 ] && cat", send_payload=False)) == SEALED.blob


def test_a_step_sees_its_type_its_environment_and_no_other_descriptor(source: int) -> None:
    inherited = {fd for fd in open_fds() if os.path.exists(f"/proc/self/fd/{fd}") and os.get_inheritable(int(fd))}
    output = run(outcome(source, 'echo "$STREAM_PROCESSOR_MEDIATYPE $A"; cat >/dev/null; exec ls /proc/self/fd', env=("A=b",)))
    kind, *fds = output.decode().splitlines()

    assert kind == f"{DESCRIPTOR.media_type} b"
    assert len(set(fds) - inherited - set("0123")) == 1, "the directory that ls holds open"


def test_a_failure_carries_the_stderr_of_the_first_that_failed(source: int) -> None:
    with pytest.raises(ProcessorFailed) as caught:
        run(outcome(source, "cat", "echo >&2 'no key for it'; exit 3", "cat >/dev/null; echo >&2 'nothing came'; exit 4"))
    assert (caught.value.processor, caught.value.status, caught.value.stderr) == ("step 1", 3, "no key for it")


def test_a_step_that_lost_its_reader_is_not_the_cause(source: int) -> None:
    with pytest.raises(ProcessorFailed) as caught:
        run(outcome(source, "cat /dev/zero", "exit 5"))
    assert (caught.value.processor, caught.value.status) == ("step 1", 5)


def test_an_exit_is_awaited_even_if_it_comes_after_the_output(source: int) -> None:
    with pytest.raises(ProcessorFailed, match="too late"):
        run(outcome(source, "cat; exec >&-; sleep 0.3; echo >&2 too late; exit 1"))


def test_c_e3_stderr_is_bounded_and_made_safe(source: int) -> None:
    flood = "head -c 50000000 /dev/zero | tr '\\0' x >&2; printf '\\n\\033[31mthe end' >&2; exit 1"
    with pytest.raises(ProcessorFailed) as caught:
        run(outcome(source, flood))
    assert len(caught.value.stderr) <= MAX_STDERR + 10
    assert caught.value.stderr.endswith("\\n\\x1b[31mthe end")


def test_a_missing_program_starts_nothing(source: int) -> None:
    table = [Processor("a", (DESCRIPTOR.media_type,), "x", "cat"), Processor("b", ("x",), TAR, "no-such-program")]
    before = open_fds()
    with pytest.raises(FailedPrecondition, match="no-such-program not found"):
        run(start_chain(plan_chain(table, DESCRIPTOR.media_type), DESCRIPTOR, source, send_payload=True, environment=os.environ))
    assert open_fds() == before


def test_a_program_that_cannot_be_executed_is_an_error_and_leaks_nothing(source: int, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    table = [Processor("a", (DESCRIPTOR.media_type,), "x", "cat"), Processor("b", ("x",), TAR, str(broken))]
    before = open_fds()
    with pytest.raises(FailedPrecondition, match="cannot start"):
        run(start_chain(plan_chain(table, DESCRIPTOR.media_type), DESCRIPTOR, source, send_payload=True, environment=os.environ))
    assert open_fds() == before


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_c_e3_kill_takes_helpers_along_and_closes_everything(source: int) -> None:
    async def cancelled() -> int:
        running = await start(source, "sleep 600 & echo $!; wait", "cat")
        helper = int(await asyncio.to_thread(os.read, running.output, 100))
        await running.kill()
        await running.kill()
        return helper

    before = open_fds()
    helper = run(cancelled())
    for _ in range(100):
        if gone(helper):
            break
        signal.sigtimedwait([], 0.02)
    assert gone(helper)
    assert open_fds() == before


def test_a_large_payload_to_a_program_that_never_reads_it_blocks_nothing(source: int) -> None:
    big = seal(b"x").descriptor(jwe=b"p" * 2_000_000)
    table = [Processor("a", (big.media_type,), GZIP, "cat")]

    async def whole() -> bytes:
        running = await start_chain(plan_chain(table, big.media_type), big, source, send_payload=True, environment=os.environ)
        try:
            return await read_all(running.output)
        finally:
            await running.kill()

    assert run(whole()) == SEALED.blob


def test_a_child_has_default_signal_handling(source: int) -> None:
    script = f"{sys.executable} -S -c \"import os; print(open('/proc/self/status').read())\" | grep -E 'SigBlk|SigIgn'"
    lines = dict(line.split(":") for line in run(outcome(source, f"exec {script}; cat >/dev/null")).decode().splitlines())

    assert int(lines["SigBlk"], 16) == 0
