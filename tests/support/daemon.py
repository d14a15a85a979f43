"""The real daemon in a directory of its own: own root, state, socket, registry hosts and pod network.

Everything it may leave behind carries the directory's or the network's name, so that `leftovers` finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final

import grpc

from imgsvc.api import cri_pb2, cri_pb2_grpc
from tests.support import leftovers

START_TIMEOUT: Final = 120.0  # [seconds]; busy cores start Python slowly, and only who fails waits that long
RPC_TIMEOUT: Final = 180.0  # [seconds]
_DEAD_UPSTREAM: Final = "http://127.0.0.1:9"  # discard port: nothing listens, so no test ever leaves the machine


def below(top: Path) -> Iterator[Path]:
    """Every path below a directory that a daemon may be removing things from meanwhile; pathlib's globs raise there."""
    for parent, directories, files in os.walk(top):
        for name in directories + files:
            yield Path(parent, name)


@dataclass(frozen=True, slots=True)
class Network:
    """A CNI bridge network of one daemon. bridge: interface name."""

    bridge: str
    subnet: IPv4Network

    @classmethod
    def fresh(cls) -> Network:
        """A name and a subnet nobody else here is likely to use."""
        token = secrets.token_bytes(3)
        return cls(f"imt{token.hex()}", IPv4Network(f"10.{200 + token[0] % 50}.{token[1]}.0/24"))

    def write(self, directory: Path, addresses: Path) -> None:
        """The conflist; `addresses` is where host-local keeps its leases."""
        ipam = {
            "type": "host-local",
            "dataDir": str(addresses),
            "ranges": [[{"subnet": str(self.subnet)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
        directory.mkdir()
        conflist = {"cniVersion": "1.0.0", "name": self.bridge, "plugins": [bridge, portmap]}
        (directory / "10-test.conflist").write_text(json.dumps(conflist))

    def remove(self) -> None:
        """Delete the bridge itself, which CNI leaves in place by design."""
        if Path("/sys/class/net", self.bridge).exists():
            subprocess.run(["ip", "link", "delete", self.bridge], check=True, timeout=10)


@dataclass(slots=True)
class Daemon:
    """`imgsvc serve` with everything below `directory`. start() and kill() as often as wanted; close() ends it."""

    directory: Path
    network: Network | None
    cgroup_parent: str
    process: subprocess.Popen[bytes] | None = None
    channels: list[grpc.Channel] = field(default_factory=list)

    @property
    def root(self) -> Path:
        """Its --root."""
        return self.directory / "root"

    @property
    def state(self) -> Path:
        """Its --state."""
        return self.directory / "state"

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.directory / "config.toml"

    @property
    def address(self) -> str:
        """The socket, as a gRPC target."""
        return f"unix://{self.state}/imgsvc.sock"

    @property
    def log(self) -> str:
        """What all its runs wrote so far."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Process ID of the running daemon."""
        assert self.process is not None
        return self.process.pid

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start and wait for READY=1. Raises: AssertionError with the log when it does not get there."""
        command = [sys.executable, "-m", "imgsvc.cli", "serve", "--config", str(self.config)]
        with _notify_socket(self.directory / "notify") as ready, (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": ready.getsockname(), **(environment or {})},
            )
            deadline = time.monotonic() + START_TIMEOUT
            while True:
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in ready.recv(4096):
                        return
                assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
                assert time.monotonic() < deadline, f"the daemon is not ready after {START_TIMEOUT} s:\n{self.log}"

    def kill(self) -> None:
        """SIGKILL, as the kernel or an impatient person does it."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=START_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon ignored {number.name}:\n{self.log[-4000:]}") from None
        finally:
            self.process = None

    def channel(self) -> grpc.Channel:
        """A new connection; closed with the daemon."""
        # Channels share connections otherwise, and wait for one that a killed daemon left.
        channel = grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.channels.append(channel)
        return channel

    def runtime(self) -> cri_pb2_grpc.RuntimeServiceStub:
        """CRI RuntimeService, on a connection of its own so that a restart does not meet a backed-off one."""
        return cri_pb2_grpc.RuntimeServiceStub(self.channel())

    def images(self) -> cri_pb2_grpc.ImageServiceStub:
        """CRI ImageService, likewise."""
        return cri_pb2_grpc.ImageServiceStub(self.channel())

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a client command of imgsvc against this daemon."""
        command = [sys.executable, "-m", "imgsvc.cli", *arguments]
        environment = {**os.environ, "IMGSVC_ADDRESS": self.address}
        return subprocess.run(command, capture_output=True, text=True, timeout=RPC_TIMEOUT, env=environment)

    def map_host(self, namespace: str, mirror: str, upstream: str = _DEAD_UPSTREAM) -> None:
        """Write hosts.toml: `namespace` is reached through `mirror` ("127.0.0.1:5000"), its own registry is `upstream` (URL)."""
        directory = self.directory / "hosts.d" / namespace
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "hosts.toml").write_text(f'server = "{upstream}"\n\n[host."http://{mirror}"]\ncapabilities = ["pull", "resolve"]\n')

    def remove_all_pods(self) -> None:
        """Stop and remove what is left, through CRI."""
        runtime = self.runtime()
        for sandbox in runtime.ListPodSandbox(cri_pb2.ListPodSandboxRequest(), timeout=RPC_TIMEOUT).items:
            runtime.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox.id), timeout=RPC_TIMEOUT)
            runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox.id), timeout=RPC_TIMEOUT)

    def leftovers(self) -> list[str]:
        """What of pods and containers is there; empty when all pods are removed."""
        bridge = self.network.bridge if self.network else None
        return leftovers.of_pods(self.directory, self.cgroup_parent, bridge)

    def close(self) -> None:
        """End everything and remove every trace, whatever the test did."""
        for channel in self.channels:
            channel.close()
        if self.process:
            self.kill()
        leftovers.clean_up(self.directory, self.cgroup_parent)
        if self.network:
            self.network.remove()
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def _notify_socket(path: Path) -> Iterator[socket.socket]:
    """Source: sd_notify(3)."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(path))
        ready.settimeout(0.1)
        yield ready


def new_daemon(*, network: bool, settings: str = "") -> Daemon:
    """A daemon that is configured but not started. settings: more TOML, appended to its configuration file."""
    # Short: a socket path has room for 107 bytes, and OCI monitors put theirs below ours.
    directory = Path(tempfile.mkdtemp(prefix="imgsvc-", dir="/tmp"))
    daemon = Daemon(directory, Network.fresh() if network else None, f"/{directory.name}")
    (directory / "hosts.d").mkdir()
    if daemon.network:
        daemon.network.write(directory / "cni", directory / "addresses")
    else:
        (directory / "cni").mkdir()
    daemon.config.write_text(
        f'version = 1\nroot = "{daemon.root}"\nstate = "{daemon.state}"\nimports = []\n'
        f'[registry]\nconfig_path = "{directory / "hosts.d"}"\n'
        f'[cni]\nconf_dir = "{directory / "cni"}"\nbin_dirs = ["/usr/lib/cni"]\n'
        f'[nri]\nsocket_path = "{directory / "nri.sock"}"\nplugin_path = "{directory / "nri"}"\n'
        f'[runtime]\ncgroup_driver = "cgroupfs"\n{settings}'
    )
    return daemon
