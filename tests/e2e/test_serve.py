"""`imgsvc serve` and the client commands, as people and systemd use them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2, cri_pb2_grpc
from tests.e2e.conftest import BUSYBOX
from tests.support import cri
from tests.support.daemon import RPC_TIMEOUT, START_TIMEOUT, Daemon
from tests.support.registries import RealRegistry

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def imgsvc(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command without a daemon."""
    command = [sys.executable, "-m", "imgsvc.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **environment})


def test_sigterm_ends_it_cleanly_and_removes_the_socket(image_daemon: Daemon) -> None:
    assert image_daemon.stop() == 0
    assert not (image_daemon.state / "imgsvc.sock").exists()
    assert "Traceback" not in image_daemon.log


def test_one_line_says_ready(image_daemon: Daemon) -> None:
    ready = [line for line in image_daemon.log.splitlines() if "ready" in line]
    assert len(ready) == 1
    assert "imgsvc.sock" in ready[0]


def test_a_second_daemon_on_the_same_root_is_refused(image_daemon: Daemon) -> None:
    second = imgsvc("serve", "--config", str(image_daemon.config), "--address", f"unix://{image_daemon.directory}/second.sock")
    assert second.returncode == 1
    assert str(image_daemon.pid) in second.stderr
    assert "Traceback" not in second.stderr
    assert image_daemon.images().ListImages(cri_pb2.ListImagesRequest(), timeout=RPC_TIMEOUT).images == []


def test_a_socket_left_by_a_killed_daemon_is_taken_over(image_daemon: Daemon) -> None:
    image_daemon.kill()
    assert (image_daemon.state / "imgsvc.sock").exists()
    image_daemon.start()
    image_daemon.images().ListImages(cri_pb2.ListImagesRequest(), timeout=RPC_TIMEOUT)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('version = 1\n[images]\nsnapshoter = "native"\n', 'config.toml:3:1: unknown key "images.snapshoter"; did you mean'),
        ("version = 1\n[images\n", "config.toml:2"),
        ('version = 1\n[images]\nmax_concurrent_downloads = "six"\n', "config.toml:3"),
        ("version = 9\n", "config.toml:1"),
    ],
)
def test_a_wrong_configuration_is_one_line_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    for command in (("serve", "--config"), ("config", "check")):
        ended = imgsvc(*command, str(file))
        assert ended.returncode == 1, ended
        (line,) = ended.stderr.splitlines()
        assert expected in line


def test_the_default_configuration_reads_back(tmp_path: Path) -> None:
    shown = imgsvc("config", "default")
    assert shown.returncode == 0
    (tmp_path / "config.toml").write_text(shown.stdout)
    assert imgsvc("config", "check", str(tmp_path / "config.toml")).returncode == 0


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("pull",), ("serve", "--nonsense")], ids=str)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert imgsvc(*arguments).returncode == 2


def test_without_a_daemon_the_client_says_which_socket_it_tried(tmp_path: Path) -> None:
    ended = imgsvc("images", IMGSVC_ADDRESS=f"unix://{tmp_path}/absent.sock")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert f"{tmp_path}/absent.sock" in line


def test_pull_list_inspect_remove(image_daemon: Daemon, busybox: str) -> None:
    pulled = image_daemon.cli("pull", "busybox")
    assert pulled.returncode == 0, pulled
    assert busybox in pulled.stdout
    (row,) = json.loads(image_daemon.cli("images", "--json").stdout)
    assert busybox in json.dumps(row)
    assert BUSYBOX in json.dumps(row)
    assert busybox.removeprefix("sha256:")[:12] in image_daemon.cli("images").stdout
    assert busybox in image_daemon.cli("inspect", "busybox").stdout
    assert image_daemon.cli("rmi", "busybox").returncode == 0
    assert json.loads(image_daemon.cli("images", "--json").stdout) == []
    failed = image_daemon.cli("inspect", "busybox")
    assert failed.returncode == 1
    assert BUSYBOX in failed.stderr


def test_a_failed_pull_is_one_line_and_exit_code_1(image_daemon: Daemon) -> None:
    failed = image_daemon.cli("pull", "e2e/never-pushed:1")
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert "docker.io/e2e/never-pushed:1" in line
    assert image_daemon.cli("pull", "BAD").returncode == 2


def test_hangup_reloads_and_keeps_serving(image_daemon: Daemon, registry: RealRegistry, busybox: str) -> None:
    assert image_daemon.process
    image_daemon.process.send_signal(signal.SIGHUP)
    assert cri.pull(image_daemon.images(), BUSYBOX) == busybox


