"""The process that fetches blobs for the daemon: what is said to it, and what becomes of both when one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.base.confinement import STRANGER
from imgsvc.base.errors import ImgsvcError, Internal, InvalidArgument
from imgsvc.base.oci import KIB, MIB
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.bulk import BulkTransport
from imgsvc.registry.http.bulk_messages import (
    COUNT,
    LOT,
    MAX_END,
    Head,
    Order,
    pack_end,
    pack_head,
    pack_order,
    unpack_end,
    unpack_head,
    unpack_order,
)
from imgsvc.registry.http.exchange import RequestFailed, Route, Timeouts, reach_behind, read_body
from imgsvc.registry.http.netguard import Reach
from imgsvc.registry.http.sender import Sender
from imgsvc.registry.retry import Failure
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.support import APART, QUICK, MemorySink, blob, client_for, hosts_d, image_of, noise, run
from tests.registry.test_download import APP
from tests.support.vigil import children
from tests.support.waiting import until

DATA = noise(5 * MIB + 321)
ROUTE = Route(Tls())

texts = st.text(max_size=40)
pairs = st.lists(st.tuples(texts, texts), max_size=4).map(tuple)
routes = st.builds(
    Route,
    tls=st.builds(Tls, ca=st.lists(texts, max_size=2).map(tuple), client=pairs, skip_verify=st.none() | st.booleans()),
    proxy=texts,
    connect_timeout=st.none() | st.floats(0, 60),
    reachable=st.frozensets(st.sampled_from(Reach)),
)
seconds = st.floats(0.001, 1000)
failures = st.builds(
    RequestFailed,
    texts,
    code=st.sampled_from(["UNAVAILABLE", "NOT_FOUND"]),
    failure=st.sampled_from(Failure),
    phase=texts,
    status=st.integers(0, 599),
    where=texts,
    hint=texts,
    wait=st.none() | seconds,
    is_plain_http=st.booleans(),
    is_silent=st.booleans(),
)
others = st.sampled_from([InvalidArgument, Internal]).flatmap(lambda kind: st.builds(kind, texts, where=texts, hint=texts))


@given(st.builds(Order, texts, texts, pairs, routes, texts, st.builds(Timeouts, seconds, seconds, seconds)))
def test_an_order_arrives_as_it_was(order: Order) -> None:
    assert unpack_order(pack_order(order)) == order


@given(st.builds(Head, st.integers(100, 599), pairs, st.sampled_from(Reach)))
def test_a_head_arrives_as_it_was(head: Head) -> None:
    assert unpack_head(pack_head(head)) == head


@given(failures | others)
def test_a_failure_arrives_as_it_was(error: ImgsvcError) -> None:
    for unpack in (unpack_end, unpack_head):
        with pytest.raises(type(error)) as caught:
            unpack(pack_end(error))
        assert vars(caught.value) == vars(error)


def test_no_message_is_taken_for_a_lot_and_none_is_too_long() -> None:
    unpack_end(pack_end())
    assert len(pack_end()) != COUNT
    long = RequestFailed("\0" * MIB, code="UNAVAILABLE", failure=Failure.BROKEN, phase="fetch", where="\u1234" * MIB, hint="x" * MIB)
    assert COUNT < len(pack_end(long)) <= MAX_END


@asynccontextmanager
async def started(*, warm: bool = False) -> AsyncIterator[Sender]:
    transport = BulkTransport()
    if warm:
        await transport.warm()
    sender = Sender(transport, QUICK)
    try:
        yield sender
    finally:
        await sender.close()


def workers() -> list[int]:
    """The processes of this one that fetch."""
    return [pid for pid in children(os.getpid()) if b"bulk_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def worker() -> int:
    """The one there is; right after its start, /proc may not list it yet."""
    await until(workers, 10)
    return workers()[0]


def is_dead(pid: int) -> bool:
    """Gone, or waiting to be asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


async def body(bulk: Sender, url: str) -> bytes:
    async with aclosing(await bulk.send("GET", url, [], route=ROUTE, phase="fetch")) as response:
        return await read_body(response, 64 * MIB)


