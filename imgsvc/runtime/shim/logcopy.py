"""From a container's FIFOs to a log file in CRI format: `TIME STREAM P|F TEXT`.

A line longer than the limit is cut into parts tagged P, the last of which is tagged F. The FIFO is opened for reading and
writing, so it never reports an end; stop() drains it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imgsvc.errors import FailedPrecondition
from imgsvc.oci import MIB
from imgsvc.runtime.logs import open_log

MAX_LINE: Final = 16384  # [bytes]
_UNLIMITED: Final = 4 * MIB  # what is kept of a line that may be as long as it likes: the daemon's memory is not the container's
_CHUNK: Final = 65536
_MAX_BEHIND: Final = 64  # chunks an attached client may lag behind: at most 4 MiB
_TOO_SLOW: Final = "too slow"


@dataclass(slots=True)
class LineCutter:
    """Cuts a byte stream into CRI log lines. Pure."""

    stream: bytes
    limit: int = MAX_LINE
    _rest: bytes = field(default=b"", init=False)

    def feed(self, data: bytes, stamp: bytes) -> bytes:
        """Log text for the lines that data completes; stamp: RFC 3339 time."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        out = [self._line(line.removesuffix(b"\r"), stamp, b"F") for line in whole]
        while len(self._rest) >= self.limit:
            out.append(self._line(self._rest[: self.limit], stamp, b"P"))
            self._rest = self._rest[self.limit :]
        return b"".join(out)

    def finish(self, stamp: bytes) -> bytes:
        """Log text for what has no newline at the end."""
        rest, self._rest = self._rest, b""
        return self._line(rest, stamp, b"P") if rest else b""

    def _line(self, text: bytes, stamp: bytes, tag: bytes) -> bytes:
        parts = [text[i : i + self.limit] for i in range(0, len(text), self.limit)] or [b""]
        tags = [b"P"] * (len(parts) - 1) + [tag]
        return b"".join(b"%s %s %s %s\n" % (stamp, self.stream, t, p) for t, p in zip(tags, parts, strict=True))


def timestamp() -> bytes:
    """Now, with nanoseconds, in UTC."""
    now = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)).encode() + b".%09dZ" % (now % 10**9)


class LogCopier:
    """Copies the FIFOs of one container into its log. The event loop only shovels: 64 KiB at a time."""

    def __init__(self, directory: str, log_path: str, fifos: dict[str, Path], limit: int) -> None:
        """log_path: below `directory`, "" for no log. limit: longest part of a line [bytes]; 0 and -1: a line is not cut below 4 MiB."""
        self._place = (directory, log_path)
        self._log = open_log(*self._place) if log_path else -1
        self._cutters = {name: LineCutter(name.encode(), limit if limit > 0 else _UNLIMITED) for name in fifos}
        self._followers: set[asyncio.Queue[tuple[str, bytes]]] = set()
        self._fds = {name: os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for name, path in fifos.items()}
        loop = asyncio.get_running_loop()
        for name, fd in self._fds.items():
            loop.add_reader(fd, self._copy, name)

    def _copy(self, name: str) -> bool:
        try:
            data = os.read(self._fds[name], _CHUNK)
        except BlockingIOError:
            return False
        for queue in list(self._followers):
            self._pass_on(queue, name, data)
        text = self._cutters[name].feed(data, timestamp())
        if text and self._log >= 0:
            with contextlib.suppress(OSError):  # a full disk must not stop the container
                os.write(self._log, text)
        return bool(data)

    def _pass_on(self, queue: asyncio.Queue[tuple[str, bytes]], name: str, data: bytes) -> None:
        if queue.qsize() < _MAX_BEHIND:
            queue.put_nowait((name, data))
        else:
            self._followers.discard(queue)
            queue.put_nowait((_TOO_SLOW, b""))

    async def follow(self) -> AsyncIterator[tuple[str, bytes]]:
        """(stream, data) from now on, until the container's output ends.

        Raises: FailedPrecondition when the follower is so slow that the container would have to wait.
        """
        queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._followers.add(queue)
        try:
            while True:
                name, data = await queue.get()
                if name == _TOO_SLOW:
                    raise FailedPrecondition("the attached client reads too slowly; the container is not held up for it")
                if not name:
                    return
                yield name, data
        finally:
            self._followers.discard(queue)

    def reopen(self) -> None:
        """Go on in a new file at the same path. Raises: InvalidArgument; then it goes on in the old one."""
        if self._log >= 0:
            old, self._log = self._log, open_log(*self._place)
            os.close(old)

    def stop(self) -> None:
        """Copy what is left and close everything. Idempotent."""
        for name, fd in self._fds.items():
            asyncio.get_running_loop().remove_reader(fd)
            while self._copy(name):
                pass
            rest = self._cutters[name].finish(timestamp())
            if rest and self._log >= 0:
                os.write(self._log, rest)
            os.close(fd)
        self._fds = {}
        for queue in self._followers:
            queue.put_nowait(("", b""))
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
