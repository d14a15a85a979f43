"""A shim for tests: its own process, ttrpc on a socket, real containers by runc, and a sandbox API that tells what it was asked.

As containerd's shims: `podshim [flags] start` leaves a server behind and prints its address, `delete` clears up after a dead
one. STATE/shim.journal has one JSON line per call. Annotations of the pod: `test.podshim/fail: METHOD` refuses a call,
`test.podshim/os` is what Platform answers. With PODSHIM_PLAIN=1 there is no sandbox API and no -info. With
PODSHIM_PARAMETERS=1 it starts as shims from containerd 2.3 on: BootstrapParams on standard input, a BootstrapResult on standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf import any_pb2, empty_pb2
from google.protobuf.json_format import MessageToDict

from imgsvc.api import bootstrap_pb2, cgroups_v2_pb2, cri_pb2, ttrpc_pb2, types_pb2
from imgsvc.api import sandbox_pb2 as api
from imgsvc.api import task_v2_pb2 as task
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, NotFound, Unimplemented
from imgsvc.runtime.ttrpc import Frame, encode, read_frame

MEMORY = 87_654_321  # what a pod has used [bytes]
CPU_US = 1_234_567
CODES: dict[type[ImgsvcError], int] = {NotFound: 5, FailedPrecondition: 9, Unimplemented: 12}
_PR_SET_CHILD_SUBREAPER = 36


def runc(state: Path, *arguments: str, **streams: Any) -> None:
    """Run runc, or say what it said. Its streams become the container's, so that they cannot be pipes of ours."""
    journal = state / "podshim.log"
    journal.unlink(missing_ok=True)
    default = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["runc", "--log", str(journal), "--root", str(state / "podshim"), *arguments]
    if subprocess.run(command, check=False, **(default | streams)).returncode:
        raise FailedPrecondition(journal.read_text().strip()[-300:])


class Machine:
    """The pod: a process that stands for a virtual machine."""

    def __init__(self, bundle: str) -> None:
        self.process = subprocess.Popen(["sh", "-c", "sleep 1000 & wait", bundle], start_new_session=True)
        (Path(bundle) / "machine.pid").write_text(str(self.process.pid))
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(os.pidfd_open(self.process.pid), self._end)

    def _end(self) -> None:
        if self.process.poll() is not None:
            self.ended.set()

    def kill(self) -> None:
        if not self.ended.is_set():
            os.killpg(self.process.pid, signal.SIGKILL)


