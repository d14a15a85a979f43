"""Seams between the streaming server and what it streams to. Bytes flow as pulled chunks; nothing here buffers without a bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from imgsvc.base.errors import InvalidArgument

CHUNK: int = 64 * 1024  # [bytes] read at once: a full pipe


class Source(Protocol):
    """A stream of bytes to be read."""

    async def read(self) -> bytes:
        """The next chunk, at most a few CHUNK long; b"" at the end, and again on every further call."""


class Sink(Protocol):
    """A stream of bytes to be written."""

    async def write(self, data: bytes) -> None:
        """Hand a chunk over. Waits while the receiver is slow: that is the back-pressure."""


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """Of a terminal, in characters; 0 to 65535."""

    width: int
    height: int


class Sizes(Protocol):
    """Terminal sizes as the client changes them. Only the newest is kept: older ones have no meaning."""

    async def next(self) -> TerminalSize | None:
        """Wait for a size that was not seen yet; None when there will be no more."""


@dataclass(frozen=True, slots=True)
class StreamWants:
    """Which streams a CRI Exec or Attach asked for."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool

    def check(self) -> None:
        """Raises: InvalidArgument, for what CRI forbids. Source: api.proto, ExecRequest."""
        if self.tty and self.stderr:
            raise InvalidArgument("tty and stderr exclude one another", hint="a terminal has one output, stdout")
        if not (self.stdin or self.stdout or self.stderr):
            raise InvalidArgument("none of stdin, stdout and stderr is asked for")


@dataclass(frozen=True, slots=True)
class Streams:
    """The open streams of one session; None where CRI did not ask for it. sizes is there with a terminal only."""

    stdin: Source | None = None
    stdout: Sink | None = None
    stderr: Sink | None = None
    sizes: Sizes | None = None


class CommandTarget(Protocol):
    """What Exec and Attach stream to."""

    async def run(self, streams: Streams) -> int:
        """Serve one session until it ends by itself. Cancelled when the client leaves; leaves nothing behind in either case.

        Returns: the exit code, 0 to 255 (attach: 0).   Raises: ImgsvcError when the session could not start.
        """


class Connection(Protocol):
    """A connected byte stream with half-close."""

    async def read(self) -> bytes:
        """As Source.read. Raises: OSError."""

    async def write(self, data: bytes) -> None:
        """As Sink.write. Raises: OSError."""

    def write_eof(self) -> None:
        """Tell the other side that nothing more follows. Idempotent, never fails."""

    def close(self) -> None:
        """Free it. Idempotent."""


class PortTarget(Protocol):
    """What PortForward streams to."""

    async def connect(self, port: int) -> Connection:
        """Connect to a port of the sandbox. Raises: ImgsvcError when nothing answers."""


class Adopter(Protocol):
    """Waits for processes whose parent is gone: the daemon is their subreaper."""

    def adopt(self, pid: int) -> None:
        """This process is an orphan of ours: reap it when it ends."""

    def exit_code(self, pid: int) -> int | None:
        """How a reaped orphan ended, 128+N for signal N; None when that is not known. To be asked once."""


@dataclass(frozen=True, slots=True)
class ContainerProcess:
    """What exec and attach need to know about a running container of an OCI runtime.

    Attributes:
        container_id: as the runtime knows it.
        runtime: the runtime's command line before the verb, e.g. ("/usr/sbin/runc", "--root", "/run/…").
        process: the `process` object of the container's OCI config.json.
        reaper: adopts what the runtime leaves behind.
        attach_socket: conmon's attach socket (or a path to it of at most 107 characters), ctl_fifo its control FIFO.
    """

    container_id: str
    runtime: tuple[str, ...]
    process: Mapping[str, Any]
    attach_socket: Path
    ctl_fifo: Path
    reaper: Adopter
