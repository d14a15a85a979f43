"""Making layers for tests: proper ones with the standard library's writer, improper ones block by block."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MTIME = 1_600_000_000.25


@dataclass
class Entry:
    """One entry as tarfile writes it. kind: one of "file", "dir", "symlink", "link", "char", "block", "fifo"."""

    name: str
    kind: str = "file"
    data: bytes = b""
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = MTIME
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    pax: Mapping[str, str] = field(default_factory=dict)


_TYPES = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "link": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}


def directory(name: str, mode: int = 0o755, **facts: object) -> Entry:
    """A directory entry."""
    return Entry(name, "dir", mode=mode, **facts)  # type: ignore[arg-type]


def symlink(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name, "symlink", link=target, mode=0o777)


def link(name: str, target: str) -> Entry:
    """A hard link."""
    return Entry(name, "link", link=target)


def tar(entries: Iterable[Entry], layout: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar stream of entries in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout, errors="surrogateescape") as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type = _TYPES[entry.kind]
            info.size = len(entry.data)
            info.linkname = entry.link
            info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
            info.mtime = entry.mtime if layout == tarfile.PAX_FORMAT else int(entry.mtime)
            info.devmajor, info.devminor = entry.device
            info.pax_headers = dict(entry.pax)
            for name, value in entry.xattrs.items():
                info.pax_headers[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
            archive.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def raw_header(name: bytes, length: int = 0, kind: bytes = b"0", /, **fields: bytes) -> bytes:
    """One header block with any field replaced by raw bytes (uid, gid, mode, mtime, size, link, magic, prefix, …)."""
    block = bytearray(512)
    places = {"mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12), "link": (157, 100)}
    places |= {"magic": (257, 8), "major": (329, 8), "minor": (337, 8), "prefix": (345, 155), "sparse": (386, 126)}
    values = {"mode": b"0000644\0", "uid": b"0000000\0", "gid": b"0000000\0", "mtime": b"00000000000\0", "magic": b"ustar\x0000"}
    values["size"] = b"%011o\0" % length
    values |= fields
    block[: len(name[:100])] = name[:100]
    block[156:157] = kind
    for field_name, value in values.items():
        at, length = places[field_name]
        block[at : at + length] = value[:length].ljust(length, b"\0")
    return with_checksum(bytes(block))


def with_checksum(block: bytes) -> bytes:
    """The block with its checksum filled in."""
    plain = block[:148] + b" " * 8 + block[156:]
    return plain[:148] + b"%06o\0 " % sum(plain) + plain[156:]


def padded(data: bytes) -> bytes:
    """Data filled up to whole blocks."""
    return data + bytes(-len(data) % 512)


def pax_block(records: bytes) -> bytes:
    """A PAX header with these raw records."""
    return raw_header(b"pax", len(records), b"x") + padded(records)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record with its length in front."""
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


END = bytes(1024)


def gz(data: bytes, level: int = 1) -> bytes:
    """Compressed as layers usually are."""
    return gzip.compress(data, level)
