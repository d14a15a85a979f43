"""Exchanges a directory with a symbolic link below many roots, as fast as it can: the race that every look-up has to stand.

A process of its own: how often it swaps does not depend on who holds the test's interpreter. What counts are exchanges while
somebody is at work in a root, and a test goes on until there were enough of them, however busy the machine is.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

DIRECTORY: Final = "a"  # what is exchanged
_LINK: Final = "outside"  # and what with
LAST: Final = "last"  # whose being there says that nobody is at work any more
_BATCH: Final = 200  # exchanges between two looks at LAST
_AFTER: Final = 1.0  # [seconds] for which it goes on, without counting: directories are finished after the last entry
_RENAME_EXCHANGE: Final = 2
_COUNT: Final = 8  # [bytes]
_PATIENCE: Final = 80.0  # [seconds] for one test; a few are enough where nobody else works


class Swapper:
    """Swaps DIRECTORY in every root that matches, from when it appears until shortly after LAST has.

    Use: `with Swapper(…) as swapper: swapper.race(work, 10_000)`.
    """

    def __init__(self, roots: str, target: Path) -> None:
        """roots: glob pattern of directories. target: where the links lead."""
        self._counter = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        fd = self._counter.fileno()
        command = [sys.executable, __file__, roots, str(target), str(fd)]
        self._process = subprocess.Popen(command, pass_fds=[fd])

    def race(self, work: Callable[[], object], exchanges: int) -> None:
        """Do `work`, and again until there were so many exchanges. Raises: AssertionError when there never are."""
        deadline = time.monotonic() + _PATIENCE
        work()
        while self.count < exchanges:
            assert time.monotonic() < deadline, f"only {self.count} exchanges"
            assert self._process.poll() is None
            work()

    @property
    def count(self) -> int:
        """Exchanges so far during which LAST was not there."""
        return int.from_bytes(os.pread(self._counter.fileno(), _COUNT, 0), "big")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._counter.close()


def _swap(roots: str, target: str, counter: int) -> None:
    exchange = ctypes.CDLL(None).renameat2
    count = 0
    while True:
        for root in glob.glob(roots):
            if _done(root, _AFTER):
                continue
            with contextlib.suppress(OSError):
                os.symlink(target, f"{root}/{_LINK}")
            one, other = os.fsencode(f"{root}/{DIRECTORY}"), os.fsencode(f"{root}/{_LINK}")
            swaps = sum(exchange(-100, one, -100, other, _RENAME_EXCHANGE) == 0 for _ in range(_BATCH))
            if not _done(root, 0):
                count += swaps
        os.pwrite(counter, count.to_bytes(_COUNT, "big"), 0)


def _done(root: str, since: float) -> bool:
    """Whether nobody has been at work in `root` for so long [seconds]."""
    if not os.path.isdir(root):
        return True
    try:
        return time.time() - os.lstat(f"{root}/{LAST}").st_ctime >= since
    except OSError:
        return False


if __name__ == "__main__":
    _swap(sys.argv[1], sys.argv[2], int(sys.argv[3]))
