"""What is typed wrongly, and whom one cannot talk to: one line each, 2 for what cannot be meant, 1 for what does not work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from imgsvc.cli.main import COMMANDS, main
from imgsvc.cli.usage import Parser
from tests.support.daemon import Daemon

ID = "sha256:" + "a" * 64


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMGSVC_ADDRESS", f"unix://{tmp_path}/none.sock")


def run(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("pull",),
        ("pull", "UPPER"),
        ("pull", ID),
        ("pull", "a", "b:"),
        ("pull", "a", "--platform", "x y"),
        ("pull", "a", "--creds", "nobody"),
        ("push", "a:b:c"),
        ("inspect", ""),
        ("rmi", "a", "B"),
        ("tag", "a", "B"),
        ("export", "A"),
        ("import", "f", "--name", "A"),
        ("prepull",),
        ("prepull", "a", "--concurrent", "0"),
        ("prepull", "a", "--retries", "-1"),
        ("prepull", "a", "--status"),
        ("hosts", "explain", "A"),
        ("config", "dump", "f", "--running"),
        ("images", "--address", "tcp://127.0.0.1:1"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_exit_code_2_and_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("imgsvc: ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("text", ["busybox", "cafe", "cafe" * 16, ID, ID[:20], "docker.io/a/b@" + ID])
def test_names_ids_and_their_beginnings_may_be_typed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", text) == 1
    assert "no such socket" in capsys.readouterr().err


def test_the_address_is_the_options_then_the_environments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONTAINER_RUNTIME_ENDPOINT", f"{tmp_path}/second.sock")
    for arguments, name in ((("--address", f"unix://{tmp_path}/given.sock"), "given"), ((), "none")):
        assert run("images", *arguments) == 1
        assert f"unix://{tmp_path}/{name}.sock: " in capsys.readouterr().err
    monkeypatch.delenv("IMGSVC_ADDRESS")
    assert run("images") == 1
    assert f"unix://{tmp_path}/second.sock: " in capsys.readouterr().err
    monkeypatch.setenv("CONTAINER_RUNTIME_ENDPOINT", "npipe:////./pipe/x")
    assert run("images") == 2
    assert "$CONTAINER_RUNTIME_ENDPOINT" in capsys.readouterr().err


def test_a_socket_that_nobody_serves_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(f"{tmp_path}/none.sock")
    assert run("images") == 1
    assert "Connection refused" in capsys.readouterr().err


def test_a_server_that_is_not_ours_is_said_to_be_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix://{tmp_path}/none.sock")
    server.start()
    try:
        assert run("df") == 1
    finally:
        server.stop(None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not this version of imgsvc" in line
    assert f"{tmp_path}/none.sock" in line


@pytest.mark.parametrize("arguments", [("config", "default"), ("config", "dump", "--json")], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-m", "imgsvc.cli", *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_every_listing_has_json_and_stops_quietly_at_a_closed_pipe(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    daemon.start()
    for command in ("images", "df", "gc", "gc --explain", "fsck", "prepull --status", "config dump --running"):
        shown = subprocess.run(
            ["sh", "-c", f"'{sys.executable}' -m imgsvc.cli {command} --json | head -c 1"],
            capture_output=True,
            text=True,
            env={**os.environ, "IMGSVC_ADDRESS": daemon.address},
        )
        assert (shown.stdout, shown.stderr) in (("{", ""), ("[", "")), command


def test_every_command_has_its_arguments() -> None:
    for name, command in COMMANDS.items():
        command.fill(Parser(prog=name))


def test_options_of_all_commands_may_stand_before_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--address", f"unix://{tmp_path}/given.sock", "images") == 1
    assert f"{tmp_path}/given.sock: " in capsys.readouterr().err
    assert run("--address", f"{tmp_path}/before.sock", "images", "--address", f"{tmp_path}/after.sock") == 1
    assert f"{tmp_path}/after.sock: " in capsys.readouterr().err
    assert run("--config", f"{tmp_path}/none.toml", "hosts", "explain", "busybox") == 1
    assert f"{tmp_path}/none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--address", "/x.sock", "hosts", "explain", "a"), ("--config", "/x.toml", "images")], ids=" ".join)
def test_an_option_that_a_command_does_not_have_is_refused_before_it_too(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert f"takes no {arguments[0]}" in capsys.readouterr().err


def test_a_command_imports_no_more_than_it_needs() -> None:
    program = "import sys; from imgsvc.cli.main import main; sys.argv[1:] = ['images']; main(); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not {"asyncio", "grpc", "imgsvc.config", "imgsvc.base.oci"} & set(shown.stdout.split())
