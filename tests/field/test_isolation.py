"""What a helper process can still do when a stranger's bytes have taken it over."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from imgsvc.base import confinement
from imgsvc.base.children import Companion
from imgsvc.base.errors import InvalidArgument
from imgsvc.cli.main import main
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.bulk import BulkTransport
from imgsvc.registry.http.exchange import Route, Timeouts, read_body
from imgsvc.registry.http.netguard import ANYWHERE
from imgsvc.registry.http.sender import Sender
from tests.registry.certs import authority
from tests.snapshot.bench import Bench
from tests.snapshot.layers import Entry, tar

pytestmark = pytest.mark.root

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def around(tmp_path: Path) -> dict[str, str]:
    """The environment of a helper that is taken over, with the things it goes for."""
    victim = tmp_path / "victim"
    victim.write_text("secret")
    victim.chmod(0o600)
    return {"PYTHONPATH": str(REPOSITORY), "VICTIM": str(victim), "DAEMON": str(os.getpid()), "SOCKET": str(tmp_path / "socket")}


def taken_over(role: str, control: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.field.taken_over", role, str(control)]
    return subprocess.Popen(command, pass_fds=(control,), env=environment, stderr=subprocess.PIPE, cwd="/")


def managed(said: bytes) -> set[str]:
    """The attempts that did not fail."""
    line = next(line for line in said.splitlines() if line.startswith(b"{"))
    return {attempt for attempt, outcome in json.loads(line).items() if outcome == "done"}


def download(environment: dict[str, str]) -> set[str]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(environment["SOCKET"])
        daemon.listen()
        os.chmod(environment["SOCKET"], 0o666)
        process = taken_over("DOWNLOAD", theirs.fileno(), environment)
        said = process.communicate(timeout=60)[1]
    return managed(said)


def unpack(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    started: list[subprocess.Popen[bytes]] = []

    def execute(companion: Companion, control: int) -> subprocess.Popen[bytes]:
        started.append(taken_over("UNPACK", control, environment))
        return started[-1]

    monkeypatch.setattr(Companion, "_execute", execute)
    bench = Bench(tmp_path)
    try:
        layer = tar([Entry("file", data=b"x")])
        with pytest.raises(InvalidArgument, match="taken over"):
            bench.in_order(bench.native, [layer])
    finally:
        bench.close()
    assert started[0].stderr is not None
    with started[0].stderr as stream:
        return managed(stream.read())


def test_S13_a_download_process_that_is_taken_over_has_the_network_and_nothing_else(around: dict[str, str]) -> None:
    assert download(around) == {"open an internet socket"}
    assert Path(around["VICTIM"]).read_text() == "secret"


def test_S13_an_unpack_worker_that_is_taken_over_has_its_snapshot_and_nothing_else(
    around: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unpack(around, tmp_path, monkeypatch) <= {"write /etc"}  # the layer's own /etc, if it had one
    assert not Path("/etc/imgsvc-taken-over").exists()
    assert Path(around["VICTIM"]).read_text() == "secret"


def test_S13_without_root_a_download_process_changes_no_file(around: dict[str, str]) -> None:
    mine = {"read the victim", "read /etc/shadow", "read through ..", "change the victim's mode"}  # files of its own user
    assert download(around | {"POWERLESS": "1"}) <= {"open an internet socket", *mine}
    assert Path(around["VICTIM"]).read_text() == "secret"


def test_S13_without_root_an_unpack_worker_opens_no_file_but_those_of_its_snapshot(
    around: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unpack(around | {"POWERLESS": "1"}, tmp_path, monkeypatch) <= {"change the victim's mode"}  # Landlock does not know that one
    assert Path(around["VICTIM"]).read_text() == "secret"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    await writer.drain()
    writer.close()


async def _fetched(host: str, tls: Tls, context: ssl.SSLContext | None) -> bytes:
    server = await asyncio.start_server(_answer, ["127.0.0.1", "::1"], ssl=context)
    bulk = Sender(BulkTransport(), Timeouts())
    try:
        port = next(s.getsockname()[1] for s in server.sockets if (s.family == socket.AF_INET6) == ("[" in host))
        url = f"{'https' if context else 'http'}://{host}:{port}/"
        async with aclosing(await bulk.send("GET", url, [], route=Route(tls, "", None, ANYWHERE), phase="fetch")) as response:
            return await read_body(response, 100)
    finally:
        await bulk.close()
        server.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_S13_names_and_addresses_of_both_kinds_are_reached(host: str) -> None:
    assert asyncio.run(_fetched(host, Tls(), None)) == b"ok"


def test_S13_certificates_and_keys_that_only_root_reads_serve_a_process_that_may_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority().pem)
    files = ca, *authority().issue("client").write(tmp_path, "client")
    for file in files:
        file.chmod(0o600)
    tls = Tls(ca=(str(ca),), client=((str(files[1]), str(files[2])),))
    context = authority().server(tmp_path, wants_client=True)
    assert asyncio.run(_fetched("localhost", tls, context)) == b"ok"


def test_S13_the_numbers_of_system_calls_are_the_kernels() -> None:
    known = confinement.CALLS[confinement.Calls.DOWNLOAD] | confinement.CALLS[confinement.Calls.SETTLE]
    checked = 0
    for column, header in enumerate(("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")):
        if not os.path.exists(header):
            continue
        text = Path(header).read_text(encoding="ascii")
        numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        numbers |= {"newfstatat": numbers.get("newfstatat", numbers.get("fstatat", -1))}
        for name, by_machine in known.items():
            if (number := by_machine[column]) is not None and name in numbers:
                assert numbers[name] == number, name
                checked += 1
    assert checked or not os.path.exists("/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize(
    "typed",
    [
        ["pull", "--creds", "user", "geheim:1", "busybox"],
        ["pull", "--credz=user:geheim:1", "busybox"],
        ["--creds", "user:geheim:1", "pull", "busybox"],
        ["pull", "--creds", "geheim1", "busybox"],
        ["images", "user:geheim:1"],
    ],
)
def test_S18_a_mistyped_argument_is_not_repeated(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(typed)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(said.splitlines()) == 1
    assert "geheim" not in said
