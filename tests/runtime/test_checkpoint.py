"""CheckpointContainer: what criu cannot do here is refused by name; what it can do becomes an archive.

criu does not work on every kernel the tests run on. So the archive is tested twice: with a runc whose `checkpoint` is a
script of ours (everything else goes to the real one), and with criu itself where `criu check` passes.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2 as pb
from tests.runtime.harness import Daemon

pytestmark = [pytest.mark.root, pytest.mark.compat]

MakeNode = Callable[..., Daemon]

# Dumps "pages" of the container, or hangs, or fails as criu fails, whatever the file `mode` beside it says.
RUNTIME = """#!/bin/sh
here=$(dirname "$0")
case " $* " in
*" checkpoint "*) ;;
*" resume "*) echo resumed >> "$here/resumed"; exec {runc} "$@" ;;
*) exec {runc} "$@" ;;
esac
while [ $# -gt 0 ]; do
  [ "$1" = --image-path ] && images=$2
  [ "$1" = --work-path ] && work=$2
  [ "$1" = --leave-running ] && leave=yes
  shift
done
[ -n "$leave" ] || exit 9
case $(cat "$here/mode") in
hang) sleep 60 ;;
fail) echo "(00.1) Error (criu/files.c:1): cannot dump a thing" > "$work/dump.log"; echo "criu failed" >&2; exit 1 ;;
esac
echo pages > "$images/pages-1.img"
echo done > "$work/dump.log"
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory, first of PATH, with a criu that works and the runtime above."""
    runc = shutil.which("runc") or pytest.skip("runc is not installed")
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "runc").write_text(RUNTIME.format(runc=runc))
    (directory / "criu").write_text("#!/bin/sh\nexit 0\n")
    for program in directory.iterdir():
        program.chmod(0o755)
    (directory / "mode").write_text("work")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def save(node: Daemon, container: str, location: Path | str, timeout: int = 0) -> None:
    node.cri.CheckpointContainer(pb.CheckpointContainerRequest(container_id=container, location=str(location), timeout=timeout), timeout=60)


def refusal(node: Daemon, container: str, location: Path | str, timeout: int = 0) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        save(node, container, location, timeout)
    assert not os.path.lexists(location)
    assert not any((node.directory / "root/checkpoints").glob("*")), "nothing half-made stays"
    return caught.value.code(), caught.value.details() or ""


def still_counts(node: Daemon, container: str) -> bool:
    """Whether the container's loop goes on."""
    path = node.status(container).log_path
    before = len(node.log(path))
    time.sleep(0.5)
    return len(node.log(path)) > before


COUNTING = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"


def test_the_archive_is_complete_private_and_never_replaces_another(make_node: MakeNode, programs: Path, tmp_path: Path) -> None:
    node = make_node({"handlers": {"default": {"path": str(programs / "runc")}}})
    container = node.run(node.run_pod(), COUNTING)
    save(node, container, tmp_path / "c.tar")
    assert stat.S_IMODE((tmp_path / "c.tar").stat().st_mode) == 0o600
    with tarfile.open(tmp_path / "c.tar") as archive:
        assert {"config.dump", "spec.dump", "dump.log", "checkpoint", "checkpoint/pages-1.img"} == set(archive.getnames())
        read = {name: archive.extractfile(name) for name in ("config.dump", "spec.dump")}
        config, spec = (json.load(stream) for stream in read.values() if stream)
    assert config["id"] == container
    assert config["rootfsImage"] == "docker.io/library/busybox:latest"
    assert spec["process"]["args"][:2] == ["sh", "-c"]
    assert still_counts(node, container)
    with pytest.raises(grpc.RpcError) as caught:
        save(node, container, tmp_path / "c.tar")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert refusal(node, container, "c.tar")[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal(node, container, tmp_path / "no/such/c.tar")[0] is grpc.StatusCode.NOT_FOUND


def test_a_dump_that_fails_or_hangs_leaves_the_container_running(make_node: MakeNode, programs: Path, tmp_path: Path) -> None:
    node = make_node({"handlers": {"default": {"path": str(programs / "runc")}}})
    container = node.run(node.run_pod(), COUNTING)
    (programs / "mode").write_text("fail")
    code, text = refusal(node, container, tmp_path / "c.tar")
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "criu" in text
    assert "cannot dump a thing" in text
    (programs / "mode").write_text("hang")
    assert refusal(node, container, tmp_path / "c.tar", timeout=1)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (programs / "resumed").read_text() == "resumed\n" * 2
    assert still_counts(node, container)


def test_without_criu_and_without_a_running_container(make_node: MakeNode, programs: Path, tmp_path: Path) -> None:
    (programs / "criu").write_text("#!/bin/sh\necho 'Error (criu/x.c:1): no such kernel' >&2\nexit 1\n")
    node = make_node({"handlers": {"default": {"path": str(programs / "runc")}}})
    pod = node.run_pod()
    container = node.run(pod, COUNTING)
    code, text = refusal(node, container, tmp_path / "c.tar")
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "criu does not work on this kernel" in text
    assert "no such kernel" in text
    created = node.create(pod, node.container("true", "created"))
    assert refusal(node, created, tmp_path / "c.tar")[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal(node, "none", tmp_path / "c.tar")[0] is grpc.StatusCode.NOT_FOUND


def test_a_shim_refuses_by_name(make_node: MakeNode, tmp_path: Path) -> None:
    if not shutil.which("containerd-shim-runc-v2"):
        pytest.skip("containerd is not installed")
    node = make_node({"handlers": {"default": {"type": "io.containerd.runc.v2"}}})
    code, text = refusal(node, node.run(node.run_pod(), COUNTING), tmp_path / "c.tar")
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "criu" in text


def test_with_criu_itself(make_node: MakeNode, tmp_path: Path) -> None:
    criu = shutil.which("criu") or pytest.skip("criu is not installed")
    check = subprocess.run([criu, "check"], capture_output=True, text=True, check=False)
    if check.returncode:
        pytest.skip(f"criu does not work on this kernel: {check.stderr.splitlines()[-1]}")
    node = make_node()
    container = node.run(node.run_pod(), COUNTING)
    save(node, container, tmp_path / "c.tar")
    with tarfile.open(tmp_path / "c.tar") as archive:
        assert {"checkpoint/inventory.img", "checkpoint/pstree.img"} <= set(archive.getnames())
    assert still_counts(node, container)