@pytest.mark.parametrize("size", [0, 1, COUNT, LOT - 1, LOT, LOT + 1, 5 * LOT, 7 * LOT + 3])
def test_a_body_of_any_size(size: int) -> None:
    async def main() -> None:
        data = noise(size)
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {"X-Word": "z\u00fc"}, data)))
            async with (
                started() as bulk,
                aclosing(await bulk.send("GET", f"{fake.url}/x", [("X-Asked", "1")], route=ROUTE, phase="fetch")) as response,
            ):
                assert (response.status_code, response.headers.get("x-word"), reach_behind(response)) == (200, "z\u00fc", Reach.LOOPBACK)
                assert await read_body(response, 64 * MIB) == data
            assert fake.requests[0].headers["x-asked"] == "1"
        assert not workers()

    run(main())


def test_bodies_at_once_do_not_mix() -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            bodies = {f"/{n}": noise(300 * KIB * n + n, seed=n) for n in range(1, 9)}
            for path, data in bodies.items():
                fake.rule(fake.on(path, Reply(200, {}, data)))
            async with started() as bulk:
                assert await asyncio.gather(*(body(bulk, fake.url + path) for path in bodies)) == list(bodies.values())

    run(main())


def test_what_has_come_is_told_although_no_more_comes(tmp_path: Path) -> None:
    """A layer is unpacked, and kept, as far as it has come, not as far as lots are full."""

    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {"Content-Length": "5000"}, noise(5000), stall_at=1234)))
            async with started() as bulk:
                bulk.timeouts = Timeouts(stall=60)
                async with aclosing(await bulk.send("GET", f"{fake.url}/x", [], route=ROUTE, phase="fetch")) as response:
                    assert bytes(await asyncio.wait_for(anext(response.aiter_raw()), 5)) == noise(5000)[:1234]

    run(main())


def test_closing_early_closes_the_connection_and_nothing_else() -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/long", Reply(200, {}, noise(40 * MIB))))
            fake.rule(fake.on("/x", Reply(200, {}, DATA)))
            async with started() as bulk:
                async with aclosing(await bulk.send("GET", f"{fake.url}/long", [], route=ROUTE, phase="fetch")) as response:
                    assert await anext(response.aiter_raw())
                assert await body(bulk, f"{fake.url}/x") == DATA
                pid = await worker()
                await until(lambda: not connections(pid, fake.port), 5)

    run(main())


@pytest.mark.root
def test_the_process_cannot_change_how_much_memory_it_shares_with_the_daemon() -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {}, DATA)))
            async with started() as bulk, aclosing(await bulk.send("GET", f"{fake.url}/x", [], route=ROUTE, phase="fetch")):
                here = [entry for entry in Path("/proc/self/map_files").iterdir() if "imgsvc-body" in os.readlink(entry)]
                assert here
                for entry in here:
                    for size in (0, 64 * MIB):
                        with entry.open("r+b") as memory, pytest.raises(PermissionError):
                            memory.truncate(size)

    run(main())


def connections(pid: int, port: int) -> list[str]:
    """TCP connections of a process to a port that have unread bytes in them, as one whose answer nobody reads any more."""
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [fields[2] for fields in lines if fields[2].endswith(f":{port:04X}") and int(fields[4].partition(":")[2], 16)]


def test_a_killed_process_is_a_failure_that_may_be_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {}, DATA, stall_at=MIB)))
            async with started() as bulk:
                async with aclosing(await bulk.send("GET", f"{fake.url}/x", [], route=ROUTE, phase="fetch")) as response:
                    os.kill(await worker(), signal.SIGKILL)
                    with pytest.raises(RequestFailed, match="download process ended") as caught:
                        await read_body(response, 64 * MIB)
                assert (caught.value.failure, caught.value.phase, caught.value.where) == (Failure.BROKEN, "fetch", f"{fake.url}/x")
                assert "out-of-memory" in caught.value.hint

    run(main())


