"""Run all tests in two processes side by side: `python -m tests.run`. With arguments, one pytest gets them all instead.

Most tests wait for other programs most of the time; two processes take little more than half of the time of one. Each has the
registries and tools it shares between tests for itself, so that nothing but the machine is shared.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from typing import IO, Final

# The machine of tests/vm is booted at once, and works beside the tests that stand before it in its share.
FIRST: Final = ("tests/field", "tests/images", "tests/registry", "tests/runtime", "tests/snapshot", "tests/vm")
SHARES: Final = (FIRST, ("tests", *(f"--ignore={directory}" for directory in FIRST)))
_SUMMARY: Final = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed|deselected)")


class Share:
    """One pytest, whose output is passed on line by line."""

    def __init__(self, number: int, arguments: tuple[str, ...]) -> None:
        self.counts: Counter[str] = Counter()
        self._number = number
        command = [sys.executable, "-m", "pytest", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._pass_on, args=(self._process.stdout,))
        self._reader.start()

    def _pass_on(self, output: IO[str]) -> None:
        for line in output:
            print(f"[{self._number}] {line}", end="", flush=True)
            if " in " in line and (found := _SUMMARY.findall(line)):
                self.counts = Counter({kind: int(count) for count, kind in found})

    def wait(self) -> int:
        """The exit code, once all output is passed on."""
        self._reader.join()
        return self._process.wait()


def main(arguments: list[str]) -> int:
    """The first exit code that is not 0."""
    if arguments:
        return subprocess.run([sys.executable, "-m", "pytest", *arguments]).returncode
    began = time.monotonic()
    shares = [Share(number, share) for number, share in enumerate(SHARES, 1)]
    codes = [share.wait() for share in shares]
    total = sum((share.counts for share in shares), Counter[str]())
    shown = ", ".join(f"{count} {kind}" for kind, count in total.items()) or "no tests ran"
    seconds = time.monotonic() - began
    print(f"==== {shown} in {seconds:.2f}s ({timedelta(seconds=int(seconds))}) ====")
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
