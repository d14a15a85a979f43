"""One tar header block, PAX records and sparse maps, as bytes in and values out. Pure; hostile input welcome.

Written for layers, not for every tar there is: what a container engine has to understand and no more, every number
checked where it enters. tarstream.py turns a stream of bytes into entries with it.

Source: POSIX.1-2017 pax; GNU tar manual, "Basic Tar Format" and "Storing Sparse Files"; OCI image-spec layer.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final
from zlib import adler32

from imgsvc.base.errors import InvalidArgument, ResourceExhausted, printable

BLOCK: Final = 512  # [bytes]
ZERO_BLOCK: Final = bytes(BLOCK)

REGULAR: Final = frozenset(b"0\x007")
LINK: Final = ord("1")
SYMLINK: Final = ord("2")
CHAR: Final = ord("3")
BLOCK_DEVICE: Final = ord("4")
DIRECTORY: Final = ord("5")
FIFO: Final = ord("6")
PAX: Final = ord("x")
PAX_SUN: Final = ord("X")
PAX_GLOBAL: Final = ord("g")
GNU_LONG_NAME: Final = ord("L")
GNU_LONG_LINK: Final = ord("K")
GNU_SPARSE: Final = ord("S")
GNU_DUMP_DIR: Final = ord("D")
GNU_VOLUME: Final = ord("V")
REGULAR_ONE: Final = ord("0")
REGULAR_OLD: Final = 0  # V7's, which has no type for directories: the whole name tells, and a header's part of it may end anywhere
_WITH_DATA: Final = REGULAR | {GNU_SPARSE, GNU_DUMP_DIR, PAX, PAX_SUN, PAX_GLOBAL, GNU_LONG_NAME, GNU_LONG_LINK}
PLAIN: Final = frozenset(b"\x000123456")  # described by one header block alone, if no other one came before it
_WITHOUT_DATA: Final = frozenset({LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO})

MAX_NUMBER: Final = 2**63 - 1
MAX_ID: Final = 2**32 - 2  # 2^32 - 1 means "no change" to chown(2)
MAX_PATH: Final = 4096  # [bytes] PATH_MAX; no longer name can be created
MAX_PAX: Final = 1024**2  # [bytes] of one PAX header; real ones are below 100 KiB, xattrs included
MAX_PAX_RECORDS: Final = 10_000
_PAX_TEXTS: Final = frozenset({b"path", b"linkpath", b"uname", b"gname"})  # whose values are names
MAX_SPARSE_PARTS: Final = 100_000  # data regions of one file; qemu images have some thousands
NANO: Final = 1_000_000_000

_OLD_SPARSE_AT: Final = 386
_OLD_SPARSE_EXTENDED_AT: Final = 482
_OLD_SPARSE_SIZE_AT: Final = 483
_FIELDS: Final = Struct("100s24s12s12s8sB188xB166x")  # name; mode, uid, gid; size, mtime, checksum, kind; start of the prefix
# Fields that come again and again, taken apart once: parsing is half of what a small file costs in Python.
_owners: dict[bytes, tuple[int, int, int]] = {}
_times: dict[bytes, int] = {}
_sums: dict[bytes, int] = {}  # by checksum field: what the low half of adler32(block, 0) has to be
_MAX_KNOWN: Final = 4096  # entries of each


class BadLayer(InvalidArgument):
    """The layer's tar stream is malformed or asks for something no layer may ask for. entry: its name, if known."""

    def __init__(self, reason: str, entry: bytes = b"") -> None:
        self.entry = entry
        shown = f' (entry "{printable(entry.decode("utf-8", "surrogateescape"), 200)}")' if entry else ""
        super().__init__(f"bad layer: {reason}{shown}")


@dataclass(slots=True)
class Header:
    """One entry. Names are bytes as found; size is what follows in the stream [bytes], real_size what the file has.

    sparse: data regions as (offset, length), or None for an ordinary file. mtime and atime [ns since the epoch].
    """

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    real_size: int
    link: bytes = b""
    major: int = 0
    minor: int = 0
    atime: int | None = None
    xattrs: dict[bytes, bytes] | None = None
    sparse: list[tuple[int, int]] | None = None


def number(field: bytes, what: str) -> int:
    """A numeric field: octal digits with blanks or NULs around them, or base-256. Raises: BadLayer."""
    digits = field[:-1]
    if digits.isdigit() and field[-1] in b"\0 ":  # as nearly all are; int() alone would take signs and underscores
        try:
            return int(digits, 8)
        except ValueError:
            raise BadLayer(f"{what} is not a number: {field!r}") from None
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        if not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise BadLayer(f"{what} is out of range")
        return value
    digits = field.partition(b"\0")[0].strip(b" ") or field.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise BadLayer(f"{what} is not a number: {field!r}")
    return int(digits, 8)


def checksum_fits(block: bytes) -> bool:
    """Whether the block carries its own checksum, summed unsigned or (some old writers) signed. Raises: BadLayer, ValueError."""
    field = block[148:156]
    stored = int(field[:6], 8) if field[:6].isdigit() and field[6:] == b"\0 " else number(field, "checksum")
    # adler32 started at 0 ends with the plain sum of all bytes, mod 65521, in its low half: one call instead of a loop.
    # Sums stay below 2 * 65521.
    total = stored + sum(field) - 8 * 32
    if 0 <= total < 2 * 65521:
        if len(_sums) < _MAX_KNOWN:
            _sums[field] = total % 65521
        if total % 65521 == adler32(block, 0) & 0xFFFF:
            return True
    plain = block[:148] + b" " * 8 + block[156:]
    return stored in (sum(plain), sum(b - 256 if b > 127 else b for b in plain))


