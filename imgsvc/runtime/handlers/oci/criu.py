"""criu, which an OCI runtime uses to dump processes: whether it works here, and what it complained about."""

from __future__ import annotations

import shutil
from pathlib import Path

from imgsvc.base.errors import FailedPrecondition, printable
from imgsvc.base.programs import run


async def require_criu() -> None:
    """Raises: FailedPrecondition unless criu is installed and works on this kernel."""
    program = shutil.which("criu")
    if program is None:
        raise FailedPrecondition("checkpoints need criu, which is not installed", hint="install the package criu")
    done = await run([program, "check"])
    if done.status:
        raise FailedPrecondition(f"criu does not work on this kernel: {done.complaint}", where=program)


def dump_failed(runtime: str, log: Path, complaint: str) -> FailedPrecondition:
    """The error of a failed dump: criu's last error in its log when there is one, else the runtime's complaint."""
    try:
        errors = [line.strip() for line in log.read_text(errors="replace").splitlines() if "Error (" in line]
    except OSError:
        errors = []
    return FailedPrecondition(f"{runtime} could not checkpoint the container with criu: {printable(errors[-1]) if errors else complaint}")
