"""Many pulls at once, callers that leave, workers that die: nothing leaks, and all slots are there for the next one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Final

import grpc
import pytest

from imgsvc.base.oci import MIB
from tests.e2e.attack import SETTINGS, Node
from tests.fakes.registry import FakeRegistry
from tests.snapshot.layers import Entry, tar
from tests.support import images
from tests.support.daemon import Daemon
from tests.support.images import Layer
from tests.support.registries import RealRegistry
from tests.support.vigil import Vigil, at_rest, eventually, held, threads, workers

pytestmark = pytest.mark.root

UNPACKS: Final = 2  # images.max_concurrent_unpacks, as configured by default
GONE: Final = 1.0  # [seconds] until the work of the last caller that left is over


@pytest.fixture
def node(make_daemon: Callable[..., Daemon], registry: RealRegistry) -> Iterator[Node]:
    """A node whose workers take their time, and that is idle again at the end."""
    daemon = make_daemon(settings=SETTINGS)
    daemon.map_host("docker.io", registry.address)
    daemon.start({"IMGSVC_FAILPOINTS": "unpack.entry=delay:2"})
    made = Node(daemon, registry, daemon.directory)
    warm = {str(n): [_layer(f"warm {n}", 3)] for n in range(6)} | {"broken": [b"x" * 512]}
    made.pull_all(warm)
    holds, running = at_rest(daemon), threads(daemon.pid)
    yield made
    eventually(lambda: {**held(daemon), "unfinished writes": []}, holds)
    assert threads(daemon.pid) <= running + 8
    assert "internal error" not in daemon.log
    assert "Traceback" not in daemon.log


def _layer(text: str, entries: int = 100, size: int = 10) -> Layer:
    return images.layer(tar([Entry(f"{text}/{n}", data=os.urandom(size)) for n in range(entries)]))


def test_many_pulls_at_once_of_images_that_share_layers_and_half_of_the_callers_leave(node: Node) -> None:
    """20 calls for 10 images; of every image one caller leaves, which must not disturb the other one."""
    base, middle = _layer("base", 300), _layer("middle", 300)
    names = [node.push(base, middle, _layer(f"own {n}")) for n in range(10)]
    stay = [node.start(name) for name in names]
    leave = [node.start(name) for name in names]
    with Vigil(node.daemon) as vigil:
        time.sleep(0.3)
        for call in leave:
            call.cancel()
        outcomes = [node.outcome(call, name) for call, name in zip(stay, names, strict=True)]
    assert [outcome.refused for outcome in outcomes] == [False] * 10
    assert vigil.slowest < 1
    for number, outcome in enumerate(outcomes):
        assert {path.partition("/")[0] for path in node.tree(outcome)} == {"base", "middle", f"own {number}"}
    assert _most_workers(node) >= UNPACKS


def _most_workers(node: Node) -> int:
    """How many workers there are at once when there is more to do; those that only settle a layer come on top."""
    names = [node.push(_layer(f"slot {os.urandom(4).hex()}", 250)) for _ in range(UNPACKS + 2)]
    calls = [node.start(name) for name in names]
    most = 0
    while not all(call.done() for call in calls):
        most = max(most, len(workers(node.daemon.pid)))
        time.sleep(0.005)
    assert not [outcome for call, name in zip(calls, names, strict=True) if (outcome := node.outcome(call, name)).refused]
    return most


def _until(condition: Callable[[], object], within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _killed(node: Node, victim: Callable[[], int]) -> tuple[str, grpc.RpcError]:
    """Pull, and kill `victim` while a worker is at it, until that came in time; the image, and the call's error."""
    for _ in range(20):
        name = node.push(_layer("killed", 300), _layer("beside", 300))
        call = node.start(name)
        _until(lambda: workers(node.daemon.pid))
        with contextlib.suppress(IndexError, FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            pid = victim()
            assert pid > 1
            os.kill(pid, signal.SIGKILL)
        error = call.exception()
        if error is not None:
            assert isinstance(error, grpc.RpcError)
            assert "\n" not in (error.details() or "")
            return name, error
    raise AssertionError("no kill comes in time")


def test_a_worker_that_is_killed_is_one_clear_error_and_its_slot_comes_back(node: Node) -> None:
    """More often than there are slots: a slot that leaked would stop the pulls that follow."""
    for _ in range(UNPACKS + 1):
        name, error = _killed(node, lambda: workers(node.daemon.pid)[0])
        text = error.details() or ""
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "the unpack worker was killed" in text
        assert "sha256:" in text
        assert not node.outcome(node.start(name), name).refused
    assert _most_workers(node) >= UNPACKS


def test_a_worker_server_that_is_killed_is_started_again(node: Node) -> None:
    name, _ = _killed(node, lambda: _parent(workers(node.daemon.pid)[0]))
    assert not node.outcome(node.start(name), name).refused
    assert _most_workers(node) >= UNPACKS


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
        return int(stream.read().rpartition(")")[2].split()[1])


def test_the_last_caller_that_leaves_ends_the_unpacking_within_a_second(node: Node) -> None:
    name = node.push(_layer("first", 3000), _layer("second", 3000))
    holds = at_rest(node.daemon)
    calls = [node.start(name), node.start(name)]
    _until(lambda: len(workers(node.daemon.pid)) == UNPACKS)
    calls[0].cancel()
    time.sleep(0.5)
    assert len(workers(node.daemon.pid)) == UNPACKS  # somebody is still waiting for it
    calls[1].cancel()
    eventually(lambda: held(node.daemon), holds, within=GONE)
    assert not node.outcome(node.start(name), name).refused


def test_the_last_caller_that_leaves_ends_the_download_within_a_second(node: Node) -> None:
    """What came until then is kept for the next one, and nothing else: the registry is asked for the rest only."""
    with FakeRegistry(rate=4 * MIB) as slow:
        made = images.image([images.layer(tar([Entry("f", data=os.urandom(12 * MIB))]))])
        slow.add(made, "slow")
        node.daemon.map_host("slow.example", slow.address)
        holds = {**at_rest(node.daemon), "unfinished writes": 1}
        call = node.start("slow.example/slow:latest")
        _until(lambda: slow.sent > 4 * MIB)
        call.cancel()
        eventually(lambda: _counted(node), holds, within=GONE)
        time.sleep(0.2)  # the process that fetches has been told, and nobody waits for it
        sent = slow.sent
        time.sleep(0.5)
        assert slow.sent == sent
        assert not node.outcome(node.start("slow.example/slow:latest"), "slow").refused
        assert slow.sent - sent < 10 * MIB


def _counted(node: Node) -> dict[str, object]:
    now = held(node.daemon)
    return {**now, "unfinished writes": len(now["unfinished writes"])}