@pytest.mark.parametrize("when", ["before the head", "in the body"])
def test_a_process_that_hangs_is_killed_and_the_next_request_gets_another(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    async def main() -> None:
        monkeypatch.setattr("imgsvc.registry.http.bulk._GRACE_S", 0.2)
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {}, DATA)))
            async with started(warm=True) as bulk:
                patience = 0.2 if when == "before the head" else 10.0  # the head has to come, however busy the machine is
                bulk.timeouts = Timeouts(connect=patience, headers=patience, stall=0.2)
                pid = await worker()
                if when == "before the head":
                    os.kill(pid, signal.SIGSTOP)
                    with pytest.raises(RequestFailed, match="does not answer"):
                        await body(bulk, f"{fake.url}/x")
                else:
                    async with aclosing(await bulk.send("GET", f"{fake.url}/x", [], route=ROUTE, phase="fetch")) as response:
                        os.kill(pid, signal.SIGSTOP)
                        with pytest.raises(RequestFailed, match="does not answer") as caught:
                            await read_body(response, 64 * MIB)
                    assert (caught.value.code, caught.value.failure) == ("DEADLINE_EXCEEDED", Failure.BROKEN)
                await until(lambda: is_dead(pid), 5)
                bulk.timeouts = QUICK
                assert await body(bulk, f"{fake.url}/x") == DATA

    run(main())


def test_a_download_goes_on_with_another_process(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry(rate=8 * MIB) as fake:
            fake.add(image_of(DATA), APP.repository)
            fake.add_blob(DATA)
            hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}"]\n'})
            sink = MemorySink(len(DATA))
            async with client_for(tmp_path) as client:
                download = asyncio.create_task(client.fetcher(APP).download(blob(DATA), sink))
                for _ in range(2):
                    seen = len(sink.writes)
                    await until(lambda seen=seen: len(sink.writes) > seen, 10)  # type: ignore[misc]
                    os.kill(await worker(), signal.SIGKILL)
                await download
            assert bytes(sink.data) == DATA

    token = APART.set(True)
    try:
        run(main())
    finally:
        APART.reset(token)


def test_a_process_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(sys, "executable", "/absent/python")
        async with started() as bulk:
            with pytest.raises(ImgsvcError, match="no download process: No such file") as caught:
                await body(bulk, "http://127.0.0.1:9/")
            assert (caught.value.code, caught.value.where) == ("UNAVAILABLE", "/absent/python")

    run(main())


def test_files_that_tls_cannot_use_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        bad = tmp_path / "bad.pem"
        bad.write_text("no PEM")
        async with started() as bulk:
            with pytest.raises(InvalidArgument) as caught:
                await bulk.send("GET", "https://127.0.0.1:9/", [], route=Route(Tls(ca=(str(bad),))), phase="fetch")
            assert caught.value.where == str(bad)

    run(main())


def test_too_long_a_request_is_refused_and_others_go_on() -> None:
    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {}, DATA)))
            async with started() as bulk:
                for _ in range(2):
                    with pytest.raises(RequestFailed, match="the request has"):
                        await bulk.send("GET", f"{fake.url}/x", [("X-Long", "y" * MIB)], route=ROUTE, phase="fetch")
                    with pytest.raises(RequestFailed, match="the address has"):
                        await bulk.send("GET", f"{fake.url}/{'y' * MIB}", [], route=ROUTE, phase="fetch")
                    assert await body(bulk, f"{fake.url}/x") == DATA

    run(main())


def test_many_orders_at_once_all_get_there() -> None:
    """More than the control socket holds."""

    async def main() -> None:
        with FakeRegistry() as fake:
            fake.rule(fake.on("/x", Reply(200, {}, b"ok")))
            async with started(warm=True) as bulk:
                os.kill(await worker(), signal.SIGSTOP)
                header = [("X-Long", "l" * 20_000)]
                sends = [asyncio.ensure_future(bulk.send("GET", f"{fake.url}/x", header, route=ROUTE, phase="fetch")) for _ in range(40)]
                await asyncio.sleep(0.2)
                os.kill(await worker(), signal.SIGCONT)
                for response in await asyncio.gather(*sends):
                    assert await read_body(response, 10) == b"ok"
                    await response.aclose()

    run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
def test_the_process_gives_up_what_it_does_not_need() -> None:
    async def main() -> None:
        async with started(warm=True):
            pid = await worker()
            await until(lambda: f"Uid:\t{STRANGER}\t" in Path(f"/proc/{pid}/status").read_text(), 10)
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
            assert os.getpriority(os.PRIO_PROCESS, pid) >= 10

    run(main())


def test_the_process_ends_with_its_daemon() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "imgsvc.registry.http.bulk_worker", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process, ours:
        theirs.close()
        ours.close()
        assert process.wait(10) == 0
