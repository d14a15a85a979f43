"""The process that keeps one container's log: from its FIFOs to a file in CRI format, `TIME STREAM P|F TEXT`.

One for each container of a shim. It outlives the daemon, so that a container's output is kept meanwhile, and ends
with the container's output. It is run as a script, and imports next to nothing: there are as many of them as containers.

Arguments: the descriptor of a listening SOCK_SEQPACKET socket, its path, the descriptor of the log (-1 for none), the longest part
of a line [bytes], and for each stream NAME=DESCRIPTOR. Messages to the socket, and answers:

=================== ========================================================================
R, with descriptor  go on in that file; answer R
F                   pass output on from here: answer F, then "o" + data of stdout, "e" + data of stderr
Q                   the container has ended: take what is left, and end
(none)              E to every connected client when the output has ended; no E: the process died
=================== ========================================================================

A line longer than the limit is cut into parts tagged P, the last of which is tagged F.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time

CHUNK = 32768  # [bytes] per read, and so per message
_BEHIND = 4 << 20  # [bytes] an attached client may lag behind; the kernel keeps them
_DRAIN_S = 0.3  # for a container that has ended and whose output has not: another process holds it open


class LineCutter:
    """Cuts a byte stream into CRI log lines. Pure."""

    def __init__(self, stream: bytes, limit: int) -> None:
        """limit: longest part of a line [bytes]."""
        self._stream = stream
        self._limit = limit
        self._rest = b""

    def feed(self, data: bytes, stamp: bytes) -> bytes:
        """Log text for the lines that data completes; stamp: RFC 3339 time."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        out = [self._line(line.removesuffix(b"\r"), stamp, b"F") for line in whole]
        while len(self._rest) >= self._limit:
            out.append(self._line(self._rest[: self._limit], stamp, b"P"))
            self._rest = self._rest[self._limit :]
        return b"".join(out)

    def finish(self, stamp: bytes) -> bytes:
        """Log text for what has no newline at the end."""
        rest, self._rest = self._rest, b""
        return self._line(rest, stamp, b"P") if rest else b""

    def _line(self, text: bytes, stamp: bytes, tag: bytes) -> bytes:
        parts = [text[i : i + self._limit] for i in range(0, len(text), self._limit)] or [b""]
        tags = [b"P"] * (len(parts) - 1) + [tag]
        return b"".join(b"%s %s %s %s\n" % (stamp, self._stream, t, p) for t, p in zip(tags, parts, strict=True))


def timestamp() -> bytes:
    """Now, with nanoseconds, in UTC."""
    now = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)).encode() + b".%09dZ" % (now % 10**9)


class LogProcess:
    """The loop."""

    def __init__(self, listener: socket.socket, log: int, limit: int, streams: dict[str, int]) -> None:
        """log: descriptor, -1 for none; streams: descriptors by name."""
        self._listener = listener
        self._log = log
        self._streams = {fd: (name.encode(), LineCutter(name.encode(), limit)) for name, fd in streams.items()}
        self._clients: dict[int, socket.socket] = {}
        self._followers: set[int] = set()
        self._poll = select.poll()
        for fd in (listener.fileno(), *self._streams):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Until the output has ended, or some time after Q."""
        deadline = 0.0
        while self._streams and not (deadline and time.monotonic() >= deadline):
            wait_ms = int((deadline - time.monotonic()) * 1000) + 1 if deadline else None
            for fd, _ in self._poll.poll(wait_ms):
                if fd in self._streams:
                    self._copy(fd)
                elif fd == self._listener.fileno():
                    self._accept()
                elif fd in self._clients and self._serve(fd) and not deadline:
                    deadline = time.monotonic() + _DRAIN_S
        for _, cutter in self._streams.values():
            self._write(cutter.finish(timestamp()))

    def end(self) -> None:
        """Tell every client that the output has ended."""
        while select.select([self._listener], [], [], 0)[0]:
            self._accept()
        for client in self._clients.values():
            _send(client, b"E")

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.setblocking(False)
        self._clients[client.fileno()] = client
        self._poll.register(client.fileno(), select.POLLIN)

    def _serve(self, fd: int) -> bool:
        """One message of a client; whether it was Q."""
        client = self._clients[fd]
        message = b""
        fds: list[int] = []
        with contextlib.suppress(OSError):
            message, fds, _, _ = socket.recv_fds(client, 16, 1)
        if message == b"R" and fds:
            if self._log >= 0:
                os.close(self._log)
            self._log = fds[0]
            _send(client, b"R")
        elif message == b"F":
            client.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BEHIND)
            self._followers.add(fd)
            _send(client, b"F")
        elif not message:
            self._drop(fd)
        return message == b"Q"

    def _drop(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._followers.discard(fd)
        self._clients.pop(fd).close()

    def _copy(self, fd: int) -> None:
        name, cutter = self._streams[fd]
        data = os.read(fd, CHUNK)
        if not data:  # the shim has closed it
            self._write(cutter.finish(timestamp()))
            self._poll.unregister(fd)
            del self._streams[fd]
            return
        self._write(cutter.feed(data, timestamp()))
        for follower in list(self._followers):
            if not _send(self._clients[follower], name[3:4] + data):
                self._drop(follower)  # too slow: the container is not held up for it

    def _write(self, text: bytes) -> None:
        if text and self._log >= 0:
            with contextlib.suppress(OSError):  # a full disk must not stop the container
                os.write(self._log, text)


_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; not in the socket module


def _send(client: socket.socket, message: bytes) -> bool:
    try:
        return client.send(message) == len(message)
    except OSError:
        return False


def main(arguments: list[str]) -> None:
    """See the module's text."""
    listener, path, log, limit, *streams = arguments
    pairs = [stream.split("=") for stream in streams]
    process = LogProcess(socket.socket(fileno=int(listener)), int(log), int(limit), {name: int(fd) for name, fd in pairs})
    process.run()
    with contextlib.suppress(OSError):  # its directory may be gone
        os.unlink(path)  # from here on no client can connect
    process.end()


if __name__ == "__main__":
    main(sys.argv[1:])
