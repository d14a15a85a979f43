"""Runs inside the machine: pods while the daemon is restarted every minute. `python -m tests.vm.inside.soak PODS MINUTES`.

Each pod has a container that writes numbered lines; four in five pods are on the pod network, half are crun's, half runc's.
A round starts containers that end around the restart and execs that are under way during it, restarts the service, and looks.
Status 0: nothing was lost, nothing is left. One line of figures per round; findings begin with "!".
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc

from imgsvc.api import cri_pb2 as pb
from tests.support import cri
from tests.support.disk import Disk
from tests.vm.inside.node import CGROUPS, RPC_TIMEOUT, Node, journal, processes, scope, shown, systemctl
from tests.vm.names import BUSYBOX

STATE: Final = Path("/run/imgsvc")
STORE: Final = Path("/var/lib/imgsvc")
LEASES: Final = Path("/var/lib/cni/networks/pods")
PERIOD: Final = 60.0  # [seconds] from one restart to the next
# A line at once and every five seconds, without a process for each: reading what never comes is the clock.
WRITES: Final = "mkfifo /clock; exec 3<>/clock; i=0; while :; do i=$((i+1)); echo $i; read -t 5 x <&3; done"
ENDINGS: Final = (0, 2, 5, 8, 12, 20)  # [seconds] after which containers end; the restart comes soon after they were started
FORGIVEN: Final = (
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
)  # answers to an exec that a restart cuts short
EXIT_WAIT: Final = 120.0  # [seconds]
HEADER: Final = "round  ready  listed  RSS MiB  fds  threads  mounts  scopes  monitors  state files  log lines"


@dataclass(slots=True)
class Writer:
    """A pod with its container. processes: IDs, as they have to stay. number: of the last line seen, `offset` bytes into the log."""

    pod: pb.PodSandboxConfig
    sandbox: str
    container: str
    log: Path
    processes: list[str] = field(default_factory=list)
    offset: int = 0
    number: int = 0

    def follow(self) -> str:
        """Read on in the log. Returns: what is wrong with it, "" for nothing."""
        before = self.number
        with self.log.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                if line.split(b" ", 3)[3].strip() != b"%d" % (self.number + 1):
                    return f"{self.log}: after {self.number} comes {line!r}"
                self.number += 1
        return "" if self.number > before else f"{self.log}: nothing after {self.number}"


@dataclass(slots=True)
class Soak:
    """findings: everything that was not as it has to be."""

    writers: list[Writer] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def expect(self, right: object, finding: str) -> None:
        """Note a finding, and go on."""
        if not right:
            self.findings.append(finding)
            print(f"! {finding}", flush=True)

    def start(self, node: Node, count: int) -> None:
        """Run the pods."""
        for number in range(count):
            name = f"soak{number}"
            network = pb.NamespaceMode.POD if number % 5 else pb.NamespaceMode.NODE
            pid = pb.NamespaceMode.POD if number % 5 == 1 else pb.NamespaceMode.CONTAINER
            pod = node.pod_config(name, namespace_options=pb.NamespaceOption(network=network, pid=pid))
            sandbox = node.run_pod(pod, ("crun", "runc")[number % 2])
            container = run(node, sandbox, pod, WRITES, "writes")
            log = Path(cri.status(node.runtime, container).log_path)
            self.writers.append(Writer(pod, sandbox, container, log))
        for writer in self.writers:  # by now, they have made their clocks
            writer.processes = processes(scope(writer.pod.metadata.name, writer.container))

    def round(self, number: int) -> str:
        """Restart the service among ending containers and execs. Returns: the figures."""
        node = Node()
        ends = [(run(node, w.sandbox, w.pod, f"sleep {ENDINGS[n]}; exit {n + 1}", f"ends{n}"), n + 1) for n, w in self._some(number)]
        command = ["sh", "-c", "sleep 3; echo done"]
        execs = [self._exec(node, w, command) for _, w in self._some(number + 1)]
        began = time.monotonic()
        systemctl("restart", "imgsvc")
        ready = time.monotonic() - began
        for call in execs:
            error = call.exception()
            self.expect(
                error is None or (isinstance(error, grpc.RpcError) and error.code() in FORGIVEN), f"exec during the restart: {error}"
            )
        node.close()

        node = Node()
        self._look_at_listing(node, {container for container, _ in ends})
        listed = time.monotonic() - began
        for container, code in ends:
            seen = cri.wait_for_exit(node.runtime, container, EXIT_WAIT)
            self.expect(seen.exit_code == code, f"exit code {seen.exit_code} for {code}")
            cri.remove(node.runtime, container)
        for _, writer in self._some(number + 2):
            answer = self._exec(node, writer, ["echo", "probed"]).result()
            self.expect((answer.exit_code, answer.stdout) == (0, b"probed\n"), f"exec answered {answer}")
        stats = node.runtime.ListContainerStats(pb.ListContainerStatsRequest(), timeout=RPC_TIMEOUT).stats
        self.expect(len([s for s in stats if s.memory.usage_bytes.value]) == len(self.writers), f"{len(stats)} have statistics")
        node.close()
        for writer in self.writers:
            now = processes(scope(writer.pod.metadata.name, writer.container))
            self.expect(now == writer.processes, f"{writer.log}: process {writer.processes}, now {now}")
            if wrong := writer.follow():
                self.expect(False, wrong)
        lines = sum(writer.number for writer in self.writers)
        return f"{number:5}  {ready:5.1f}  {listed:6.1f}  {self._daemon()}  {self._left()}  {lines:9}"

    def _some(self, number: int) -> list[tuple[int, Writer]]:
        """Other pods every round, one per ending."""
        return [(n, self.writers[(number * len(ENDINGS) + n) % len(self.writers)]) for n in range(len(ENDINGS))]

    def _exec(self, node: Node, writer: Writer, command: list[str]) -> grpc.Future[pb.ExecSyncResponse]:
        return node.runtime.ExecSync.future(pb.ExecSyncRequest(container_id=writer.container, cmd=command, timeout=60), timeout=RPC_TIMEOUT)

    def _look_at_listing(self, node: Node, ends: set[str]) -> None:
        pods = node.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=RPC_TIMEOUT).items
        ready = {pod.id for pod in pods if pod.state == pb.SANDBOX_READY}
        self.expect(ready == {w.sandbox for w in self.writers}, f"{len(ready)} of {len(pods)} pods are ready")
        containers = node.runtime.ListContainers(pb.ListContainersRequest(), timeout=RPC_TIMEOUT).containers
        running = {c.id for c in containers if c.state == pb.CONTAINER_RUNNING}
        writers = {w.container for w in self.writers}
        self.expect({c.id for c in containers} == writers | ends, f"{len(containers)} containers are listed")
        self.expect(writers <= running, f"{len(writers - running)} containers do not run")

    def _daemon(self) -> str:
        """Memory, descriptors and threads of the daemon."""
        process = Path("/proc") / shown("imgsvc")["MainPID"]
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
        memory = int(status["VmRSS"].split()[0]) // 1024
        return f"{memory:7}  {len(list((process / 'fd').iterdir())):3}  {status['Threads']:>7}"

    def _left(self) -> str:
        left = remains()
        return f"{left['mounts']:6}  {left['scopes']:6}  {left['monitors']:8}  {left['files']:11}"

    def run(self, pods: int, minutes: float) -> None:
        """All of it."""
        node = Node()
        cri.pull(node.images, BUSYBOX)
        before = remains()
        began = time.monotonic()
        self.start(node, pods)
        print(f"{pods} pods started in {time.monotonic() - began:.0f} s, before: {before}\n{HEADER}", flush=True)
        node.close()
        end = time.monotonic() + minutes * 60
        number = 0
        while (began := time.monotonic()) < end:
            number += 1
            print(self.round(number), flush=True)
            time.sleep(max(0.0, began + PERIOD - time.monotonic()))
        node = Node()
        began = time.monotonic()
        node.remove_all_pods()
        print(f"{pods} pods removed in {time.monotonic() - began:.0f} s", flush=True)
        subprocess.run(["imgsvc", "gc"], check=True, timeout=RPC_TIMEOUT)
        self.expect(remains() == before, f"left: {remains()}, before: {before}")
        bad = [line for line in journal() if " ERROR " in line or "Traceback" in line]
        self.expect(not bad, f"{len(bad)} errors in the journal, the first: {bad[:3]}")
        self.expect(shown("imgsvc")["NRestarts"] == "0", "systemd had to restart the service")
        print(f"warnings in the journal: {sum(' WARNING ' in line for line in journal())}; findings: {len(self.findings)}", flush=True)


def run(node: Node, sandbox: str, pod: pb.PodSandboxConfig, script: str, name: str) -> str:
    """A started container in the namespaces that its pod is for."""
    options = pod.linux.security_context.namespace_options
    return node.run(sandbox, pod, script, name, security_context=pb.LinuxContainerSecurityContext(namespace_options=options))


def remains() -> dict[str, int]:
    """What pods leave traces in, counted."""
    names = [path.read_text() for path in Path("/proc").glob("[0-9]*/comm")]
    return {
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "scopes": len(list(CGROUPS.rglob("imgsvc-*.scope"))),
        "monitors": names.count("conmon\n"),
        "files": sum(1 for path in STATE.rglob("*") if "rootfs" not in path.parts),
        "snapshots": sum(1 for key in Disk(STORE).snapshots() if not key.startswith("sha256:")),
        "addresses": len(list(LEASES.glob("*.*.*.*"))),
        "links": len(list(Path("/sys/class/net").glob("veth*"))),
    }


if __name__ == "__main__":
    soak = Soak()
    soak.run(int(sys.argv[1]), float(sys.argv[2]))
    sys.exit(bool(soak.findings))
