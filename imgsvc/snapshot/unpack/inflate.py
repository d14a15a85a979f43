"""From a blob, maybe still growing, to the bytes of its tar stream: read, transform, inflate, hash, count.

The stages are small pull-style objects; memory is bounded by a few chunks whatever the input claims, except that zstd
may use its window (128 MiB at most, 8 MiB usually).

Source: RFC 1952 (members may follow one another), RFC 8878; OCI image-spec layer.md for the media types.
"""

from __future__ import annotations

import hashlib
import os
import queue
import stat
import threading
from collections.abc import Callable
from typing import IO, Final, Protocol, cast

import zstandard
from isal import igzip_lib

from imgsvc.base.errors import DataLoss, InvalidArgument, ResourceExhausted, printable
from imgsvc.base.oci import MIB
from imgsvc.snapshot.unpack.tarheader import BLOCK, ZERO_BLOCK, checksum_fits

READ_SIZE: Final = 256 * 1024  # [bytes] of compressed input per read
CHUNK: Final = MIB  # [bytes] of tar per chunk: a thread that waits for the interpreter's lock at each costs more than a cache it leaves
AHEAD: Final = 3  # chunks inflated before they are needed: enough for a batch of small files
MAX_WINDOW: Final = 128 * MIB  # of zstd; what `zstd --long` accepts by default
RATIO_FREE: Final = 64 * MIB  # a ratio is judged only beyond this much output, small layers may be all zeros
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"  # after a first byte 0x50…0x5f


class Reader(Protocol):
    """A stage that gives bytes."""

    def read(self, size: int) -> bytes:
        """Up to about `size` bytes, b"" at the end. Blocks while the blob is still growing."""


class BlobReader:
    """Reads a blob file behind its writer, or a pipe to its end."""

    def __init__(self, fd: int, size: int, wait_for: Callable[[int], int]) -> None:
        """size: of the blob [bytes], ignored for pipes. wait_for(offset): blocks until more than that many bytes may be read."""
        self._fd = fd
        self._size = size
        self._wait_for = wait_for
        self._available = 0
        self.offset = 0
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)

    def read(self, size: int) -> bytes:
        """Raises: DataLoss when the file is shorter than promised."""
        if not self._is_file:
            data = os.read(self._fd, size)
            self.offset += len(data)
            return data
        if self.offset >= self._size:
            return b""
        if self.offset >= self._available:
            self._available = min(self._wait_for(self.offset), self._size)
        data = os.pread(self._fd, min(size, self._available - self.offset), self.offset)
        if not data:
            raise DataLoss(f"the blob ends after {self.offset} of {self._size} bytes")
        self.offset += len(data)
        return data


class Transform(Protocol):
    """What decrypt.interfaces.StreamTransform promises; repeated because packages do not import one another."""

    def update(self, data: bytes | memoryview) -> bytes:
        """Transform a chunk."""

    def finalize(self) -> bytes:
        """The rest. Raises: DataLoss when the MAC does not match."""


class TransformReader:
    """Runs the bytes through a transform; its verdict comes before the end of the stream is reported."""

    def __init__(self, source: Reader, transform: Transform) -> None:
        self._source = source
        self._transform: Transform | None = transform
        self._lock = threading.Lock()

    def read(self, size: int) -> bytes:
        """Raises: DataLoss from the transform."""
        with self._lock:
            while self._transform is not None:
                data = self._source.read(size)
                if data:
                    out = self._transform.update(data)
                else:
                    out = self._transform.finalize()
                    self._transform = None
                if out:
                    return out
            return b""

    def judge(self) -> None:
        """Read on to the transform's verdict, also while another thread reads. Raises: DataLoss."""
        while self.read(READ_SIZE):
            pass


class GzipReader:
    """All members of a gzip stream, one after the other; zero bytes after the last one are padding."""

    def __init__(self, source: Reader, head: bytes) -> None:
        self._source = source
        self._pending = head  # input for the next member
        self._member: igzip_lib.IgzipDecompressor | None = None
        self._members = 0

    def read(self, size: int) -> bytes:
        """Raises: DataLoss on anything that is not whole gzip members."""
        while True:
            if self._member is None and not self._next_member():
                return b""
            member = self._member
            assert member is not None
            data = b""
            if self._pending or member.needs_input:
                data, self._pending = self._pending or self._source.read(READ_SIZE), b""
                if not data:
                    raise DataLoss("the layer's gzip stream is cut short")
            try:
                out = member.decompress(data, size)
            except (igzip_lib.IsalError, EOFError, ValueError) as error:  # type: ignore[misc]  # the stub says instance, it is a class
                raise DataLoss(f"the layer is not valid gzip: {printable(str(error), 100)}") from error
            if member.eof:
                self._pending = member.unused_data
                self._member = None
            if out:
                return out

    def _next_member(self) -> bool:
        if self._members:
            self._pending = self._pending.lstrip(b"\0")
        while not self._pending:
            data = self._source.read(READ_SIZE)
            if not data:
                if not self._members:
                    raise DataLoss("the layer's gzip stream is cut short")
                return False
            self._pending = data.lstrip(b"\0") if self._members else data
        if self._members and not _GZIP_MAGIC.startswith(self._pending[:2]):
            raise DataLoss("the layer has garbage after its gzip stream")
        self._members += 1
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return True


