"""One emulated machine: boot a disk, run commands in it, cut its power, boot it again.

The disk is a qcow2 layer over the shared image. What the guest wrote without a flush may be lost with qemu, which is what
a disk's volatile cache does; what it flushed is in the host's files.
"""

from __future__ import annotations

import base64
import contextlib
import json
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.vm.disk import scratch

BOOT_TIMEOUT: Final = 600.0  # [seconds]; 20 on an idle machine, over 200 with ten others at work on two cores
RUN_TIMEOUT: Final = 600.0  # [seconds] for one command
_GRACE: Final = 15.0  # [seconds] the agent's own timeout comes before ours
_MEMORY: Final = 1536  # [MiB]
# Everything takes a third less time than with `-cpu max` alone: page tables of four levels, and C libraries that do not choose
# AVX, which is slow to emulate; and room for translated code, of which Python makes much. Without AVX, no AES instructions: the
# kernel's module for them tests itself with both, and what was loading it then hangs.
_ACCELERATOR: Final = "tcg,thread=multi,tb-size=2048"  # [MiB], used as needed
_CPU: Final = "max,la57=off,xsave=off,aes=off"
_CMDLINE: Final = (
    "root=/dev/vda rw rootflags=commit=1000 console=ttyS0 loglevel=4 panic=-1 mitigations=off net.ifnames=0 systemd.show_status=0"
)


class MachineLost(Exception):
    """The machine hangs or ended by itself; the text ends with its console."""


@dataclass(frozen=True, slots=True)
class Done:
    """A finished command. status: None when it ran into its timeout."""

    status: int | None
    out: str
    err: str


@dataclass(slots=True)
class Machine:
    """See boot(). directory: of the disk, the console and the sockets; memory [MiB]; a console of its own for each boot."""

    directory: Path
    kernel: Path
    memory: int = _MEMORY
    boots: int = 0
    _qemu: subprocess.Popen[bytes] | None = None
    _port: socket.socket | None = None
    _buffer: bytes = b""
    _last: int = 0
    _answers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def on(self) -> bool:
        """Whether it runs."""
        return self._qemu is not None

    @property
    def console(self) -> str:
        """What the running or last boot printed."""
        try:
            return (self.directory / f"console-{self.boots}").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def boot(self) -> float:
        """Switch it on and wait for the agent. Returns: seconds that took. Raises: MachineLost."""
        began = time.monotonic()
        self.boots += 1
        self._buffer, self._answers = b"", {}
        with socket.socket(socket.AF_UNIX) as listener:
            path = self.directory / "agent"
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(BOOT_TIMEOUT)
            with (self.directory / "qemu.log").open("ab") as log:
                self._qemu = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self._port = listener.accept()[0]
        hello = self._next(began + BOOT_TIMEOUT)
        assert "boot" in hello, hello
        return time.monotonic() - began

    def _command(self) -> list[str]:
        # setpriv: qemu goes when the test process does, however that ends.
        return [
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", _ACCELERATOR, "-cpu", _CPU, "-smp", "2"),
            *("-machine", "q35", "-nodefaults", "-m", f"{self.memory}M", "-display", "none", "-no-reboot", "-device", "virtio-rng-pci"),
            *("-kernel", str(self.kernel / "vmlinuz"), "-initrd", str(self.kernel / "initrd"), "-append", _CMDLINE),
            *("-drive", f"file={self.directory}/disk.qcow2,if=virtio,format=qcow2,cache=writeback"),
            *("-serial", f"file:{self.directory}/console-{self.boots}"),
            *("-chardev", f"socket,id=agent,path={self.directory}/agent", "-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
        ]

    def begin(self, *argv: str, data: bytes = b"", timeout: float = RUN_TIMEOUT) -> int:
        """Start a command and do not wait. Returns: what end() takes."""
        assert self._port
        self._last += 1
        request = {"id": self._last, "argv": argv, "input": base64.b64encode(data).decode(), "timeout": timeout}
        self._port.settimeout(_GRACE)
        self._port.sendall(json.dumps(request).encode() + b"\n")
        return self._last

    def end(self, number: int, timeout: float = RUN_TIMEOUT) -> Done:
        """Wait for a command that begin() started. Raises: MachineLost."""
        deadline = time.monotonic() + timeout + _GRACE
        while number not in self._answers:
            answer = self._next(deadline)
            self._answers[answer["id"]] = answer
        answer = self._answers.pop(number)
        return Done(answer["status"], _text(answer["out"]), _text(answer["err"]))

    def answers_within(self, number: int, seconds: float) -> bool:
        """Whether a command that begin() started ends in that time with status 0."""
        deadline = time.monotonic() + seconds
        while number not in self._answers:
            answer = self._receive(deadline)
            if answer is None:
                return False
            self._answers[answer["id"]] = answer
        return bool(self._answers[number]["status"] == 0)

    def run(self, *argv: str, data: bytes = b"", timeout: float = RUN_TIMEOUT) -> Done:
        """Run a command to its end. Raises: MachineLost."""
        return self.end(self.begin(*argv, data=data, timeout=timeout), timeout)

    def check(self, *argv: str, data: bytes = b"", timeout: float = RUN_TIMEOUT) -> str:
        """As run(); its output. Raises: AssertionError when it fails."""
        done = self.run(*argv, data=data, timeout=timeout)
        assert done.status == 0, f"{' '.join(argv)[:300]} → {done.status}\n{done.out[-4000:]}\n{done.err[-4000:]}"
        return done.out

    def put(self, path: str, data: bytes) -> None:
        """Write a file."""
        self.check("sh", "-c", 'cat > "$0"', path, data=data)

    def _next(self, deadline: float) -> dict[str, Any]:
        answer = self._receive(deadline)
        if answer is None:
            raise MachineLost(f"no answer in time; its console:\n{self.console[-6000:]}")
        return answer

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None when none came until the deadline."""
        assert self._port
        while b"\n" not in self._buffer:
            if not select.select([self._port], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            chunk = self._port.recv(1 << 20)
            if not chunk:
                raise MachineLost(f"it ended by itself; its console:\n{self.console[-6000:]}")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cut(self) -> None:
        """The power goes: the machine and everything it had not flushed are gone at once."""
        if self._qemu:
            self._qemu.kill()
        self._over()

    def shut_down(self) -> None:
        """An orderly reboot, up to where the machine would start again (boot() does). Raises: MachineLost."""
        assert self._qemu
        self.begin("systemctl", "reboot")
        try:
            self._qemu.wait(BOOT_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise MachineLost(f"it does not shut down; its console:\n{self.console[-6000:]}") from None
        self._over()

    def _over(self) -> None:
        if self._qemu:
            self._qemu.wait()
        if self._port:
            self._port.close()
        self._qemu = self._port = None


def _text(data: str) -> str:
    return base64.b64decode(data).decode(errors="replace")


@contextlib.contextmanager
def machine(disk: Path, memory: int = _MEMORY) -> Iterator[Machine]:
    """A machine with a fresh layer over `disk`, not booted, for a `with` block. Beside the disk are vmlinuz and initrd. memory [MiB]."""
    with scratch() as directory:
        made = Machine(directory, disk.parent, memory)
        _qemu_img("create", "-q", "-f", "qcow2", "-b", str(disk), "-F", "raw", f"{directory}/disk.qcow2")
        try:
            yield made
        finally:
            made.cut()


def _qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, timeout=30)
