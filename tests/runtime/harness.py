"""The runtime service alone, behind a real gRPC socket, over the busybox images of images.py.

As a module (`python -m tests.runtime.harness DIRECTORY [JSON settings]`) it is a daemon that tests may kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from imgsvc.api import cri_pb2 as pb
from imgsvc.api.cri_pb2_grpc import RuntimeServiceStub, add_RuntimeServiceServicer_to_server
from imgsvc.base import failpoints, procfs
from imgsvc.base.metadb.database import MetaDB
from imgsvc.daemon.rpc import ErrorInterceptor
from imgsvc.runtime.node import RuntimeNode
from imgsvc.runtime.service import RuntimeService
from imgsvc.runtime.settings import CNISettings, HandlerSettings, NriSettings, RuntimeSettings
from tests.runtime.images import BUSYBOX, BusyboxImages

TIMEOUT_S = 120.0


def settings_for(directory: Path, extra: Mapping[str, Any]) -> RuntimeSettings:
    """Settings below a test's directory. extra: handlers {name: {field: value}} and plain fields."""
    handlers = extra.get("handlers") or {"default": {}}
    plain = {k: v for k, v in extra.items() if k not in ("handlers", "cni", "nri")}
    cni: dict[str, Any] = {"conf_dir": str(directory / "cni.d"), "cache_dir": str(directory / "cni"), "bin_dirs": ("/usr/lib/cni",)} | (
        extra.get("cni") or {}
    )
    return RuntimeSettings(
        state_dir=directory / "s",
        root_dir=directory / "root",
        handlers={name: HandlerSettings(name, **fields) for name, fields in handlers.items()},
        cni=_cni(cni),
        nri=NriSettings(**extra.get("nri", {"disable": True})),
        **plain,
    )


def _cni(values: Mapping[str, Any]) -> CNISettings:
    settled: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return CNISettings(**settled)


async def serve(directory: Path, extra: Mapping[str, Any]) -> None:
    """Serve until SIGTERM."""
    failpoints.arm(os.environ.get(failpoints.ENV, ""))
    database = MetaDB(directory / "db")
    images = BusyboxImages(directory / "images", database)
    if "image" in extra:
        images.with_config(**{k: tuple(v) if isinstance(v, list) else v for k, v in extra["image"].items()})
    node = await RuntimeNode.start(settings_for(directory, {k: v for k, v in extra.items() if k != "image"}), database, images)
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    add_RuntimeServiceServicer_to_server(RuntimeService(node, None), server)
    server.add_insecure_port(f"unix://{directory}/sock")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print("ready", flush=True)
    await stop.wait()
    await server.stop(1)
    await node.close()
    database.close()