class _Head:
    """A source whose first bytes were read already."""

    def __init__(self, head: bytes, source: Reader) -> None:
        self._head = head
        self._source = source

    def read(self, size: int) -> bytes:
        head = self._head
        if head:
            self._head = head[size:]
            return head[:size]
        return self._source.read(size)


class ZstdReader:
    """All frames of a zstd stream, skippable ones left out."""

    def __init__(self, source: Reader) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._stream = decompressor.stream_reader(cast("IO[bytes]", source), read_size=READ_SIZE, read_across_frames=True)
        self._buffer = bytearray(CHUNK)

    def read(self, size: int) -> bytes:
        """Raises: DataLoss on broken frames and on windows beyond MAX_WINDOW."""
        view = memoryview(self._buffer)[:size]
        try:
            count = self._stream.readinto1(view)  # what is there now: the blob may still be growing
        except zstandard.ZstdError as error:
            raise DataLoss(f"the layer is not valid zstd: {printable(str(error), 100)}") from error
        return bytes(view[:count])


class TarBytes:
    """The last stage: hashes and counts what the tar parser gets to see, and enforces the limits on it."""

    def __init__(self, source: Reader, raw: BlobReader, *, algorithm: str, max_bytes: int, max_ratio: int) -> None:
        self._source = source
        self._raw = raw
        self._hash = hashlib.new(algorithm)
        self._max_bytes = max_bytes
        self._max_ratio = max_ratio
        self.total = 0

    def next_chunk(self) -> bytes:
        """The next bytes, b"" at the end. Raises: ResourceExhausted naming the limit; whatever the stages raise."""
        data = self._source.read(CHUNK)
        self._hash.update(data)
        self.total += len(data)
        if self._max_bytes and self.total > self._max_bytes:
            raise ResourceExhausted(
                f"the layer unpacks to more than {self._max_bytes} bytes", hint="raise the limit on unpacked bytes if you trust it"
            )
        if self._max_ratio and self.total > RATIO_FREE and self.total > self._raw.offset * self._max_ratio:
            raise ResourceExhausted(
                f"the layer unpacks to more than {self._max_ratio} times its size", hint="raise the limit on the ratio if you trust it"
            )
        return data

    def hexdigest(self) -> str:
        """Of everything so far."""
        return self._hash.hexdigest()


class Ahead:
    """Runs stages a few chunks ahead of their reader, in a thread of their own, as long as a processor is free for it.

    Inflating and hashing release the interpreter's lock, so that one layer keeps two processors busy: `igzip | tar` in a
    process. Where others have layers to unpack for all processors, one thread does the same work without waiting for the lock.
    """

    def __init__(self, next_chunk: Callable[[], bytes], has_room: Callable[[], bool]) -> None:
        """has_room: whether a processor is free now; asked for each chunk."""
        self._produce = next_chunk
        self._has_room = has_room
        self._chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(AHEAD)
        self._has_thread = False

    def next_chunk(self) -> bytes:
        """The next bytes, b"" at the end and from then on. Raises: what the stages raised, in its place in the stream."""
        if not self._has_thread:
            if not self._has_room():
                return self._produce()
            threading.Thread(target=self._run, name="inflate", daemon=True).start()
            self._has_thread = True
        chunk = self._chunks.get()
        if chunk is None:  # the thread has left off here
            self._has_thread = False
            return self.next_chunk()
        if isinstance(chunk, BaseException):
            raise chunk
        if not chunk:
            self._chunks.put(chunk)
        return chunk

    def read(self, _size: int) -> bytes:
        """The same as a Reader, between two stages."""
        return self.next_chunk()

    def _run(self) -> None:
        try:
            while chunk := self._produce():
                self._chunks.put(chunk)
                if not self._has_room():
                    self._chunks.put(None)
                    return
            self._chunks.put(b"")
        except BaseException as error:  # noqa: BLE001  # carried over to the other thread
            self._chunks.put(error)


def open_layer(source: Reader, media_type: str) -> Reader:
    """The right inflater for a layer, by its first bytes: builders label plain tars as compressed, and the other way round.

    Raises: DataLoss (a type says compressed, and the bytes are neither that nor a tar), InvalidArgument (an unknown compression).
    """
    head = _more(source, b"", 4)
    suffix = media_type.replace("+", ".").rpartition(".")[2]
    if suffix not in ("gzip", "zstd", "tar"):
        raise InvalidArgument(f'layers of type "{printable(media_type, 120)}" cannot be unpacked')
    if head.startswith(_GZIP_MAGIC):
        return GzipReader(source, head)
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == _ZSTD_SKIPPABLE and head[0] & 0xF0 == 0x50):
        return ZstdReader(_Head(head, source))
    if suffix != "tar":
        head = _more(source, head, BLOCK)
        if head and not _begins_a_tar(head[:BLOCK]):
            raise DataLoss(f"the layer is said to be {suffix}, but is neither that nor a tar")
    return _Head(head, source)


def _more(source: Reader, head: bytes, wanted: int) -> bytes:
    """`head` and what follows, at least `wanted` bytes if there are so many."""
    while len(head) < wanted and (more := source.read(READ_SIZE)):
        head += more
    return head


def _begins_a_tar(block: bytes) -> bool:
    try:
        return block == ZERO_BLOCK or (len(block) == BLOCK and checksum_fits(block))
    except (InvalidArgument, ValueError):
        return False
