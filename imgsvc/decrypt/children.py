"""Bounded runs of helper programs: a deadline, capped output, nothing left behind. Blocking; meant for a worker thread."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from imgsvc.base import children
from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted

MAX_STDERR: Final = 4096  # [bytes] kept for error texts, the last ones; the rest is read and dropped
POLL_S: Final = 0.1  # [seconds] how soon a cancelled run is noticed
_CHUNK: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended. stdout may hold secrets, so it stays out of the repr."""

    status: int
    stdout: bytes
    stderr: str

    def __repr__(self) -> str:
        return f"Finished(status={self.status}, {len(self.stdout)} bytes)"


def run_bounded(
    argv: Sequence[str],
    given: bytes,
    *,
    timeout_s: float,
    limit: int,
    env: Mapping[str, str] | None = None,
    cancel: CancelToken | None = None,
) -> Finished:
    """Run a program to its end with `given` on its stdin.

    The program leads a process group of its own, which is killed when the deadline passes, when stdout exceeds `limit`
    [bytes], or on cancel; helpers it started go with it.

    Raises: FailedPrecondition (cannot be started), DeadlineExceeded, ResourceExhausted, Cancelled.
    """
    try:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        raise FailedPrecondition(f"cannot start the program: {error.strerror}", where=argv[0]) from error
    children.started(child.pid)  # it may have ended long before a helper of its closes the pipes
    stdout, stderr = bytearray(), bytearray()
    deadline = time.monotonic() + timeout_s
    try:
        _exchange(child, memoryview(given), stdout, stderr, limit, deadline, cancel)
        status = child.wait(max(0.0, deadline - time.monotonic()) + POLL_S)
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        raise DeadlineExceeded(f"no answer within {timeout_s:g} s", where=argv[0]) from error
    finally:
        # Also after success: what the program left in its group must not outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for stream in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(BrokenPipeError):
                _opened(stream).close()
        child.wait()
        children.waited(child.pid)
    return Finished(status, bytes(stdout), stderr.decode("utf-8", "replace").strip())


def _exchange(
    child: subprocess.Popen[bytes],
    pending: memoryview,
    stdout: bytearray,
    stderr: bytearray,
    limit: int,
    deadline: float,
    cancel: CancelToken | None,
) -> None:
    """Move bytes until both outputs end. Raises: TimeoutError, ResourceExhausted, Cancelled."""
    with selectors.DefaultSelector() as selector:
        selector.register(_opened(child.stdin), selectors.EVENT_WRITE)
        selector.register(_opened(child.stdout), selectors.EVENT_READ, stdout)
        selector.register(_opened(child.stderr), selectors.EVENT_READ, stderr)
        os.set_blocking(_opened(child.stdin).fileno(), False)
        while any(key.data is not None for key in selector.get_map().values()):
            if cancel:
                cancel.check()
            if time.monotonic() > deadline:
                raise TimeoutError
            for key, _ in selector.select(POLL_S):
                if key.data is None:
                    pending = _feed(selector, key, pending)
                    continue
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
                del stderr[:-MAX_STDERR]
                if len(stdout) > limit:
                    raise ResourceExhausted(f"printed more than {limit} bytes", where=str(child.args[0]))  # type: ignore[index]  # a list


def _feed(selector: selectors.BaseSelector, key: selectors.SelectorKey, pending: memoryview) -> memoryview:
    """Write what fits; close stdin when all is written or the reader has gone."""
    try:
        pending = pending[os.write(key.fd, pending) :]
    except BrokenPipeError:
        pending = pending[:0]
    if not pending:
        selector.unregister(key.fileobj)
        key.fileobj.close()  # type: ignore[union-attr]  # we registered a file object
    return pending


def _opened(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "every stream of this child is a pipe"
    return stream