class Daemon:
    """A child process that serves."""

    def __init__(self, directory: Path, extra: Mapping[str, Any] | None = None, *, bridge: str = "", cgroups: str = "") -> None:
        """cgroups: "v1" without version 2 beside it (where crun works), or "v2" alone, in a mount namespace of the daemon's own."""
        self.directory = directory
        self.extra = dict(extra or {})
        self.cgroup_parent = f"/imgsvc-test/{directory.name}-{os.getpid()}"
        self.process: subprocess.Popen[str] | None = None
        if bridge:
            write_bridge(directory, bridge)
        self.bridge = bridge
        self.namespace = _mount_namespace(cgroups) if cgroups else None
        self.prefix = ["nsenter", "-t", str(self.namespace.pid), "-m"] if self.namespace else []

    def start(self, *, failpoint: str = "") -> None:
        """Start and wait until it serves. failpoint: IMGSVC_FAILPOINTS."""
        with (self.directory / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "tests.runtime.harness", str(self.directory), json.dumps(self.extra)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {failpoints.ENV: failpoint},
            )
        assert self.process.stdout
        if (line := self.process.stdout.readline()) != "ready\n":
            self._reap()
            raise AssertionError(f"{line}{(self.directory / 'log').read_text()}")
        self.channel = grpc.insecure_channel(f"unix://{self.directory}/sock", options=[("grpc.max_receive_message_length", 64 << 20)])
        self.cri = RuntimeServiceStub(self.channel)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self.process:
            self.process.send_signal(number)
            self.wait_dead()

    def wait_dead(self) -> None:
        """After a failpoint that kills."""
        self._reap()
        self.channel.close()

    def _reap(self) -> None:
        assert self.process
        assert self.process.stdout
        self.process.wait(30)
        self.process.stdout.close()
        self.process = None

    def pod(self, name: str = "pod", **linux: Any) -> pb.PodSandboxConfig:
        """A pod configuration: PID namespaces per container, own IPC; the network is the host's without a bridge."""
        network = pb.NamespaceMode.POD if self.bridge else pb.NamespaceMode.NODE
        options = linux.pop("namespaces", None) or pb.NamespaceOption(network=network, pid=pb.NamespaceMode.CONTAINER)
        privileged = linux.pop("privileged", False)
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="tests", attempt=linux.pop("attempt", 0)),
            hostname=linux.pop("hostname", "" if network == pb.NamespaceMode.NODE else name),
            log_directory=str(self.directory / "logs" / name),
            annotations=linux.pop("annotations", {}),
            labels=linux.pop("labels", {}),
            port_mappings=linux.pop("port_mappings", []),
            dns_config=linux.pop("dns_config", None),
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=linux.pop("cgroup_parent", f"{self.cgroup_parent}/{name}"),
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=options, privileged=privileged),
                **linux,
            ),
        )

    def container(self, script: str, name: str = "main", **fields: Any) -> pb.ContainerConfig:
        """A container that runs a shell script."""
        security = fields.pop("security", None) or pb.LinuxContainerSecurityContext()
        if not security.HasField("namespace_options"):
            network = pb.NamespaceMode.POD if self.bridge else pb.NamespaceMode.NODE
            security.namespace_options.CopyFrom(pb.NamespaceOption(network=network, pid=pb.NamespaceMode.CONTAINER))
        resources = fields.pop("resources", None)
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=fields.pop("attempt", 0)),
            image=pb.ImageSpec(image=BUSYBOX),
            command=fields.pop("command", ["sh", "-c", script]),
            log_path=fields.pop("log_path", f"{name}.log"),
            linux=pb.LinuxContainerConfig(security_context=security, resources=resources),
            **fields,
        )

    def run_pod(self, name: str = "pod", **linux: Any) -> str:
        """A running pod."""
        return self.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=self.pod(name, **linux)), timeout=TIMEOUT_S).pod_sandbox_id

    def create(self, pod: str, config: pb.ContainerConfig) -> str:
        """A created container."""
        return self.cri.CreateContainer(pb.CreateContainerRequest(pod_sandbox_id=pod, config=config), timeout=TIMEOUT_S).container_id

    def start_container(self, container: str) -> None:
        """Start it."""
        self.cri.StartContainer(pb.StartContainerRequest(container_id=container), timeout=TIMEOUT_S)

    def run(self, pod: str, script: str, name: str = "main", **fields: Any) -> str:
        """A started container."""
        container = self.create(pod, self.container(script, name, **fields))
        self.start_container(container)
        return container

    def status(self, container: str) -> pb.ContainerStatus:
        """ContainerStatus."""
        return self.cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container), timeout=TIMEOUT_S).status

    def wait_exit(self, container: str, timeout_s: float = 90.0) -> pb.ContainerStatus:
        """Until the container has ended."""
        end = time.monotonic() + timeout_s
        while (status := self.status(container)).state != pb.ContainerState.CONTAINER_EXITED:
            assert time.monotonic() < end, f"still {status.state}"
            time.sleep(0.02)
        return status

    def output(self, pod: str, script: str, **fields: Any) -> list[str]:
        """Run a script to its end; its output lines."""
        name = fields.pop("name", f"c{time.monotonic_ns()}")
        container = self.run(pod, script, name, **fields)
        status = self.wait_exit(container)
        lines = self.log(status.log_path)
        self.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=TIMEOUT_S)
        return lines

    def log(self, path: str) -> list[str]:
        """The texts of a CRI log."""
        return [line.split(" ", 3)[3] for line in Path(path).read_text().splitlines()]

    def wait_line(self, container: str, text: str, timeout_s: float = 60.0) -> None:
        """Until the container has written this line."""
        path = self.status(container).log_path
        end = time.monotonic() + timeout_s
        while text not in self.log(path):
            assert time.monotonic() < end, f"no line {text!r}"
            time.sleep(0.02)

    def exec(self, container: str, *command: str, timeout: int = 10) -> pb.ExecSyncResponse:
        """ExecSync."""
        return self.cri.ExecSync(pb.ExecSyncRequest(container_id=container, cmd=command, timeout=timeout), timeout=TIMEOUT_S)

    def remove_all(self) -> None:
        """Remove every pod."""
        for pod in self.cri.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=TIMEOUT_S).items:
            self.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=60)

    def leftovers(self) -> list[str]:
        """What is still there although nothing should be: mounts, directories, cgroups, processes, snapshots."""
        found = [os.fsdecode(m.point) for m in procfs.mounts() if procfs.is_within(m.point, os.fsencode(self.directory))]
        for place in ("s/sandboxes", "s/containers", "s/exits", "s/a", "root/volumes", "images/roots", "cni/results"):
            path = self.directory / place
            found += [str(p) for p in path.iterdir()] if path.exists() else []
        found += [str(p) for p in Path("/sys/fs/cgroup").glob(f"*{self.cgroup_parent}/*") if p.is_dir()]
        found += _processes_of(str(self.directory), self.process.pid if self.process else 0)
        return found


