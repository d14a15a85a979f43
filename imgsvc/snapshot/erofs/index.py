"""What a layer's tar stream says, as one compact record per entry: written while the stream goes by, replayed by merge.py.

A record is a fixed part (52 bytes), the entry's name, its link target, and what few entries have: xattrs and a sparse map.
The writer keeps no entry in memory. The reader trusts nothing: records come from untrusted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct, error
from typing import Final

from imgsvc.base.errors import DataLoss
from imgsvc.snapshot.unpack.tarheader import LINK, MAX_PATH, NANO, SYMLINK, BadLayer, Header
from imgsvc.snapshot.unpack.tarstream import TarStream

_FIXED: Final = Struct("<BBHIIqIIQQHHI")
_XATTR: Final = Struct("<HI")
_PART: Final = Struct("<QQ")
_HAS_SPARSE: Final = 1
_WITH_LINK: Final = (LINK, SYMLINK)
_NO_XATTR: Final = 300  # [bytes] no xattr has so long a name
FLUSH: Final = 256 * 1024  # [bytes] after which the writer hands on what it has


@dataclass(slots=True)
class Record:
    """One entry. mtime: seconds and nanoseconds since the epoch. data: where its bytes begin in the tar stream [bytes].

    size: of the file [bytes]. sparse: its data regions as (offset, length), in the order of the data; None where all is data.
    """

    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int
    nanoseconds: int
    rdev: int
    size: int
    data: int
    name: bytes
    link: bytes
    xattrs: dict[bytes, bytes] | None
    sparse: list[tuple[int, int]] | None


def pack(entry: Header, data: int) -> bytes:
    """The record of an entry whose data begins at offset `data` of the tar stream. Raises: BadLayer (names no path can have)."""
    link = entry.link if entry.kind in _WITH_LINK else b""
    if max(len(entry.name), len(link)) > MAX_PATH:
        raise BadLayer("a name or a link's target beyond 4096 bytes", entry.name[:200])
    seconds, nanoseconds = divmod(entry.mtime, NANO)
    extra = b""
    flags = 0
    if entry.xattrs:
        extra = b"".join(_XATTR.pack(len(name), len(value)) + name + value for name, value in _shortened(entry.xattrs))
    if entry.sparse is not None:
        flags = _HAS_SPARSE
        parts = b"".join(_PART.pack(*part) for part in entry.sparse)
        extra = len(parts).to_bytes(4, "little") + parts + extra
    fixed = _FIXED.pack(
        entry.kind, flags, entry.mode, entry.uid, entry.gid, seconds, nanoseconds,
        device_number(entry.major, entry.minor), entry.real_size, data, len(entry.name), len(link), len(extra),
    )  # fmt: skip
    return fixed + entry.name + link + extra


def _shortened(xattrs: dict[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Names beyond what any can have stay too long, and take no room; merging leaves them out and says so."""
    return ((name[:_NO_XATTR], value) for name, value in xattrs.items())


def unpack(data: bytes | memoryview) -> Iterator[Record]:
    """The records of an index, in the order of the entries. Raises: DataLoss when these bytes are no index."""
    at = 0
    view = memoryview(data)
    try:
        while at < len(view):
            kind, flags, mode, uid, gid, mtime, nanoseconds, rdev, size, offset, names, links, extras = _FIXED.unpack_from(view, at)
            at += _FIXED.size
            end = at + names + links + extras
            if end > len(view):
                raise DataLoss("a layer's index is cut short", hint="pull the image again")
            name = bytes(view[at : at + names])
            link = bytes(view[at + names : at + names + links])
            xattrs, sparse = _extra(view[at + names + links : end], flags) if extras else (None, None)
            at = end
            yield Record(kind, mode, uid, gid, mtime, nanoseconds, rdev, size, offset, name, link, xattrs, sparse)
    except error as failed:
        raise DataLoss("a layer's index is cut short", hint="pull the image again") from failed


def _extra(view: memoryview, flags: int) -> tuple[dict[bytes, bytes] | None, list[tuple[int, int]] | None]:
    sparse = None
    if flags & _HAS_SPARSE:
        length = int.from_bytes(view[:4], "little")
        sparse = list(_PART.iter_unpack(view[4 : 4 + length]))
        view = view[4 + length :]
    xattrs: dict[bytes, bytes] = {}
    while view:
        names, values = _XATTR.unpack_from(view)
        name, value = bytes(view[6 : 6 + names]), bytes(view[6 + names : 6 + names + values])
        xattrs[name] = value
        view = view[6 + names + values :]
    return xattrs or None, sparse


def device_number(major: int, minor: int) -> int:
    """A device number as Linux stores it on disk. Source: linux/kdev_t.h, new_encode_dev."""
    return (minor & 0xFF) | ((major & 0xFFF) << 8) | ((minor & ~0xFF) << 12) & 0xFFFFFFFF


def record(stream: TarStream, write: Callable[[bytes], object], check: Callable[[Header, int], None] | None = None) -> int:
    """Write the index of a whole stream; how many entries it has. check: called with each entry and its number, from 1.

    Raises: BadLayer, Truncated, ResourceExhausted, DataLoss; what `check` and `write` raise.
    """
    pending = bytearray()
    count = 0
    while (entry := stream.next_entry()) is not None:
        count += 1
        if check is not None:
            check(entry, count)
        pending += pack(entry, stream.position)
        if len(pending) >= FLUSH:
            write(bytes(pending))
            pending.clear()
    write(bytes(pending))
    return count