def test_hangup_changes_what_can_change_and_dump_tells_the_truth(
    make_daemon: Callable[..., Daemon], registry: RealRegistry, busybox: str
) -> None:
    daemon = make_daemon(settings="[gc]\nmin_free = 1\n")
    plain = daemon.config.read_text()
    daemon.start()
    assert daemon.cli("pull", BUSYBOX).returncode == 1, "docker.io is reached nowhere yet"
    other = daemon.directory / "other.d"
    mirror = f'server = "http://127.0.0.1:9"\n[host."http://{registry.address}"]\n'
    (other / "docker.io").mkdir(parents=True)
    (other / "docker.io" / "hosts.toml").write_text(mirror)
    changed = plain.replace(str(daemon.directory / "hosts.d"), str(other)).replace("min_free = 1", "min_free = 2")

    def hang_up(text: str, said: str) -> None:
        assert daemon.process
        before = len(daemon.log)
        daemon.config.write_text(text)
        daemon.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + START_TIMEOUT
        while said not in daemon.log[before:]:
            assert time.monotonic() < deadline, daemon.log[before:]
            time.sleep(0.05)

    hang_up(
        changed + '[images]\npinned_images = ["*box*"]\n[debug]\nlevel = "debug"\n[mirror]\naddress = "127.0.0.1:0"\n',
        "need a restart: mirror.address",
    )
    pulled = daemon.cli("pull", BUSYBOX)
    assert pulled.stdout.split() == [busybox], pulled.stderr
    assert json.loads(daemon.cli("inspect", BUSYBOX).stdout)["pinned"]
    values = json.loads(daemon.cli("config", "dump", "--running", "--json").stdout)
    assert (values["gc.min_free"]["value"], values["mirror.address"]["value"]) == (2, "")
    assert values["registry.config_path"]["origin"].startswith(str(daemon.config))
    assert "DEBUG imgsvc.registry.http.exchange: GET http" in daemon.log, "every request is told of at this level"

    hang_up(plain + '[verify]\npolicy = "/nowhere"\n', "configuration not reloaded: /nowhere")
    assert json.loads(daemon.cli("config", "dump", "--running", "--json").stdout) == values


@pytest.fixture
def nobodys_directory() -> Iterator[Path]:
    """A directory that the user nobody owns."""
    directory = Path(tempfile.mkdtemp(prefix="imgsvc-", dir="/tmp"))
    os.chown(directory, 65534, 65534)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.root
def test_without_root_images_are_served_and_status_says_what_is_off(
    nobodys_directory: Path, registry: RealRegistry, busybox: str, make_daemon: Callable[..., Daemon]
) -> None:
    # Twice: setpriv itself may still run what its child may not.
    again = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import imgsvc'], check=True)"
    if subprocess.run([*AS_NOBODY, sys.executable, "-c", again], capture_output=True).returncode:
        pytest.skip("the user nobody cannot run this Python, or not read this checkout")
    directory = nobodys_directory
    hosts = make_daemon()
    hosts.map_host("docker.io", registry.address)
    shutil.copytree(hosts.directory / "hosts.d", directory / "hosts.d")
    (directory / "config.toml").write_text(
        f'version = 1\nroot = "{directory}/root"\nstate = "{directory}/state"\nimports = []\n[registry]\nconfig_path = "{directory}/hosts.d"\n'
    )
    (directory / "hosts.d").chmod(0o755)
    command = [*AS_NOBODY, sys.executable, "-m", "imgsvc.cli", "serve", "--config"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(directory / "config.toml")], stdout=log, stderr=log, env={**os.environ, "HOME": str(directory)}
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while "ready" not in (directory / "log").read_text():
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with grpc.insecure_channel(f"unix://{directory}/state/imgsvc.sock") as channel:
            assert cri.pull(cri_pb2_grpc.ImageServiceStub(channel), BUSYBOX) == busybox
            runtime = cri_pb2_grpc.RuntimeServiceStub(channel)
            conditions = runtime.Status(cri_pb2.StatusRequest(), timeout=RPC_TIMEOUT).status.conditions
            (condition,) = [c for c in conditions if c.type == "RuntimeReady"]
            assert not condition.status
            assert "root" in condition.message
    finally:
        process.terminate()
        process.wait(timeout=START_TIMEOUT)
    assert process.returncode == 0


@pytest.mark.root
def test_without_root_the_defaults_are_the_users_own_directories(nobodys_directory: Path) -> None:
    code = "from imgsvc import config; from imgsvc.base import places; c = config.load(None).config; print(c.root, c.state, places.socket_address())"
    where = {"HOME": str(nobodys_directory), "XDG_DATA_HOME": "", "XDG_RUNTIME_DIR": ""}
    shown = subprocess.run([*AS_NOBODY, sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **where})
    if "Permission" in shown.stderr:
        pytest.skip("the user nobody cannot run this Python, or not read this checkout")
    data = f"{nobodys_directory}/.local/share/imgsvc"
    assert shown.stdout.split() == [data, f"{data}/run", f"unix://{data}/run/imgsvc.sock"]


def test_a_root_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = imgsvc("serve", "--root", str(tmp_path / "file" / "root"), "--state", str(tmp_path / "state"))
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert f"{tmp_path}/file/root" in ended.stderr
