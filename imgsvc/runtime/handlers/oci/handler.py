"""Handler kind 1: an OCI runtime CLI (runc, crun, youki …) with one conmon per container. Satisfies OCIRuntime."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from imgsvc.base.concurrency import Undo, in_thread, time_limit, to_the_end
from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, ImgsvcError, NotFound
from imgsvc.base.fsutil import private_dir
from imgsvc.base.programs import Finished, kill_group, run
from imgsvc.base.removal import scratch_directory
from imgsvc.runtime.handlers.oci.attach import AttachTarget
from imgsvc.runtime.handlers.oci.criu import dump_failed, require_criu
from imgsvc.runtime.handlers.oci.exec import DRAIN_S, ExecTarget, exec_sync
from imgsvc.runtime.handlers.oci.monitor import CREATE_TIMEOUT_S, Conmon, MonitorPaths, runtime_message
from imgsvc.runtime.holder.pause_program import write_pause
from imgsvc.runtime.interfaces import ExecResult, Exit, HandlerFeatures, NewTask, OCIRuntime
from imgsvc.runtime.processes.reaper import Reaper
from imgsvc.runtime.rootfs import remove_bundle
from imgsvc.runtime.settings import HandlerSettings, RuntimeSettings
from imgsvc.runtime.spec.build import DEFAULT_PATH
from imgsvc.runtime.streaming.interfaces import ContainerProcess

log = logging.getLogger(__name__)

CANDIDATES: Final = ("crun", "runc")  # best first; crun creates about three times as fast
# First releases without the known container escapes (CVE-2024-21626, CVE-2025-31133, -52565, -52881), by branch.
_FIXED: Final[Mapping[str, tuple[tuple[int, ...], ...]]] = {"runc": ((1, 2, 8), (1, 3, 3), (1, 4, 0)), "crun": ((1, 24),)}
_SELF_TEST: Final = "selftest-"
_VERSION = re.compile(r"version\s+v?(\d+)\.(\d+)(?:\.(\d+))?(-\w+)?")


class OCICommand:
    """One handler of type "oci"."""

    def __init__(self, handler: HandlerSettings, settings: RuntimeSettings, paths: MonitorPaths, reaper: Reaper) -> None:
        self._handler = handler
        self._settings = settings
        self._paths = paths
        self._root = str(handler.options.get("Root") or settings.state_dir / "oci" / handler.name)
        self._reaper = reaper
        self._monitor = Conmon(settings.conmon, paths, reaper)
        self._systemd = bool(handler.options.get("SystemdCgroup", settings.cgroup_driver == "systemd"))
        self._program = ""
        self._features = HandlerFeatures()

    @property
    def features(self) -> HandlerFeatures:
        """Found by start()."""
        return self._features

    @property
    def pods(self) -> None:
        """None: its pods are namespaces and, where one is needed, a pause process."""
        return None

    @property
    def program(self) -> str:
        """Path of the runtime CLI."""
        return self._program

    @property
    def description(self) -> str:
        """See OCIRuntime. The program is that which was chosen: another one could not read what this one has noted."""
        return self._handler.describe(self._program)

    async def start(self, *, test: bool = True) -> None:
        """See OCIRuntime: choose and test the runtime."""
        private_dir(Path(self._root))
        if not test:
            self._program = self._handler.path
            return
        wanted = self._handler.path or str(self._handler.options.get("BinaryName") or "")
        self._program = await self._choose([wanted] if wanted else list(CANDIDATES))
        self._features = await self._find_features()

    async def close(self) -> None:
        """Nothing to let go: conmon stands on its own."""

    async def _choose(self, names: Sequence[str]) -> str:
        problem: ImgsvcError | None = None
        for name in names:
            program = shutil.which(name)
            if program is None:
                problem = problem or NotFound(f"no OCI runtime {name}", hint="install runc or crun, or set the handler's path")
                continue
            try:
                await self._self_test(program)
            except ImgsvcError as error:
                log.info("OCI runtime %s is not usable here: %s", program, error)
                problem = error
                continue
            return program
        raise problem or NotFound("no OCI runtime")

    async def _self_test(self, program: str) -> None:
        """Create and delete a container that does nothing. Raises: FailedPrecondition."""
        with scratch_directory(_SELF_TEST, self._settings.state_dir) as bundle:
            write_pause(bundle / "rootfs")
            (bundle / "program").write_text(program)
            name = bundle.name
            (bundle / "config.json").write_text(json.dumps(_self_test_spec(f"/imgsvc-selftest/{name}")))
            created = await self._detached([program, "--root", str(bundle / "state"), "create", "--bundle", str(bundle), name])
            await _end_self_test(program, bundle)
            if created.status:
                raise FailedPrecondition(
                    f"{program} cannot create containers here: {runtime_message(created.stderr.decode(errors='replace'))}"
                )

    async def _detached(self, argv: Sequence[str]) -> Finished:
        """Run a command whose child keeps its standard streams: they must be files, or we would wait for the child.

        Also when the caller is cancelled, it has ended on return: what it makes can be deleted then. Raises: DeadlineExceeded.
        """
        with tempfile.TemporaryFile(dir=self._settings.state_dir) as errors:
            status = await to_the_end(_to_its_end(argv, errors))
            errors.seek(0)
            return Finished(status, b"", errors.read(65536))

    async def _find_features(self) -> HandlerFeatures:
        text = (await run([self._program, "--version"])).stdout.decode(errors="replace")
        kind = os.path.basename(self._program)
        options: Sequence[str] = ()
        described = await run([self._program, "features"])
        if described.status == 0:
            with contextlib.suppress(ValueError, AttributeError):
                options = json.loads(described.stdout).get("mountOptions") or ()
        return HandlerFeatures(
            # crun 1.8 has no `features`, but knows both.
            recursive_read_only_mounts="rro" in options or kind == "crun",
            user_namespaces=os.path.exists("/proc/self/ns/user"),
            warnings=tuple(_escape_warnings(kind, text)),
        )

    def _argv(self, *arguments: str) -> list[str]:
        flags = ["--systemd-cgroup"] if self._systemd else []
        return [self._program, "--root", self._root, *flags, *arguments]

    async def create(self, task: NewTask) -> int:
        """See OCIRuntime."""
        options = self._handler.options
        flags = ["-s"] if self._systemd else []
        flags += ["--no-new-keyring"] if options.get("NoNewKeyring") else []
        flags += ["--no-pivot"] if options.get("NoPivotRoot") else []
        # Without a log of its own, its warnings land on the container's standard error; errors reach the monitor as well.
        arguments = ["--root=" + self._root, f"--log={task.bundle / 'runtime.log'}"]
        async with Undo() as undo:
            undo.push(f"deleting container {task.container_id}", self.delete, task.container_id)
            return await self._monitor.create(task, self._program, arguments, flags)

    async def start_pause(self, sandbox_id: str, bundle: Path) -> int:
        """See OCIRuntime. Without a monitor: it has no streams, no log, and its end is noticed by its pid."""
        pid_file = bundle / "init.pid"
        done = await self._detached(self._argv("run", "--detach", "--bundle", str(bundle), "--pid-file", str(pid_file), sandbox_id))
        if done.status:
            raise FailedPrecondition(f"the OCI runtime refused the pause process: {runtime_message(done.stderr.decode(errors='replace'))}")
        return int(pid_file.read_text())

    async def start_task(self, container_id: str) -> None:
        """See OCIRuntime."""
        self._require(await run(self._argv("start", container_id)), "start")

    def _require(self, done: Finished, verb: str) -> None:
        if done.status:
            raise FailedPrecondition(
                f"the OCI runtime could not {verb} the container: {runtime_message(done.stderr.decode(errors='replace'))}"
            )

    async def kill(self, container_id: str, signal: int, *, everyone: bool = False) -> None:
        """See OCIRuntime."""
        flags = ["--all"] if everyone else []
        done = await run(self._argv("kill", *flags, container_id, str(signal)))
        complaint = done.stderr.decode(errors="replace")
        if done.status and not any(
            gone in complaint for gone in ("not running", "does not exist", "process already finished", "no such process")
        ):
            self._require(done, "signal")

    async def wait(self, container_id: str, pid: int, pid_start: int) -> Exit:
        """See OCIRuntime."""
        return await self._monitor.wait(container_id, pid, pid_start)

    async def delete(self, container_id: str) -> None:
        """See OCIRuntime."""
        try:
            done = await run(self._argv("delete", "--force", container_id))
        except NotFound as error:  # uninstalled under its containers; what it noted dies with the node
            log.warning("container %s is deleted without the help of its runtime: %s", container_id, error)
        else:
            if done.status and "does not exist" not in done.stderr.decode(errors="replace"):
                self._require(done, "delete")
        await self._monitor.gone(container_id)

    async def usage(self, container_id: str) -> None:
        """None: every container has its cgroup here."""

    async def update(self, container_id: str, resources: Mapping[str, Any]) -> None:
        """See OCIRuntime."""
        self._require(await run(self._argv("update", "--resources", "-", container_id), stdin=json.dumps(resources).encode()), "update")

    async def checkpoint(self, container_id: str, images: Path, work: Path, timeout_s: float) -> None:
        """See OCIRuntime."""
        await require_criu()
        # What would be refused otherwise may stay as it is, for the container goes on.
        allowed = ["--leave-running", "--tcp-established", "--ext-unix-sk", "--file-locks"]
        argv = self._argv("checkpoint", *allowed, "--image-path", str(images), "--work-path", str(work), container_id)
        async with Undo() as undo:
            # A dump that was killed leaves the container frozen.
            undo.push(f"letting container {container_id} go on", run, self._argv("resume", container_id))
            done = await run(argv, timeout_s=timeout_s)
            if done.status:
                raise dump_failed(self._program, work / "dump.log", runtime_message(done.stderr.decode(errors="replace")))

    async def reopen_log(self, container_id: str, log_path: str) -> None:
        """See OCIRuntime."""
        await self._monitor.reopen_log(container_id, log_path)

    def process_of(self, container_id: str) -> ContainerProcess:
        """What the streaming server needs to exec into, or attach to, a container."""
        bundle = self._paths.bundle(container_id)
        spec = json.loads((bundle / "config.json").read_bytes())
        return ContainerProcess(
            container_id=container_id,
            runtime=tuple(self._argv()),
            process=spec["process"],
            attach_socket=self._paths.sockets / container_id / "attach",
            ctl_fifo=bundle / "ctl",
            reaper=self._reaper,
        )

    def exec_target(self, container_id: str, command: Sequence[str], *, terminal: bool) -> ExecTarget:
        """See OCIRuntime."""
        return ExecTarget(self.process_of(container_id), tuple(command), terminal, self._paths.bundle(container_id))

    def attach_target(self, container_id: str) -> AttachTarget:
        """See OCIRuntime."""
        return AttachTarget(self.process_of(container_id))

    async def exec_sync(self, container_id: str, command: Sequence[str], timeout_s: float) -> ExecResult:
        """See OCIRuntime."""
        scratch = self._paths.bundle(container_id)
        drain_s = self._settings.drain_exec_sync_io_timeout_s or DRAIN_S
        result = await exec_sync(self.process_of(container_id), tuple(command), timeout_s=timeout_s, scratch=scratch, drain_s=drain_s)
        return ExecResult(result.stdout, result.stderr, result.exit_code)


async def _to_its_end(argv: Sequence[str], errors: IO[bytes]) -> int:
    nowhere = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, stdin=nowhere, stdout=nowhere, stderr=errors, start_new_session=True)
    try:
        async with time_limit(CREATE_TIMEOUT_S):
            return await process.wait()
    except TimeoutError as error:
        kill_group(process.pid)
        await process.wait()
        raise DeadlineExceeded(f"{os.path.basename(argv[0])} did not end within {CREATE_TIMEOUT_S:g} s and was killed") from error


async def sweep_self_tests(state: Path) -> None:
    """Remove what self-tests left that were going on when the daemon was killed: a container each."""
    for bundle in await in_thread(lambda: list(state.glob(f"{_SELF_TEST}*"))):
        with contextlib.suppress(OSError, ImgsvcError):  # killed before it had begun
            await _end_self_test((bundle / "program").read_text(), bundle)
        await in_thread(remove_bundle, bundle)


async def _end_self_test(program: str, bundle: Path) -> None:
    await run([program, "--root", str(bundle / "state"), "delete", "--force", bundle.name], cwd=bundle)


def as_oci_runtime(command: OCICommand) -> OCIRuntime:
    """Typed as its Protocol, for mypy."""
    return command


def _escape_warnings(kind: str, version_text: str) -> list[str]:
    match = _VERSION.search(version_text)
    if match is None or kind not in _FIXED:
        return []
    version = tuple(int(part or 0) for part in match.groups()[:3])
    if any(_fixed_on_branch(version, fixed, last=fixed == _FIXED[kind][-1]) for fixed in _FIXED[kind]):
        return []
    shown = ".".join(str(part) for part in version)
    first = " or ".join(".".join(str(part) for part in fixed) for fixed in _FIXED[kind])
    return [f"{kind} {shown} is older than {first}: known container escapes may apply unless your distribution patched them"]


def _fixed_on_branch(version: tuple[int, ...], fixed: tuple[int, ...], *, last: bool) -> bool:
    return version >= fixed if last else version[:2] == fixed[:2] and version >= fixed


def _self_test_spec(cgroup: str) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "hostname": "selftest",
        "process": {
            "args": ["/pause"],
            "env": [DEFAULT_PATH],
            "cwd": "/",
            "user": {"uid": 65534, "gid": 65534},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            # The root file system is below STATE, and systemd mounts /run without devices: runc makes /dev/null, and opens it.
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"cgroupsPath": cgroup, "namespaces": [{"type": t} for t in ("pid", "mount", "ipc", "uts", "network")]},
    }