def parse_header(block: bytes) -> Header:
    """The entry that a 512-byte block (not all zero) describes by itself. Raises: BadLayer."""
    name, owner, size, time, checksum, kind, prefix = _FIELDS.unpack(block)
    if _sums.get(checksum) != adler32(block, 0) & 0xFFFF:
        try:
            fits = checksum_fits(block)
        except ValueError:
            fits = False
        if not fits:
            raise BadLayer("a header's checksum is wrong")
    name = name.partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    known = _owners.get(owner)
    mode, uid, gid = known if known is not None else _owner(owner)
    length = number(size, "size")
    if length < 0:
        raise BadLayer("negative size", name)
    mtime = _times.get(time)
    if mtime is None:
        mtime = _time(time)
    if kind == REGULAR_ONE or kind in REGULAR:
        return Header(name, kind and REGULAR_ONE, mode, uid, gid, length, mtime, length)
    if kind in _WITHOUT_DATA:
        length = 0  # some writers record the linked file's size; no data follows
    header = Header(name, kind, mode, uid, gid, length, mtime, length, block[157:257].partition(b"\0")[0])
    if kind in (CHAR, BLOCK_DEVICE):
        header.major, header.minor = _device(block[329:337]), _device(block[337:345])
    return header


def _time(field: bytes) -> int:
    value = number(field, "mtime") * NANO
    if len(_times) < _MAX_KNOWN:
        _times[field] = value
    return value


def _owner(field: bytes) -> tuple[int, int, int]:
    mode, uid, gid = number(field[:8], "mode"), number(field[8:16], "uid"), number(field[16:], "gid")
    check_ids(uid, gid)
    if not 0 <= mode < 2**24:  # some writers add the file type's bits
        raise BadLayer(f"mode {mode} is out of range")
    if len(_owners) < _MAX_KNOWN:
        _owners[field] = (mode & 0o7777, uid, gid)
    return mode & 0o7777, uid, gid


def check_ids(uid: int, gid: int) -> None:
    """Raises: BadLayer when a file cannot have these owners."""
    if not (0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID):
        raise BadLayer(f"owner {uid}:{gid} is out of range")


def _device(field: bytes) -> int:
    value = number(field, "device number")
    if not 0 <= value < 2**20:
        raise BadLayer(f"device number {value} is out of range")
    return value


def has_data(kind: int) -> bool:
    """Whether `size` bytes follow an entry of this type that is not known to be without."""
    return kind in _WITH_DATA


def parse_pax(data: bytes) -> list[tuple[bytes, bytes]]:
    """The records of a PAX header in order, as (key, value). Raises: BadLayer, ResourceExhausted (too many)."""
    records: list[tuple[bytes, bytes]] = []
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        digits = data[at:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        end = at + length
        if length < len(digits) + 3 or end > len(data) or data[end - 1] != 10:
            raise BadLayer("a PAX record's length is wrong")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not key or not equals:
            raise BadLayer("a PAX record has no key")
        if b"\0" in (value if key in _PAX_TEXTS else key):
            raise BadLayer("a PAX record with a NUL byte in a name")
        if len(records) == MAX_PAX_RECORDS:
            raise ResourceExhausted(f"bad layer: more than {MAX_PAX_RECORDS} PAX records for one entry")
        records.append((key, value))
        at = end
    return records


def pax_integer(value: bytes, key: str) -> int:
    """A decimal number, not negative; a plus sign or zeros in front are taken, as by Go's reader. Raises: BadLayer."""
    digits = value.removeprefix(b"+")
    shortest = digits.lstrip(b"0") or digits[-1:]
    if not digits.isdigit() or len(shortest) > 19 or int(shortest) > MAX_NUMBER:
        raise BadLayer(f"PAX {key} is not a number in range")
    return int(shortest)


def pax_time(value: bytes, key: str) -> int:
    """Seconds with an optional fraction, as nanoseconds; digits beyond the ninth are cut off. Raises: BadLayer."""
    sign = -1 if value.startswith(b"-") else 1
    whole, _, fraction = value[value[:1] in (b"-", b"+") :].partition(b".")
    if not whole.isdigit() or (fraction and not fraction.isdigit()) or len(whole.lstrip(b"0")) > 11:
        raise BadLayer(f"PAX {key} is not a time in range")
    return sign * (int(whole[-11:]) * NANO + int(fraction[:9].ljust(9, b"0")))


def check_sparse(parts: list[tuple[int, int]], packed: int, real_size: int, name: bytes) -> list[tuple[int, int]]:
    """A sparse map that makes sense: ascending, inside the file, adding up to the data that follows. Raises: BadLayer."""
    at = total = 0
    for offset, length in parts:
        if offset < at or length < 0 or offset + length > real_size:
            raise BadLayer("the sparse map is out of order or beyond the file's end", name)
        at = offset + length
        total += length
    if total != packed or not 0 <= real_size <= MAX_NUMBER:
        raise BadLayer("the sparse map does not add up to the entry's size", name)
    return [part for part in parts if part[1]]


def old_sparse(block: bytes, *, first: bool) -> tuple[list[tuple[int, int]], bool]:
    """The map of an old GNU sparse header (first) or of an extension block: (parts, whether another block follows)."""
    start, count, flag = (_OLD_SPARSE_AT, 4, _OLD_SPARSE_EXTENDED_AT) if first else (0, 21, 504)
    parts = []
    for at in range(start, start + 24 * count, 24):
        if not block[at]:
            break
        parts.append((number(block[at : at + 12], "sparse offset"), number(block[at + 12 : at + 24], "sparse length")))
    return parts, block[flag] != 0


def old_sparse_size(block: bytes) -> int:
    """The real size of the file an old GNU sparse header describes."""
    return number(block[_OLD_SPARSE_SIZE_AT : _OLD_SPARSE_SIZE_AT + 12], "sparse file size")