class Container:
    """One task."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status = 0
        self.ended = asyncio.Event()
        self.fd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self.fd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self.fd)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.status = code if code >= 0 else 128 - code
        self.ended.set()


class Shim:
    """Answers the calls of one pod."""

    def __init__(self, state: Path, *, plain: bool) -> None:
        self.state = state
        self.plain = plain
        self.stop = asyncio.Event()
        self.machine: Machine | None = None
        self.bundle = ""
        self.annotations: dict[str, str] = {}
        self.containers: dict[str, Container] = {}

    async def handle(self, service: str, method: str, payload: bytes) -> bytes:
        """One call."""
        sandbox = service == "containerd.runtime.sandbox.v1.Sandbox"
        if not sandbox and service != "containerd.task.v2.Task":
            raise Unimplemented(service)
        if sandbox and self.plain:
            raise Unimplemented(f"service {service}")
        function = getattr(self, f"do_{method}", None)
        if function is None:
            raise Unimplemented(method)
        kind = function.__annotations__["r"]
        request = (getattr(api, kind[4:]) if sandbox else getattr(task, kind[5:])).FromString(payload)
        with (self.state / "shim.journal").open("a") as journal:
            journal.write(json.dumps({"method": method, **MessageToDict(request, preserving_proto_field_name=True)}) + "\n")
        if getattr(request, "annotations", None):
            self.annotations = dict(request.annotations)
        if self.annotations.get("test.podshim/fail") == method:
            raise FailedPrecondition(f"{method} fails, as asked")
        answer: bytes = ((await function(request)) or empty_pb2.Empty()).SerializeToString()
        return answer

    async def do_CreateSandbox(self, r: api.CreateSandboxRequest) -> None:
        assert r.options.type_url == "runtime.v1.PodSandboxConfig"
        cri_pb2.PodSandboxConfig.FromString(r.options.value)
        self.bundle = r.bundle_path

    async def do_Platform(self, r: api.PlatformRequest) -> api.PlatformResponse:
        answer = api.PlatformResponse()
        answer.platform.os = self.annotations.get("test.podshim/os", "linux")
        return answer

    async def do_StartSandbox(self, r: api.StartSandboxRequest) -> api.StartSandboxResponse:
        self.machine = Machine(self.bundle)
        return api.StartSandboxResponse(pid=self.machine.process.pid)

    async def do_PingSandbox(self, r: api.PingRequest) -> None:
        pass

    async def do_WaitSandbox(self, r: api.WaitSandboxRequest) -> api.WaitSandboxResponse:
        assert self.machine
        await self.machine.ended.wait()
        return api.WaitSandboxResponse(exit_status=0)

    async def do_SandboxStatus(self, r: api.SandboxStatusRequest) -> api.SandboxStatusResponse:
        assert self.machine
        return api.SandboxStatusResponse(
            sandbox_id=r.sandbox_id, pid=self.machine.process.pid, state="SANDBOX_READY", info={"kind": "test"}
        )

    async def do_SandboxMetrics(self, r: api.SandboxMetricsRequest) -> api.SandboxMetricsResponse:
        numbers = cgroups_v2_pb2.Metrics()
        numbers.memory.usage, numbers.cpu.usage_usec = MEMORY, CPU_US
        answer = api.SandboxMetricsResponse()
        answer.metrics.data.CopyFrom(any_pb2.Any(type_url="io.containerd.cgroups.v2.Metrics", value=numbers.SerializeToString()))
        return answer

    async def do_StopSandbox(self, r: api.StopSandboxRequest) -> None:
        if self.machine:
            self.machine.kill()

    async def do_ShutdownSandbox(self, r: api.ShutdownSandboxRequest) -> None:
        await self.do_StopSandbox(api.StopSandboxRequest())
        asyncio.get_running_loop().call_later(0.05, self.stop.set)  # the answer goes first

    async def do_Create(self, r: task.CreateTaskRequest) -> task.CreateTaskResponse:
        pid_file = f"{r.bundle}/podshim.pid"
        fds = [os.open(path, os.O_RDWR) if path else os.open("/dev/null", os.O_RDWR) for path in (r.stdout, r.stderr)]
        try:
            runc(self.state, "create", "--bundle", r.bundle, "--pid-file", pid_file, r.id, stdout=fds[0], stderr=fds[1])
        finally:
            for fd in fds:
                os.close(fd)
        self.containers[r.id] = Container(int(Path(pid_file).read_text()))
        return task.CreateTaskResponse(pid=self.containers[r.id].pid)

    def container(self, container_id: str) -> Container:
        if container_id not in self.containers:
            raise NotFound(container_id)
        return self.containers[container_id]

    async def do_Start(self, r: task.StartRequest) -> task.StartResponse:
        runc(self.state, "start", r.id)
        return task.StartResponse(pid=self.container(r.id).pid)

    async def do_Kill(self, r: task.KillRequest) -> None:
        if self.container(r.id).ended.is_set():
            raise NotFound("process already finished")
        runc(self.state, "kill", r.id, str(r.signal))

    async def do_Wait(self, r: task.WaitRequest) -> task.WaitResponse:
        container = self.container(r.id)
        await container.ended.wait()
        return task.WaitResponse(exit_status=container.status)

    async def do_Delete(self, r: task.DeleteRequest) -> task.DeleteResponse:
        container = self.container(r.id)
        runc(self.state, "delete", "--force", r.id)
        del self.containers[r.id]
        return task.DeleteResponse(pid=container.pid, exit_status=container.status)

    async def do_Stats(self, r: task.StatsRequest) -> task.StatsResponse:
        self.container(r.id)
        answer = task.StatsResponse()
        answer.stats.CopyFrom((await self.do_SandboxMetrics(api.SandboxMetricsRequest())).metrics.data)
        return answer

    async def do_Shutdown(self, r: task.ShutdownRequest) -> None:
        if not self.containers:
            asyncio.get_running_loop().call_later(0.05, self.stop.set)


async def serve(socket: Path, state: Path) -> None:
    """Until the pod is shut down."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    shim = Shim(state, plain=bool(os.environ.get("PODSHIM_PLAIN")))
    server = await asyncio.start_unix_server(partial(connection, shim), socket)
    print("ready", flush=True)
    await shim.stop.wait()
    server.close()
    socket.unlink()


