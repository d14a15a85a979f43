"""One container of a real OCI runtime under a real conmon, without the daemon: for tests of what talks to them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class RawContainer:
    """A container made by raw_container(). runtime: command line before the verb."""

    container_id: str
    runtime: tuple[str, ...]
    process: dict[str, Any]
    attach_socket: Path
    ctl_fifo: Path
    pid: int
    log: Path

    @property
    def netns(self) -> Path:
        """Path of its network namespace."""
        return Path(f"/proc/{self.pid}/ns/net")

    def processes(self) -> list[int]:
        """The pids inside it, its first process included."""
        answer = subprocess.run(
            [*self.runtime, "ps", "--format", "json", self.container_id], capture_output=True, check=True, timeout=WAIT_S
        )
        return list(json.loads(answer.stdout) or ())


@contextlib.contextmanager
def raw_container(
    directory: Path, *args: str, program: str = "runc", tty: bool = False, stdin: bool = False, stdin_once: bool = False
) -> Iterator[RawContainer]:
    """Run `args` with busybox as root file system in an own network namespace whose loopback is up."""
    runtime = shutil.which(program)
    assert runtime
    container_id = f"raw-{os.getpid()}-{time.monotonic_ns()}"
    bundle = directory / container_id
    _root_file_system(bundle / "rootfs")
    process = _process(args, tty)
    (bundle / "config.json").write_text(json.dumps(_config(process)))
    prefix = (runtime, "--root", str(directory / program))
    sockets, exits = directory / "s", directory / "exits"
    log = bundle / "log"
    conmon = ["conmon", "-b", str(bundle), "-c", container_id, "-u", container_id, "-n", container_id, "-r", runtime]
    conmon += ["--runtime-arg", f"--root={directory / program}", "--exit-dir", str(exits), "-l", f"k8s-file:{log}", "--no-sync-log"]
    conmon += ["-p", str(bundle / "pid"), "-P", str(bundle / "conmon.pid"), "--socket-dir-path", str(sockets), "--full-attach"]
    conmon += ["-t"] if tty else []
    conmon += ["-i"] if stdin or tty else []
    conmon += ["--leave-stdin-open"] if stdin and not stdin_once else []
    sockets.mkdir(exist_ok=True)
    exits.mkdir(exist_ok=True)
    subprocess.run(conmon, cwd=bundle, check=True, timeout=WAIT_S, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _wait_for(bundle / "pid")
    try:
        subprocess.run([*prefix, "start", container_id], check=True, timeout=WAIT_S)
        pid = int((bundle / "pid").read_text())
        _loopback_up(pid)
        yield RawContainer(container_id, prefix, process, bundle / "attach", bundle / "ctl", pid, log)
    finally:
        _delete([*prefix, "delete", "--force", container_id])
        _wait_for(exits / container_id)  # conmon's exit file; then it ends


def _delete(argv: list[str]) -> None:
    """Run the runtime's delete; meanwhile reap what a test that is a subreaper has adopted, or the container cannot end."""
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as deleting:
        deadline = time.monotonic() + WAIT_S
        while deleting.poll() is None and time.monotonic() < deadline:
            zombie = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if zombie and zombie.si_pid != deleting.pid:
                os.waitpid(zombie.si_pid, 0)
            time.sleep(0.01)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (path.is_file() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)


def _loopback_up(pid: int) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", "link", "set", "lo", "up"], check=True, timeout=WAIT_S)


def _root_file_system(root: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True, timeout=WAIT_S).stdout.split():
        with contextlib.suppress(FileExistsError):
            (root / "bin" / applet).symlink_to("busybox")


def _process(args: tuple[str, ...], tty: bool) -> dict[str, Any]:
    return {
        "terminal": tty,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": ["PATH=/bin", "FROM=container"],
        "cwd": "/tmp",
        "capabilities": {kind: ["CAP_KILL", "CAP_NET_BIND_SERVICE"] for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": True,
    }


def _config(process: dict[str, Any]) -> dict[str, Any]:
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
    ]
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
    return {"ociVersion": "1.0.2", "process": process, "root": {"path": "rootfs"}, "mounts": mounts, "linux": {"namespaces": namespaces}}
