"""A stream of tar bytes as a sequence of entries with their data. Knows PAX, GNU long names and the four sparse formats.

TarStream pulls chunks from a callable, so that the same code reads a layer as it downloads, a file, or a fuzzer's bytes.
Memory is bounded by one chunk plus MAX_PAX, whatever the headers claim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from imgsvc.base.errors import DataLoss, ResourceExhausted
from imgsvc.snapshot.unpack import tarheader as tar
from imgsvc.snapshot.unpack.tarheader import BLOCK, BadLayer, Header

_XATTR: Final = b"SCHILY.xattr."
_SPARSE: Final = b"GNU.sparse."
MAX_META: Final = 64  # headers about one entry (PAX, long name, long link) before the entry itself; writers use up to 3


class Truncated(DataLoss):
    """The stream ended inside an entry."""

    def __init__(self) -> None:
        super().__init__("the layer's tar stream ends in the middle of an entry")


class TarStream:
    """Entries in order. Use: `while (entry := stream.next_entry()) is not None:`, then read its data or leave it."""

    def __init__(self, next_chunk: Callable[[], bytes]) -> None:
        """next_chunk: the next bytes of the stream, b"" at its end; at least BLOCK bytes at a time for good speed."""
        self._next_chunk = next_chunk
        self._chunk = b""
        self._view = memoryview(b"")  # of _chunk
        self._at = 0  # of the next unread byte in _chunk
        self._before = 0  # bytes of the stream in front of _chunk
        self._data_left = 0  # unread bytes of the current entry's data
        self._padding = 0

    def next_entry(self) -> Header | None:
        """The next entry, None at the end of the archive. Raises: BadLayer, Truncated, ResourceExhausted."""
        block = self._next_header()
        if not block:
            return None
        header = tar.parse_header(block)
        self._data_left, self._padding = header.size, -header.size % BLOCK
        if header.kind not in tar.PLAIN:
            described = self._described(header, block)
            if described is None:
                return None
            header = described
        if header.kind == tar.REGULAR_OLD:
            header.kind = tar.DIRECTORY if header.name.endswith(b"/") else tar.REGULAR_ONE
        return header

    def _described(self, header: Header, block: bytes) -> Header | None:
        """The entry that a header about it, and maybe more of them, stand in front of.

        None at the end of the archive: headers about nothing change nothing, and Go's reader takes them.
        """
        pax: dict[bytes, bytes] = {}
        sparse_pairs: list[tuple[bytes, bytes]] = []
        long_name = long_link = b""
        for _ in range(MAX_META):
            kind = header.kind
            if kind in (tar.PAX, tar.PAX_SUN):
                for key, value in tar.parse_pax(self._small(tar.MAX_PAX, "PAX header")):
                    if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                        sparse_pairs.append((key, value))
                    else:
                        pax[key] = value
            elif kind == tar.GNU_LONG_NAME:
                long_name = self._small(tar.MAX_PATH + BLOCK, "long name").partition(b"\0")[0]
            elif kind == tar.GNU_LONG_LINK:
                long_link = self._small(tar.MAX_PATH + BLOCK, "long link target").partition(b"\0")[0]
            elif kind in (tar.PAX_GLOBAL, tar.GNU_VOLUME):
                self.skip_data()  # global records are comments in practice; Docker and containerd ignore them too
            else:
                header.name = long_name or header.name
                header.link = long_link or header.link
                if pax:
                    self._apply_pax(header, pax)
                if kind == tar.GNU_SPARSE:
                    self._read_old_sparse(header, block)
                elif b"GNU.sparse.major" in pax or b"GNU.sparse.map" in pax or sparse_pairs:
                    self._read_pax_sparse(header, pax, sparse_pairs)
                return header
            block = self._next_header()
            if not block:
                return None
            header = tar.parse_header(block)
            self._data_left, self._padding = header.size, -header.size % BLOCK
        raise BadLayer(f"more than {MAX_META} headers in front of one entry")

    def read_data(self) -> bytes | memoryview:
        """Some bytes of the current entry's data, b"" at their end. Raises: Truncated."""
        left = self._data_left
        if not left:
            return b""
        if self._at == len(self._chunk) and not self._refill():
            raise Truncated
        start = self._at
        end = start + left
        if end > len(self._chunk):
            end = len(self._chunk)
        self._at = end
        self._data_left = left - (end - start)
        return self._view[start:end]

    def skip_data(self) -> None:
        """Leave the rest of the current entry's data."""
        while self._data_left:
            self.read_data()

    def drain(self) -> None:
        """Read on to the end of the stream, so that its hash covers every byte."""
        self._chunk = b""
        self._view = memoryview(b"")
        self._at = 0
        while self._next_chunk():
            pass

    @property
    def position(self) -> int:
        """How much of the stream has been taken [bytes]: after next_entry, where the entry's data begins."""
        return self._before + self._at

    def _refill(self) -> bool:
        self._before += len(self._chunk)
        self._chunk = self._next_chunk()
        self._view = memoryview(self._chunk)
        self._at = 0
        return bool(self._chunk)

    def _next_header(self) -> bytes:
        """The next header block; b"" at the end of the archive: a zero block, or (valid too) the end of the stream."""
        if self._data_left:
            self.skip_data()
        if self._padding:
            at = self._at + self._padding
            if at <= len(self._chunk):
                self._at = at
                self._padding = 0
            elif not self._skip_padding():
                return b""
        at = self._at
        block = self._chunk[at : at + BLOCK]
        if len(block) == BLOCK:
            self._at = at + BLOCK
        else:
            if self._at == len(self._chunk) and not self._refill():
                return b""
            block = self._take(BLOCK)
        if block == tar.ZERO_BLOCK:
            self._check_end()
            return b""
        return block

    def _check_end(self) -> None:
        """An archive ends with two zero blocks, or with the stream. What follows a single one is refused, as by Go's reader, and not left out."""
        try:
            following = self._take(BLOCK)
        except Truncated:
            return
        if following != tar.ZERO_BLOCK:
            raise BadLayer("more of the archive follows a lone zero block")

    def _skip_padding(self) -> bool:
        """False at the end of the stream: the last file's padding may be missing (`umoci insert` leaves it out)."""
        left, self._padding = self._padding, 0
        while left > (there := len(self._chunk) - self._at):
            left -= there
            if not self._refill():
                return False
        self._at += left
        return True

    def _take(self, size: int) -> bytes:
        """Exactly `size` bytes (small), across chunks."""
        out = self._chunk[self._at : self._at + size]
        self._at += len(out)
        while len(out) < size:
            if not self._refill():
                raise Truncated
            more = self._chunk[: size - len(out)]
            self._at = len(more)
            out += more
        return out

    def _small(self, limit: int, what: str) -> bytes:
        """All data of a header about the next entry."""
        if self._data_left > limit:
            raise ResourceExhausted(f"bad layer: a {what} of {self._data_left} bytes; the limit is {limit}")
        size, self._data_left = self._data_left, 0
        return self._take(size)

    def _apply_pax(self, header: Header, pax: dict[bytes, bytes]) -> None:
        for key, value in pax.items():
            if key.startswith(_XATTR):
                if header.xattrs is None:
                    header.xattrs = {}
                header.xattrs[key[len(_XATTR) :]] = value
            elif not value:
                continue  # an empty value takes the keyword's effect away
            elif key == b"path":
                header.name = value
            elif key == b"linkpath":
                header.link = value
            elif key == b"size":
                if tar.has_data(header.kind):
                    header.size = header.real_size = tar.pax_integer(value, "size")
                    self._data_left, self._padding = header.size, -header.size % BLOCK
            elif key == b"uid":
                header.uid = tar.pax_integer(value, "uid")
            elif key == b"gid":
                header.gid = tar.pax_integer(value, "gid")
            elif key == b"mtime":
                header.mtime = tar.pax_time(value, "mtime")
            elif key == b"atime":
                header.atime = tar.pax_time(value, "atime")
        tar.check_ids(header.uid, header.gid)

    def _read_old_sparse(self, header: Header, block: bytes) -> None:
        parts, more = tar.old_sparse(block, first=True)
        header.real_size = tar.old_sparse_size(block)
        while more:
            added, more = tar.old_sparse(self._take(BLOCK), first=False)
            parts += added
            if len(parts) > tar.MAX_SPARSE_PARTS:
                raise ResourceExhausted(f"bad layer: a sparse file of more than {tar.MAX_SPARSE_PARTS} parts")
        header.sparse = tar.check_sparse(parts, header.size, header.real_size, header.name)

    def _read_pax_sparse(self, header: Header, pax: dict[bytes, bytes], pairs: list[tuple[bytes, bytes]]) -> None:
        header.name = pax.get(_SPARSE + b"name") or header.name
        real = pax.get(_SPARSE + b"realsize") or pax.get(_SPARSE + b"size")
        if real is None:
            raise BadLayer("a sparse file without its real size", header.name)
        header.real_size = tar.pax_integer(real, "GNU.sparse size")
        if (pax.get(_SPARSE + b"major"), pax.get(_SPARSE + b"minor")) == (b"1", b"0"):
            numbers = self._sparse_numbers(header)
        elif (flat := pax.get(_SPARSE + b"map")) is not None:  # format 0.1
            numbers = [tar.pax_integer(n, "GNU.sparse.map") for n in flat.split(b",")] if flat else []
        else:  # format 0.0
            numbers = [tar.pax_integer(value, "GNU.sparse pair") for _, value in pairs]
        if len(numbers) % 2:
            raise BadLayer("the sparse map has an odd number of members", header.name)
        parts = list(zip(numbers[::2], numbers[1::2], strict=True))
        header.sparse = tar.check_sparse(parts, self._data_left, header.real_size, header.name)

    def _sparse_numbers(self, header: Header) -> list[int]:
        """The map of format 1.0, in front of the data: a count and its numbers, one per line, padded to whole blocks."""
        text = b""
        numbers: list[int] = []
        wanted = 1
        while len(numbers) < wanted:
            if self._data_left < BLOCK:
                raise BadLayer("the sparse map is longer than the entry", header.name)
            text += self._take(BLOCK)
            self._data_left -= BLOCK
            *lines, text = text.split(b"\n")
            numbers += [tar.pax_integer(line, "sparse map") for line in lines]
            if wanted == 1 and numbers:
                if numbers[0] > tar.MAX_SPARSE_PARTS:
                    raise ResourceExhausted(f"bad layer: a sparse file of more than {tar.MAX_SPARSE_PARTS} parts")
                wanted = 1 + 2 * numbers[0]
            if len(numbers) < wanted and len(text) > 20:
                raise BadLayer("the sparse map is not made of numbers", header.name)
        header.size = self._data_left
        return numbers[1:wanted]