async def connection(shim: Shim, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The calls of one client, side by side."""
    async with asyncio.TaskGroup() as calls:
        while (frame := await read_frame(reader)) is not None:
            calls.create_task(respond(shim, frame, writer))


async def respond(shim: Shim, frame: Frame, writer: asyncio.StreamWriter) -> None:
    """Answer one call."""
    request, response = ttrpc_pb2.Request.FromString(frame.payload), ttrpc_pb2.Response()
    try:
        response.payload = await shim.handle(request.service, request.method, request.payload)
    except ImgsvcError as error:
        response.status.code, response.status.message = CODES[type(error)], str(error)
    writer.write(encode(Frame(frame.stream, 2, response.SerializeToString())))
    await writer.drain()


def start(state: Path) -> str:
    """The address of the pod's server, which is started for its first bundle."""
    annotations = json.loads(Path("config.json").read_bytes())["annotations"]
    group = annotations["io.kubernetes.cri.sandbox-id"]
    socket = state / f"{hashlib.sha256(group.encode()).hexdigest()[:12]}.shim"
    if not socket.exists():
        command = [sys.executable, "-m", __spec__.name, "serve", str(socket), str(state)]
        with (state / "shim.log").open("ab") as log:
            root = Path(__file__).parents[2]
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=root, start_new_session=True
            )
        assert server.stdout
        assert server.stdout.readline() == b"ready\n"
    return f"unix://{socket}"


def delete(state: Path, bundle: Path, name: str) -> None:
    """Clear up after a server that is dead."""
    with contextlib.suppress(OSError):
        os.killpg(int((bundle / "machine.pid").read_text()), signal.SIGKILL)
    subprocess.run(["runc", "--root", str(state / "podshim"), "delete", "--force", name], check=False, capture_output=True)
    with (state / "shim.journal").open("a") as journal:
        journal.write(json.dumps({"method": "delete", "id": name}) + "\n")
    sys.stdout.buffer.write(task.DeleteResponse(exit_status=137).SerializeToString())


def info() -> int:
    """What the runtime can do; a shim without a sandbox API is old and cannot say."""
    if os.environ.get("PODSHIM_PLAIN"):
        return 2
    answer = types_pb2.RuntimeInfo(name="podshim")
    answer.features.value = json.dumps({"mountOptions": ["rro"], "linux": {"namespaces": ["pid", "user"]}}).encode()
    sys.stdout.buffer.write(answer.SerializeToString())
    return 0


def main(arguments: list[str]) -> int:
    """Command line of a shim."""
    if arguments[0] == "serve":
        asyncio.run(serve(Path(arguments[1]), Path(arguments[2])))
        return 0
    if "-info" in arguments:
        return info()
    flags = dict(zip(arguments[0:-1:2], arguments[1:-1:2], strict=True))
    state = Path(flags["-address"]).parent
    if arguments[-1] == "start":
        parameters = bootstrap_pb2.BootstrapParams.FromString(sys.stdin.buffer.read())
        if not os.environ.get("PODSHIM_PARAMETERS"):
            print(start(state))
        elif (parameters.instance_id, parameters.namespace) == (flags["-id"], flags["-namespace"]):
            result = bootstrap_pb2.BootstrapResult(version=2, address=start(state), protocol="ttrpc")
            sys.stdout.buffer.write(result.SerializeToString())
        else:
            sys.exit("no parameters on standard input")
    else:
        delete(state, Path(flags["-bundle"]), flags["-id"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
