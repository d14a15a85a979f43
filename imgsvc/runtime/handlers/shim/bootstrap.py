"""Finding and starting a shim, reading its answer in each of its generations, and its `delete` call.

======================== ================================================= =========================
generation               answer on stdout                                  task service
======================== ================================================= =========================
up to containerd 1.7     the address as text                               containerd.task.v2.Task
2.0 to 2.2               JSON {"version", "address", "protocol"}           as `version` says
from 2.3 on              protobuf BootstrapResult                          containerd.task.v3.Task
======================== ================================================= =========================

Parameters go by flags and environment. From 2.3 on, shims want them as a BootstrapParams message on standard input, too, and
refuse to start without one, before they have done anything. Older ones read their options there, and fail on that message. So
the empty input comes first, and what a program has taken is remembered.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError

from imgsvc.api import bootstrap_pb2, task_v2_pb2, types_pb2
from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unimplemented, printable
from imgsvc.base.fsutil import write_atomic
from imgsvc.base.programs import SAFE_PATH, run
from imgsvc.runtime.handlers.shim.events import ShimEvents

NAMESPACE: Final = "imgsvc"
MAX_VERSION: Final = 3
_START_TIMEOUT_S: Final = 30.0
_PUBLISHER: Final = "/bin/false"  # events come by ttrpc
_SAVED: Final = "bootstrap.json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a shim answers. version: of the task service, 2 or 3."""

    version: int
    address: str
    protocol: str = "ttrpc"


def program_name(runtime_type: str) -> str:
    """io.containerd.NAME.vN -> containerd-shim-NAME-vN; an absolute path stays. Raises: InvalidArgument."""
    if runtime_type.startswith("/"):
        return runtime_type
    parts = runtime_type.split(".")
    if "/" in runtime_type or len(parts) < 2 or not all(parts):
        raise InvalidArgument(f'"{printable(runtime_type, 80)}" is not a runtime type', hint="use oci, or io.containerd.NAME.vN")
    return f"containerd-shim-{parts[-2]}-{parts[-1]}"


def find_program(runtime_type: str, path: str) -> str:
    """The shim's program: as configured, on PATH, or beside our own. Raises: NotFound, InvalidArgument."""
    name = path or program_name(runtime_type)
    beside = os.path.join(os.path.dirname(sys.executable), name)
    found = shutil.which(name) or shutil.which(beside)
    if found is None:
        raise NotFound(f"no shim {name}", hint="install it on PATH, or set the handler's path")
    return found


def parse_answer(data: bytes) -> Endpoint:
    """What `start` printed. Raises: DataLoss (nothing sensible), Unimplemented (newer than we are)."""
    text = data.strip()
    try:
        if text.startswith(b"{"):
            value = json.loads(text)
            endpoint = Endpoint(int(value["version"]), str(value["address"]), str(value.get("protocol") or "ttrpc"))
        elif text.startswith((b"unix:", b"/", b"@", b"vsock:", b"hvsock:")):
            endpoint = Endpoint(2, text.decode().splitlines()[0].strip())
        else:
            result = bootstrap_pb2.BootstrapResult.FromString(data)
            endpoint = Endpoint(result.version, result.address, result.protocol or "ttrpc")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, DecodeError) as error:
        raise DataLoss(f"the shim's answer is invalid: {printable(data.decode(errors='replace'), 120)}") from error
    if not endpoint.address:
        raise DataLoss("the shim returned no address")
    if endpoint.version > MAX_VERSION:
        raise Unimplemented(f"the shim speaks version {endpoint.version} of the task service, this imgsvc up to {MAX_VERSION}")
    if endpoint.protocol != "ttrpc" or endpoint.address.startswith(("vsock:", "hvsock:")):
        raise Unimplemented(f"the shim listens on {endpoint.address} with {endpoint.protocol}; only ttrpc on Unix sockets is supported")
    return endpoint


