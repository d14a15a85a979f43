"""The process that takes the events of a handler's shims, with or without a daemon: a shim may end when it cannot deliver one.

It is run as a script and imports next to nothing. Of the events only "/tasks/oom" is of use to us: the container's ID becomes the
name of an empty file.

Arguments: the descriptors of a listening Unix socket and of the directory for those files. Every call is answered with success.
It ends some time after its directory was removed.

Source: containerd/ttrpc PROTOCOL.md; api/services/ttrpc/events/v1/events.proto, api/types/event.proto, api/events/task.proto.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys

_HEADER = struct.Struct(">IIBB")  # length, stream, type, flags
_MAX_FRAME = 4 << 20
_REQUEST, _RESPONSE = 1, 2
_LOOK_MS = 15_000  # how often it is seen whether the directory is still there
# Numbers of fields: Request.method and payload, ForwardRequest.envelope, Envelope.topic and event, Any.value, TaskOOM.container_id.
_METHOD, _PAYLOAD, _ENVELOPE, _TOPIC, _EVENT, _VALUE, _ID = 2, 3, 1, 3, 4, 2, 1


def field(message: bytes, number: int) -> bytes:
    """The last field of this number in a protobuf message, where it is of the kind with a length; b"" without. Pure.

    Raises: ValueError when it is no message.
    """
    found, at = b"", 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 2:
            length, at = _varint(message, at)
            if key >> 3 == number:
                found = message[at : at + length]
            at += length
        elif key & 7 == 0:
            _, at = _varint(message, at)
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise ValueError("a group")
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number that is cut off")


def killed_for_memory(request: bytes) -> str:
    """The ID of the container that a Forward call tells was out of memory; "" for every other call. Pure."""
    with contextlib.suppress(ValueError, UnicodeDecodeError):
        envelope = field(field(request, _PAYLOAD), _ENVELOPE)
        if field(request, _METHOD) == b"Forward" and field(envelope, _TOPIC) == b"/tasks/oom":
            name = field(field(field(envelope, _EVENT), _VALUE), _ID).decode()
            return name if name.isalnum() else ""
    return ""


class EventProcess:
    """The loop."""

    def __init__(self, listener: socket.socket, directory: int) -> None:
        self._listener = listener
        self._directory = directory
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        self._poll = select.poll()
        self._poll.register(listener.fileno(), select.POLLIN)

    def run(self) -> None:
        """Until the directory is gone."""
        while os.fstat(self._directory).st_nlink:
            for fd, _ in self._poll.poll(_LOOK_MS):
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._serve(fd)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.setblocking(False)
        _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            client.close()
            return
        self._clients[client.fileno()] = client, bytearray()
        self._poll.register(client.fileno(), select.POLLIN)

    def _serve(self, fd: int) -> None:
        client, kept = self._clients[fd]
        data = b""
        with contextlib.suppress(OSError):
            data = client.recv(65536)
        kept += data
        if not data or not self._answer(client, kept):
            self._poll.unregister(fd)
            del self._clients[fd]
            client.close()

    def _answer(self, client: socket.socket, kept: bytearray) -> bool:
        """Answer the whole frames there are; whether the client is still one."""
        while len(kept) >= _HEADER.size:
            length, stream, kind, _ = _HEADER.unpack_from(kept)
            if length > _MAX_FRAME:
                return False
            end = _HEADER.size + length
            if len(kept) < end:
                return True
            request = bytes(kept[_HEADER.size : end])
            del kept[:end]
            if kind == _REQUEST:
                if name := killed_for_memory(request):
                    with contextlib.suppress(OSError):
                        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=self._directory))
                answer = _HEADER.pack(0, stream, _RESPONSE, 0)
                try:
                    client.sendall(answer)
                except OSError:
                    return False
        return True


if __name__ == "__main__":
    EventProcess(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()