def _processes_of(directory: str, daemon: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (daemon, os.getpid()):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if directory in command:
                    found.append(f"process {entry.name}: {command[:120]}")
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Until the condition holds. Raises: AssertionError when it does not in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_clean(node: Daemon) -> None:
    """Nothing of any pod is left, address leases included."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not node.leftovers(), 30)
    assert node.leftovers() == []
    assert list((node.directory / "ipam").glob("*/10.*")) == []


_CGROUPS = {"v1": ["umount", "/sys/fs/cgroup/unified"], "v2": ["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"]}


def _mount_namespace(cgroups: str) -> subprocess.Popen[bytes]:
    """A process that keeps a mount namespace with other cgroup mounts, for a daemon and its successors."""
    holder = subprocess.Popen(["unshare", "-m", "--propagation", "unchanged", "sleep", "infinity"])
    while os.readlink(f"/proc/{holder.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
        time.sleep(0.01)
    subprocess.run(["nsenter", "-t", str(holder.pid), "-m", *_CGROUPS[cgroups]], check=True)
    return holder


def write_bridge(directory: Path, bridge: str) -> None:
    """A CNI bridge network of the test's own."""
    number = sum(bridge.encode()) % 200
    plugin = {
        "type": "bridge",
        "bridge": bridge,
        "isGateway": True,
        "ipam": {"type": "host-local", "dataDir": str(directory / "ipam"), "ranges": [[{"subnet": f"10.251.{number}.0/24"}]]},
    }
    (directory / "cni.d").mkdir(exist_ok=True)
    network = {"cniVersion": "1.0.0", "name": f"net-{bridge}", "plugins": [plugin]}
    (directory / "cni.d/10-test.conflist").write_text(json.dumps(network))


@contextlib.contextmanager
def running(
    directory: Path, extra: Mapping[str, Any] | None = None, *, bridge: str = "", cgroups: str = "", failpoint: str = ""
) -> Iterator[Daemon]:
    """A daemon for a `with` block; nothing of it survives."""
    directory.mkdir(parents=True, exist_ok=True)
    daemon = Daemon(directory, extra, bridge=bridge, cgroups=cgroups)
    daemon.start(failpoint=failpoint)
    try:
        yield daemon
    finally:
        if daemon.process is None:
            daemon.start()
        daemon.remove_all()
        daemon.stop()
        for parent in Path("/sys/fs/cgroup").glob(f"*{daemon.cgroup_parent}"):
            for child in sorted(parent.rglob("*"), reverse=True):
                if child.is_dir():
                    child.rmdir()
            parent.rmdir()
        if daemon.namespace:
            daemon.namespace.kill()
            daemon.namespace.wait()
        if bridge:
            subprocess.run(["ip", "link", "del", bridge], capture_output=True)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), json.loads(sys.argv[2])))
