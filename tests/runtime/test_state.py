"""States, records, events and the small parts below them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from imgsvc.api import cri_pb2 as pb
from imgsvc.base.errors import AlreadyExists, FailedPrecondition, ImgsvcError, InvalidArgument, NotFound, ResourceExhausted
from imgsvc.base.metadb.database import MetaDB
from imgsvc.runtime.codec import fill_proto, from_json, from_proto, to_json
from imgsvc.runtime.events import MAX_WAITING, Events, EventType
from imgsvc.runtime.holder.pause_program import pause_program
from imgsvc.runtime.model import ContainerConfig, ContainerMetadata, KeyValue, NamespaceMode, PodSandboxConfig, User
from imgsvc.runtime.numbers import cgroups
from imgsvc.runtime.numbers.usage import parse_pressure
from imgsvc.runtime.processes.exits import alive, process_gone, start_time
from imgsvc.runtime.records import ContainerRecord, Records, SandboxRecord, container_name
from imgsvc.runtime.signals import cri_number, stop_signal_name, to_number
from imgsvc.runtime.state import (
    ContainerState,
    SandboxState,
    container_state,
    require_alive,
    require_ready,
    require_running,
    require_startable,
    sandbox_state,
)

NEW = ContainerRecord("c", boot_id="now")
CREATED = replace(NEW, made_at=1)
RUNNING = replace(CREATED, started_at=2)
EXITED = replace(RUNNING, finished_at=3)


@pytest.mark.parametrize(
    "record, state, startable, running, living",
    [
        (NEW, ContainerState.UNKNOWN, False, False, False),
        (CREATED, ContainerState.CREATED, True, False, True),
        (RUNNING, ContainerState.RUNNING, False, True, True),
        (EXITED, ContainerState.EXITED, False, False, False),
        (replace(CREATED, finished_at=3), ContainerState.EXITED, False, False, False),
        (replace(RUNNING, boot_id="before"), ContainerState.UNKNOWN, False, False, False),
        (replace(EXITED, boot_id="before"), ContainerState.EXITED, False, False, False),
    ],
)
def test_container_states(record: ContainerRecord, state: ContainerState, *, startable: bool, running: bool, living: bool) -> None:
    assert container_state(record, "now") is state
    for guard, allowed in ((require_startable, startable), (require_running, running), (require_alive, living)):
        if allowed:
            guard(record, "now")
        else:
            with pytest.raises(FailedPrecondition):
                guard(record, "now")


def test_sandbox_states() -> None:
    half = SandboxRecord("s", boot_id="now")
    ready = replace(half, started_at=1)
    require_ready(ready, "now")
    for record, boot in ((half, "now"), (replace(ready, stopped_at=2), "now"), (ready, "next")):
        assert sandbox_state(record, boot) is SandboxState.NOTREADY
        with pytest.raises(FailedPrecondition):
            require_ready(record, boot)


def full_config() -> ContainerConfig:
    return ContainerConfig(metadata=ContainerMetadata("c", 2), command=("a", "b"), envs=(KeyValue("K", b"\xff\0"),), labels={"x": "y"})


def test_records_survive_json_and_ignore_what_they_do_not_know() -> None:
    record = ContainerRecord("id", config=full_config(), user=User(1, 2, (3,)), exit_code=5)
    assert from_json(ContainerRecord, to_json(record)) == record
    assert from_json(ContainerRecord, to_json(record) | {"of_the_future": 1}) == record
    assert to_json(ContainerRecord("id")) == {"id": "id"}


def test_protobuf_both_ways() -> None:
    message = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="n", attempt=3),
        dns_config=pb.DNSConfig(servers=["s"]),
        port_mappings=[pb.PortMapping(host_port=5, protocol=pb.Protocol.UDP)],
        annotations={"a": "b"},
        linux=pb.LinuxPodSandboxConfig(
            security_context=pb.LinuxSandboxSecurityContext(
                run_as_user=pb.Int64Value(value=0),
                namespace_options=pb.NamespaceOption(
                    pid=pb.NamespaceMode.NODE, userns_options=pb.UserNamespace(uids=[pb.IDMapping(length=1)])
                ),
            )
        ),
    )
    config = from_proto(PodSandboxConfig, message)
    assert config.namespaces.pid is NamespaceMode.NODE
    assert config.linux.security_context.run_as_user == 0
    assert config.linux.security_context.run_as_group is None
    assert config.linux.resources is None
    assert from_proto(PodSandboxConfig, fill_proto(pb.PodSandboxConfig(), config)) == config
    unknown = pb.PodSandboxConfig()
    unknown.linux.security_context.namespace_options.pid = 77  # type: ignore[assignment]
    with pytest.raises(ValueError, match="77"):
        from_proto(PodSandboxConfig, unknown)


def test_records_are_found_by_a_beginning_and_names_are_taken_once(tmp_path: Path) -> None:
    database = MetaDB(tmp_path / "db")
    records = Records(database)
    for container_id in ("abc1", "abd2"):
        records.put_container(
            ContainerRecord(container_id, sandbox_id="s", config=ContainerConfig(ContainerMetadata(container_id)))
        ).result()
    assert records.container("abc").id == "abc1"
    for key in ("", "x"):
        with pytest.raises(NotFound):
            records.container(key)
    with pytest.raises(InvalidArgument, match="ambiguous"):
        records.container("ab")
    name = container_name("s", ContainerConfig(ContainerMetadata("abc1")))
    with pytest.raises(AlreadyExists):
        records.reserve(name, "other")
    again = Records(database)
    again.load()
    assert again.containers == records.containers
    asyncio.run(again.drop_container(again.containers["abc1"]))
    again.reserve(name, "other")
    assert [c.id for c in again.containers_of("s")] == ["abd2"]
    database.write(lambda txn: txn.put("containers", "future", {"version": 99}))
    with pytest.raises(FailedPrecondition):
        Records(database).load()
    database.close()


def test_a_step_that_did_not_reach_the_database_is_taken_from_its_note(tmp_path: Path) -> None:
    database = MetaDB(tmp_path / "db")
    pod = SandboxRecord("p", boot_id="b", created_at=1)
    made = ContainerRecord("c", sandbox_id="p", boot_id="b", created_at=1, made_at=2)
    ended = replace(made, id="e", started_at=3, finished_at=4, exit_code=9)
    other_boot = replace(made, id="o", made_at=0)
    records = Records(database)
    for known in (made, ended, other_boot):
        records.put_container(known).result()
    records.put_sandbox(pod).result()
    for name in ("pods/p", "bundles/c", "bundles/e", "bundles/o"):
        (tmp_path / name).mkdir(parents=True)
    # What was noted, but not stored: another database stands for the one that the daemon's end kept it from.
    lost_db = MetaDB(tmp_path / "lost")
    lost = Records(lost_db)
    lost.advance_sandbox(replace(pod, started_at=5), tmp_path / "pods/p")
    lost.advance_container(replace(made, started_at=6), tmp_path / "bundles/c")
    lost.advance_container(replace(ended, finished_at=0, exit_code=0, started_at=7), tmp_path / "bundles/e")
    lost.advance_container(replace(other_boot, boot_id="earlier", made_at=8), tmp_path / "bundles/o")
    lost_db.close()
    again = Records(database)
    again.load()
    again.catch_up(tmp_path / "pods", tmp_path / "bundles")
    assert again.sandboxes["p"].started_at == 5
    assert again.containers["c"].started_at == 6
    assert again.containers["e"] == ended
    assert again.containers["o"] == other_boot
    database.close()
    reopened = MetaDB(tmp_path / "db")
    final = Records(reopened)
    final.load()
    assert final.containers["c"].started_at == 6
    reopened.close()


def test_a_broken_record_is_left_alone(tmp_path: Path) -> None:
    database = MetaDB(tmp_path / "db")
    database.write(lambda txn: txn.put("sandboxes", "bad", {"version": 1, "config": 5}))
    records = Records(database)
    records.load()
    assert records.sandboxes == {}
    with database.read() as txn:
        assert txn.get("sandboxes", "bad")
    database.close()


def test_a_listener_that_does_not_read_loses_its_stream_only(tmp_path: Path) -> None:
    database = MetaDB(tmp_path / "db")
    events = Events(Records(database))

    async def scenario() -> None:
        slow, quick = events.listen(), events.listen()
        first = [asyncio.ensure_future(anext(slow)), asyncio.ensure_future(anext(quick))]
        await asyncio.sleep(0)
        for n in range(MAX_WAITING + 5):
            events.emit(EventType.CREATED, str(n), "s")
            if n % 100 == 0:
                await asyncio.sleep(0)
            if n and n < 5:
                assert (await anext(quick)).container_id == str(n)
            elif n == 0:
                assert [(await f).container_id for f in first] == ["0", "0"]
        with pytest.raises(ResourceExhausted):
            async for _ in slow:
                pass

    asyncio.run(scenario())
    database.close()


@pytest.mark.parametrize(
    "requested, image, name",
    [
        (0, "", "SIGTERM"),
        (0, "SIGQUIT", "SIGQUIT"),
        (0, "quit", "SIGQUIT"),
        (0, "nonsense", "SIGTERM"),
        (0, "99999", "SIGTERM"),
        (0, "9", "9"),
        (13, "SIGQUIT", "SIGKILL"),
    ],
)
def test_stop_signals(requested: int, image: str, name: str) -> None:
    assert stop_signal_name(requested, image) == name


def test_signals_agree_with_cri() -> None:
    for number in pb.Signal.values():
        name = pb.Signal.Name(number).removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-")
        if number:
            assert cri_number(name) == number
            assert 1 <= to_number(name) <= 64


def test_process_identity() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(child.pid)
    assert alive(child.pid, started)
    assert not alive(child.pid, started + 1)  # another process under the same number

    async def scenario() -> float:
        begin = time.monotonic()
        waiting = asyncio.ensure_future(process_gone(child.pid, started))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        child.communicate(b"\n")
        await asyncio.wait_for(waiting, 5)
        await process_gone(child.pid, started)
        return time.monotonic() - begin

    assert asyncio.run(scenario()) < 5


def test_the_pause_program() -> None:
    assert len(pause_program("x86_64")) < 256
    assert pause_program("aarch64")[18:20] == b"\xb7\x00"
    with pytest.raises(ImgsvcError):
        pause_program("vax")


def test_pressure_files() -> None:
    text = "some avg10=1.50 avg60=2.00 avg300=0.10 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=6\n"
    stalls = parse_pressure(text)
    assert (stalls.some.total, stalls.some.avg10, stalls.full.total) == (12345, 1.5, 6)


def test_cgroup_paths_of_both_drivers() -> None:
    assert cgroups.runtime_path("/kubepods/pod1", "s", "c", systemd=False) == "/kubepods/pod1/c"
    assert cgroups.runtime_path("", "s", "c", systemd=False) == "/imgsvc/s/c"
    parent = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice"
    path = cgroups.runtime_path(parent, "s", "c", systemd=True)
    assert path == "kubepods-besteffort-pod1.slice:imgsvc:c"
    assert cgroups.tree_path(path) == f"{parent}/imgsvc-c.scope"
    assert cgroups.tree_path("/kubepods/pod1/c") == "/kubepods/pod1/c"
    with pytest.raises(ImgsvcError):
        cgroups.runtime_path("/kubepods/pod1", "s", "c", systemd=True)


@pytest.mark.parametrize(
    "old, holder, pid",
    [
        ({"started_at": 1, "pause_pid": 7, "pause_start": 8}, "pause", 7),
        ({"started_at": 1, "sandboxer": "shim", "pause_pid": 7, "pause_start": 8}, "shim", 7),
        ({"started_at": 1, "sandboxer": "shim"}, "shim", 0),
        ({"started_at": 1}, "namespaces", 0),
        ({}, "pause", 0),
    ],
)
def test_sandboxes_of_version_1_have_a_holder(tmp_path: Path, old: dict[str, object], holder: str, pid: int) -> None:
    database = MetaDB(tmp_path / "db")
    database.write(lambda txn: txn.put("sandboxes", "s", {"version": 1, "id": "s", **old}))
    records = Records(database)
    records.load()
    record = records.sandboxes["s"]
    assert (record.holder, record.holder_pid, record.holder_start) == (holder, pid, 8 if pid else 0)
    records.put_sandbox(record).result()
    again = Records(database)
    again.load()
    assert again.sandboxes == {"s": record}
    database.close()
