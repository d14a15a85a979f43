"""A node's worth of pods, restarts of the daemon every minute: `python -m tests.vm.soak PODS MINUTES`. See inside/soak.py."""

from __future__ import annotations

import sys
import time
from typing import Final

from tests.vm.disk import new_disk, scratch
from tests.vm.images import prepare
from tests.vm.machine import Machine, machine
from tests.vm.power_cuts import PYTHON, wait_until_up

MEMORY: Final = 4096  # [MiB]
POLL: Final = 10.0  # [seconds]
_LOG: Final = "/var/log/soak"


def soak(vm: Machine, pods: int, minutes: str) -> bool:
    """Run it as a service in the machine and print what it prints. Returns: it found nothing wrong."""
    program = [PYTHON, "-u", "-m", "tests.vm.inside.soak", str(pods), minutes]
    properties = [
        f"--property={text}" for text in ("WorkingDirectory=/opt/checkout", f"StandardOutput=file:{_LOG}", f"StandardError=file:{_LOG}")
    ]
    vm.check("systemd-run", "--unit=soak", *properties, *program)
    seen, runs = 0, True
    while runs:
        time.sleep(POLL)
        runs = vm.run("systemctl", "is-active", "--quiet", "soak").status == 0
        more = vm.check("tail", "-c", f"+{seen + 1}", _LOG)
        print(more, end="", flush=True)
        seen += len(more.encode())
    return vm.run("systemctl", "is-failed", "--quiet", "soak").status != 0


def main(pods: int, minutes: str) -> bool:
    """Returns: nothing wrong was found."""
    with scratch() as directory:
        prepare(directory / "extra")
        with new_disk(directory, directory / "extra") as disk, machine(disk, MEMORY) as vm:
            vm.boot()
            wait_until_up(vm)
            sound = soak(vm, pods, minutes)
            if not sound:
                print(vm.check("journalctl", "-b", "-u", "imgsvc", "-u", "soak", "-o", "short-precise")[-20000:])
            return sound


if __name__ == "__main__":
    sys.exit(not main(int(sys.argv[1]), sys.argv[2]))