class Launcher:
    """Runs one shim program."""

    def __init__(self, program: str, daemon: str, events: ShimEvents) -> None:
        """daemon: an address that is ours alone; events: where it delivers what happens."""
        self.program = program
        self._daemon = daemon
        self._events = events
        self._wants_parameters: bool | None = None  # on standard input; None: not known yet

    async def start(self, container_id: str, bundle: Path, options: any_pb2.Any | None = None) -> Endpoint:
        """Start the shim of a bundle, or join that of its pod. options: the handler's.

        Raises: FailedPrecondition, DataLoss, Unimplemented.
        """
        await in_thread(self._events.start)
        (bundle / "log").touch(mode=0o600)  # the shim opens it, and dies without it
        complaints = []
        for wants in (False, True) if self._wants_parameters is None else (self._wants_parameters,):
            stdin = self._parameters(container_id, options) if wants else b""
            flags = [*self._flags(container_id), "start"]
            done = await run(flags, stdin=stdin, env=self._environment(), cwd=bundle, timeout_s=_START_TIMEOUT_S)
            if not done.status:
                self._wants_parameters = wants
                break
            output = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
            complaints.append(printable(output[-1]) if output else done.complaint)
        else:
            raise FailedPrecondition(f"the shim could not be started: {'; with BootstrapParams: '.join(complaints)}")
        endpoint = parse_answer(done.stdout)
        save_endpoint(bundle, endpoint)
        (bundle / "shim-binary-path").write_text(self.program)
        return endpoint

    async def delete(self, container_id: str, bundle: Path) -> task_v2_pb2.DeleteResponse:
        """Clear up after a shim that is dead; kills what it left. Raises: FailedPrecondition."""
        flags = [*self._flags(container_id), "-bundle", str(bundle), "delete"]
        done = await run(flags, env=self._environment(), cwd=bundle, timeout_s=_START_TIMEOUT_S)
        if done.status:
            raise FailedPrecondition(f"the shim's delete failed: {done.complaint}")
        try:
            return task_v2_pb2.DeleteResponse.FromString(done.stdout)
        except DecodeError:
            return task_v2_pb2.DeleteResponse(exit_status=137)

    async def describe(self) -> dict[str, Any]:
        """What the shim's runtime can do: the `features` object of the OCI runtime specification; {} before containerd 2.0."""
        done = await run([self.program, "-info"], env=self._environment(), timeout_s=_START_TIMEOUT_S)
        if done.status:
            return {}
        try:
            found = json.loads(types_pb2.RuntimeInfo.FromString(done.stdout).features.value or b"{}")
        except (DecodeError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _parameters(self, container_id: str, options: any_pb2.Any | None) -> bytes:
        message = bootstrap_pb2.BootstrapParams(
            instance_id=container_id,
            namespace=NAMESPACE,
            containerd_grpc_address=self._daemon,
            containerd_ttrpc_address=str(self._events.socket_path),
            containerd_binary=_PUBLISHER,
        )
        if options is not None:
            message.extensions.add().value.CopyFrom(options)
        return message.SerializeToString()

    def _flags(self, container_id: str) -> list[str]:
        own = [self.program, "-namespace", NAMESPACE, "-address", self._daemon]
        return [*own, "-publish-binary", _PUBLISHER, "-id", container_id]

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", SAFE_PATH),
            "TTRPC_ADDRESS": str(self._events.socket_path),
            "GRPC_ADDRESS": self._daemon,
            "NAMESPACE": NAMESPACE,
            "GOMAXPROCS": "2",
            "MAX_SHIM_VERSION": "2",
        }


def save_endpoint(bundle: Path, endpoint: Endpoint) -> None:
    """Note where the shim of a bundle answers, for this daemon and the next."""
    value = {"version": endpoint.version, "address": endpoint.address, "protocol": endpoint.protocol}
    write_atomic(bundle / _SAVED, json.dumps(value).encode(), sync=False)


def saved_endpoint(bundle: Path) -> Endpoint | None:
    """Where the shim of a bundle answers, as an earlier start noted; None when none was started."""
    try:
        value = json.loads((bundle / _SAVED).read_bytes())
        return Endpoint(int(value["version"]), str(value["address"]), str(value["protocol"]))
    except (OSError, ValueError, KeyError):
        return None
