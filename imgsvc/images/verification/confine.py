"""A control group around one program: bounds on processes and memory, and a sure way to end all of them.

Works on cgroup v1, v2 and hybrids; without the right to make groups there are none, and the process group has to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imgsvc.base.oci import MIB

log = logging.getLogger(__name__)

MAX_PROCESSES: Final = 64  # of one verifier; a shell with some helpers has ten
MAX_MEMORY: Final = 512 * MIB  # [bytes] of one verifier
_ROOT: Final = Path("/sys/fs/cgroup")
_KILL_S: Final = 2.0  # how long processes are given to die; a fork bomb's children come and go meanwhile
_LIMITS: Final = {
    "pids": {"pids.max": MAX_PROCESSES},
    "memory": {"memory.limit_in_bytes": MAX_MEMORY},
    "": {"pids.max": MAX_PROCESSES, "memory.max": MAX_MEMORY, "memory.swap.max": 0},
}


@dataclass(frozen=True, slots=True)
class Confinement:
    """Groups a program is started in. Empty where this node lets us make none."""

    groups: tuple[Path, ...]

    def wrap(self, argv: list[str]) -> list[str]:
        """A command that enters the groups, then becomes `argv`; so no process of the program was ever outside."""
        if not self.groups:
            return argv
        enter = "".join(f'echo $$ > "{group}/cgroup.procs" && ' for group in self.groups)
        return ["/bin/sh", "-c", enter + 'exec "$@"', "sh", *argv]


@contextlib.contextmanager
def confined(name: str) -> Iterator[Confinement]:
    """Groups for one program; whatever is in them at the end is killed. Blocking, for milliseconds.

    name: unique among running programs, e.g. with the process ID.
    """
    made: list[Path] = []
    for controller, limits in _LIMITS.items():
        base = _ROOT / controller
        if not (base / "cgroup.procs").exists() or (controller == "" and not (base / "cgroup.controllers").exists()):
            continue
        group = base / f"imgsvc-verify-{name}"
        try:
            group.mkdir()
        except OSError as error:
            log.debug("no control group for verifiers at %s: %s", base, error)
            continue
        made.append(group)
        for file, value in limits.items():
            with contextlib.suppress(OSError):  # a controller that is not delegated here
                (group / file).write_text(str(value))
    try:
        yield Confinement(tuple(made))
    finally:
        for group in made:
            _end(group)


def _end(group: Path) -> None:
    deadline = time.monotonic() + _KILL_S
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")
    while True:
        members = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                log.warning("processes of an image verifier cannot be killed: %s", group)
                return
        time.sleep(0.01)
