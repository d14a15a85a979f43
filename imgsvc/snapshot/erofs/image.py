"""A file tree as an EROFS image: metadata only; the contents of files stay in the layers' tar streams.

Blocks have 512 bytes, as tar has: every file's data is whole blocks of its layer's tar stream, which the image names as
an extra device at an address range of its own. Behind the metadata come sparse files, spelled out but for their holes.

    0     superblock (at 1024), device slots
    …     inodes, with xattrs, short links, the last block of small directories and tables of chunks behind them
    …     blocks of directories, long links, data of sparse files and of what has no whole block at a stream's end

Source: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from imgsvc.base.errors import DataLoss, ResourceExhausted
from imgsvc.base.oci import MIB
from imgsvc.snapshot.erofs.merge import ROOT, FileTree
from imgsvc.snapshot.unpack.tarheader import check_sparse

BLOCK: Final = 512  # [bytes]
MAGIC: Final = 0xE0F5E1E2
SUPERBLOCK_AT: Final = 1024  # [bytes]
_SLOT: Final = 32  # [bytes] in which inodes are counted
_INODE_SIZE: Final = 64
_DEVICE_SLOT: Final = 128
_DEVICES_AT: Final = 1152  # behind the superblock
_SUPERBLOCK: Final = Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_INODE: Final = Struct("<HHHHQIIIIqII16x")
_DIRENT: Final = Struct("<QHBB")
_DEVICE: Final = Struct("<64xII56x")
_XATTR: Final = Struct("<BBH")
_XATTR_HEADER: Final = bytes(12)

_CHECKSUM: Final = 1  # feature_compat
_CHUNKED: Final = 4  # feature_incompat
_DEVICES: Final = 8
_PLAIN, _INLINE, _BY_CHUNK = 0, 2, 4  # layouts
_HOLE: Final = 0xFFFFFFFF
_MAX_XATTRS: Final = 65535 * 4 - 64  # [bytes] of one file
_CHUNK_ENTRY: Final = 4  # [bytes] of the table that a sparse file has
_MIN_CHUNK_BITS, _MAX_CHUNK_BITS = 3, 20  # how much larger than a block a chunk is: 4 KiB to 512 MiB
_MAX_TABLES: Final = 32 * MIB  # of all sparse files of an image together, in memory
_MAX_FILLING: Final = 1024 * MIB  # that chunks of sparse files may take beyond their data
_MAX_WARNINGS: Final = 20  # kinds of them, the most frequent ones: a verdict is one message
_MAX_BLOCKS: Final = _HOLE - 1

_TYPES: Final = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6, stat.S_IFLNK: 7,
}  # fmt: skip
_PREFIXES: Final = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)

Write = Callable[[bytes | bytearray], object]
ReadData = Callable[[int, int, int], bytes]  # (layer, offset, size) of tar streams → that many bytes


@dataclass(frozen=True, slots=True)
class Written:
    """What an image has: inodes [count], of how many bytes. warnings: what was left out of it, by reason [count]."""

    inodes: int
    size: int
    warnings: Mapping[str, int]


def write_image(tree: FileTree, layers: Sequence[int], write: Write, read_data: ReadData) -> Written:
    """Write the image of a tree, in order, from its first byte to its last.

    Args: layers: sizes of the tar streams [bytes], in the order in which the tree got them.
    Raises: ResourceExhausted beyond what 32-bit block numbers reach (2 TiB); what write and read_data raise.
    """
    return _Image(tree, layers).write(write, read_data)


class _Image:
    def __init__(self, tree: FileTree, layers: Sequence[int]) -> None:
        self._tree = tree
        self._layers = layers
        self._order: list[int] = []
        self._count: dict[int, int] = {}  # names of files that have more than one, subdirectories of directories
        self._slots: dict[int, int] = {}  # number → nid
        self._xattrs: dict[int, bytes] = {}
        self._inline: dict[int, bytes] = {}
        self._blocks: dict[int, int] = {}  # number → first block behind the inodes, counted from there
        self._tail = bytearray()  # blocks behind the inodes
        self._sparse: dict[int, _Sparse] = {}

    def write(self, write: Write, read_data: ReadData) -> Written:
        self._walk()
        self._divide()
        start = -(-(_DEVICES_AT + _DEVICE_SLOT * len(self._layers)) // BLOCK)  # of the inodes [blocks]
        size = self._place()
        self._fill_directories()
        first = start + -(-size // BLOCK)  # of the blocks behind the inodes
        at = first + len(self._tail) // BLOCK
        for file in self._sparse.values():
            file.first = at
            at += file.blocks
        total = _block(at)
        total += -total % (4096 // BLOCK)  # whole pages, as loop devices want it
        devices = self._devices(total)
        inodes = self._inodes(size, first, devices)
        head = bytearray(start * BLOCK)
        self._head(head, start, total, devices)
        write(head)
        write(inodes)
        write(self._tail)
        written = (first * BLOCK) + len(self._tail)
        for number, file in self._sparse.items():
            for parts in file.chunks.values():
                for piece in self._chunk_data(number, parts, BLOCK << file.bits, read_data):
                    write(piece)
            written += file.blocks * BLOCK
        write(bytes(total * BLOCK - written))
        return Written(len(self._order), total * BLOCK, dict(self._tree.warnings.most_common(_MAX_WARNINGS)))

    def _walk(self) -> None:
        """Every file that has a name, directories before what is in them, files of a directory together."""
        tree, order, seen = self._tree, self._order, self._count
        todo = [ROOT]
        seen[ROOT] = 0
        while todo:
            directory = todo.pop()
            order.append(directory)
            below = []
            for _, number in sorted(tree.children[directory].items()):
                if number in tree.children:
                    seen[number] = 0
                    seen[directory] += 1
                    below.append(number)
                elif number in seen:
                    seen[number] += 1
                else:
                    seen[number] = 1
                    order.append(number)
            todo += reversed(below)

    def _place(self) -> int:
        """Give every inode its place; returns the size of all together [bytes]."""
        tree = self._tree
        at = 0
        for number in self._order:
            size = _INODE_SIZE
            if number in tree.xattrs:
                packed, left_out = pack_xattrs(tree.xattrs[number])
                for name in left_out:
                    tree.warnings[f"xattr {name[:64].decode('utf-8', 'backslashreplace')} (too large)"] += 1
                self._xattrs[number] = packed
                size += len(packed)
            tail = 0
            if number in tree.links:
                tail = len(tree.links[number])
            elif number in tree.children:
                tail = _directory_tail(tree.children[number])
            if tail and size % BLOCK + tail <= BLOCK:
                if at % BLOCK + size % BLOCK + tail > BLOCK or (at + size) // BLOCK != (at + size + tail - 1) // BLOCK:
                    at += -at % BLOCK
                self._inline[number] = b""
                size += tail
            elif number in self._sparse:
                size += self._sparse[number].table_size
            self._slots[number] = at // _SLOT
            at += size + -size % _SLOT
        return at

    def _fill_directories(self) -> None:
        tree = self._tree
        for number in self._order:
            if number in tree.children:
                blocks = self._dirents(number)
                if number in self._inline:
                    self._inline[number] = blocks.pop()
                self._append(number, b"".join(block.ljust(BLOCK, b"\0") for block in blocks))
                tree.size[number] = len(blocks) * BLOCK + len(self._inline.get(number, b""))
                if number not in self._inline and blocks:
                    tree.size[number] -= BLOCK - len(blocks[-1])
            elif number in tree.links:
                if number in self._inline:
                    self._inline[number] = tree.links[number]
                else:
                    self._append(number, tree.links[number])

    def _append(self, number: int, data: bytes) -> None:
        self._blocks[number] = len(self._tail) // BLOCK
        self._tail += data
        self._tail += bytes(-len(data) % BLOCK)

    def _dirents(self, directory: int) -> list[bytes]:
        """The blocks of a directory: entries sorted by name, across blocks too; the names behind the entries in each."""
        tree, slots, mode = self._tree, self._slots, self._tree.mode
        entries = sorted([(b".", directory), (b"..", tree.parents[directory]), *tree.children[directory].items()])
        blocks = []
        at = 0
        for count in _per_block([name for name, _ in entries]):
            part = entries[at : at + count]
            at += count
            offset = _DIRENT.size * count
            heads, names = [], []
            for name, number in part:
                heads.append(_DIRENT.pack(slots[number], offset, _TYPES[stat.S_IFMT(mode[number])], 0))
                names.append(name)
                offset += len(name)
            blocks.append(b"".join(heads + names))
        return blocks

    def _divide(self) -> None:
        """Which files go by chunks: sparse ones, and what does not end with a whole block of its stream.

        Raises: ResourceExhausted where the data lies scattered over more than an image can say; DataLoss where it cannot be.
        """
        tree = self._tree
        tables = filling = 0
        for number in self._order:
            if stat.S_IFMT(tree.mode[number]) != stat.S_IFREG:
                continue
            size, regions, there = tree.size[number], tree.sparse.get(number), self._layers[tree.layer[number]]
            packed = size if regions is None else sum(length for _, length in regions)
            end = tree.data[number] + packed
            if end > there:
                raise DataLoss("a layer's index names data beyond its tar stream", hint="pull the image again")
            if regions is None and -(-end // BLOCK) * BLOCK > there and size:
                regions = [(0, size)]  # a device has whole blocks only
            if regions is None:
                continue
            check_sparse(regions, packed, size, b"")
            file = _divided(size, regions)
            tables += file.table_size
            filling += file.blocks * BLOCK - packed
            if tables > _MAX_TABLES or filling > _MAX_FILLING:
                raise ResourceExhausted("the image has sparse files that are too large or too scattered", hint='use "overlayfs" for it')
            self._sparse[number] = file

    def _chunk_data(self, number: int, parts: Sequence[tuple[int, int, int]], width: int, read_data: ReadData) -> Iterator[bytes]:
        at = 0
        for start, offset, length in parts:
            yield from _zeros(start - at)
            for done in range(0, length, MIB):
                yield read_data(self._tree.layer[number], self._tree.data[number] + offset + done, min(MIB, length - done))
            at = start + length
        yield from _zeros(width - at)

    def _devices(self, own: int) -> list[tuple[int, int]]:
        """(blocks, first block) of each layer's tar stream, in the address range behind the image's own."""
        devices = []
        at = own
        for size in self._layers:
            blocks = max(1, size // BLOCK)
            devices.append((blocks, _block(at)))
            at += blocks
        _block(at)
        return devices

    def _inodes(self, size: int, first: int, devices: Sequence[tuple[int, int]]) -> bytearray:
        tree, sparse = self._tree, self._sparse
        out = bytearray(size + -size % BLOCK)
        pack = _INODE.pack_into
        mode, sizes = tree.mode, tree.size
        for ino, number in enumerate(self._order, 1):
            at = self._slots[number] * _SLOT
            form = stat.S_IFMT(mode[number])
            layout, address, links = _PLAIN, 0, self._count[number]
            if form == stat.S_IFREG:
                if number in sparse:
                    layout, address = _BY_CHUNK, sparse[number].bits
                elif sizes[number]:
                    address = devices[tree.layer[number]][1] + tree.data[number] // BLOCK
            elif form in (stat.S_IFDIR, stat.S_IFLNK):
                layout = _INLINE if number in self._inline else _PLAIN
                address = first + self._blocks.get(number, 0)
                links += 2 if form == stat.S_IFDIR else 0
            else:
                address = tree.data[number]
            xattrs = self._xattrs.get(number, b"")
            count = (len(xattrs) - len(_XATTR_HEADER)) // 4 + 1 if xattrs else 0
            pack(
                out, at, 1 | layout << 1, count, mode[number], 0, sizes[number], address, ino,
                tree.uid[number], tree.gid[number], tree.mtime[number], tree.nanoseconds[number], links,
            )  # fmt: skip
            at += _INODE_SIZE
            if xattrs:
                out[at : at + len(xattrs)] = xattrs
                at += len(xattrs)
            if inline := self._inline.get(number):
                out[at : at + len(inline)] = inline
            elif number in sparse:
                sparse[number].write_table(out, at)
        return out

    def _head(self, head: bytearray, start: int, total: int, devices: Sequence[tuple[int, int]]) -> None:
        for position, (blocks, address) in enumerate(devices):
            _DEVICE.pack_into(head, _DEVICES_AT + position * _DEVICE_SLOT, blocks, address)
        _SUPERBLOCK.pack_into(
            head, SUPERBLOCK_AT, MAGIC, 0, _CHECKSUM, BLOCK.bit_length() - 1, 0, self._slots[ROOT], len(self._order), 0, 0, total, start,
            0, bytes(16), b"", _CHUNKED | _DEVICES, 0, len(devices), _DEVICES_AT // _DEVICE_SLOT, 0, 0, 0, 0, 0,
        )  # fmt: skip
        checksum = crc32c(bytes(head[SUPERBLOCK_AT : SUPERBLOCK_AT + BLOCK]))
        head[SUPERBLOCK_AT + 4 : SUPERBLOCK_AT + 8] = checksum.to_bytes(4, "little")


@dataclass(slots=True)
class _Sparse:
    """A file by chunks of BLOCK << bits bytes. chunks: those that are not all hole, by number ascending, each with its
    (offset in the chunk, offset in the packed data, length) [bytes]. first: block where they begin in the image.
    """

    size: int
    bits: int
    chunks: dict[int, list[tuple[int, int, int]]]
    first: int = 0

    @property
    def blocks(self) -> int:
        """What its data takes in the image [blocks]."""
        return len(self.chunks) << self.bits

    @property
    def table_size(self) -> int:
        """[bytes], behind the inode."""
        return -(-self.size // (BLOCK << self.bits)) * _CHUNK_ENTRY

    def write_table(self, out: bytearray, at: int) -> None:
        """Where each chunk is."""
        out[at : at + self.table_size] = b"\xff" * self.table_size
        for position, number in enumerate(self.chunks):
            entry = at + number * _CHUNK_ENTRY
            out[entry : entry + _CHUNK_ENTRY] = (self.first + (position << self.bits)).to_bytes(_CHUNK_ENTRY, "little")


def _divided(size: int, regions: Sequence[tuple[int, int]]) -> _Sparse:
    """A sparse file by chunks of the size that costs least, table and filled chunks together. Raises: ResourceExhausted."""
    costs = []
    for bits in range(_MIN_CHUNK_BITS, _MAX_CHUNK_BITS + 1):
        width = BLOCK << bits
        table = -(-size // width) * _CHUNK_ENTRY
        if table <= _MAX_TABLES:
            costs.append((table + _touched(regions, width) * width, bits))
    if not costs:
        raise ResourceExhausted(f"a sparse file of {size} bytes is too large for an image", hint='use "overlayfs" for it')
    bits = min(costs)[1]
    width = BLOCK << bits
    found: dict[int, list[tuple[int, int, int]]] = {}
    packed = 0
    for offset, length in regions:
        at, end = offset, offset + length
        while at < end:
            number, inside = divmod(at, width)
            count = min(end - at, width - inside)
            found.setdefault(number, []).append((inside, packed, count))
            at, packed = at + count, packed + count
    return _Sparse(size, bits, found)


def _touched(regions: Sequence[tuple[int, int]], width: int) -> int:
    """How many chunks of `width` bytes ascending regions have a part in."""
    count, last = 0, -1
    for offset, length in regions:
        first, end = max(offset // width, last + 1), (offset + length - 1) // width
        count += max(0, end + 1 - first)
        last = max(last, end)
    return count


def _zeros(count: int) -> Iterator[bytes]:
    for done in range(0, count, MIB):
        yield bytes(min(MIB, count - done))


def _per_block(names: Sequence[bytes]) -> list[int]:
    """How many entries of a directory go into each of its blocks."""
    counts: list[int] = []
    used = BLOCK
    for name in names:
        need = _DIRENT.size + len(name)
        if used + need > BLOCK:
            counts.append(0)
            used = 0
        counts[-1] += 1
        used += need
    return counts


def _directory_tail(children: dict[bytes, int]) -> int:
    """Size of a directory's last block, when that is its only one: then it may stand behind the inode; else 0."""
    size = sum(_DIRENT.size + len(name) for name in children) + 2 * _DIRENT.size + 3
    return size if size <= BLOCK else 0


def pack_xattrs(xattrs: dict[bytes, bytes]) -> tuple[bytes, list[bytes]]:
    """Xattrs as they stand behind an inode, and the names of those that EROFS has no room or no number for."""
    out = bytearray(_XATTR_HEADER)
    left_out = []
    for name, value in xattrs.items():
        prefix, index = next(((p, i) for p, i in _PREFIXES if name.startswith(p)), (b"", 0))
        short = name[len(prefix) :]
        if not index or len(short) > 255 or len(value) > 65535 or len(out) + len(short) + len(value) > _MAX_XATTRS:
            left_out.append(name)
            continue
        out += _XATTR.pack(len(short), index, len(value)) + short + value
        out += bytes(-len(out) % 4)
    return bytes(out) if len(out) > len(_XATTR_HEADER) else b"", left_out


def _block(number: int) -> int:
    if number > _MAX_BLOCKS:
        raise ResourceExhausted("the image has more than 2 TiB of data", hint='use "overlayfs" for it')
    return number


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC as EROFS stores it: from all ones, not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc
