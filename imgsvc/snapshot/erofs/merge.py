"""The file tree of an image in memory: layers replayed over one another, whiteouts resolved, nothing ever on a disk.

The tree is what a sequential unpack of the layers would leave: an entry replaces what is at its path, later entries of a
layer win, a hard link names the file itself in whatever layer it lies, whiteouts concern lower layers only, wherever they
stand in the layer. Symbolic links on the way to an entry are followed inside the root, as chroot(2) would.

Attributes of files are stored in arrays: 44 bytes for each, beside its name in its directory.

Source: OCI image-spec layer.md.
"""

from __future__ import annotations

import stat
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Final

from imgsvc.snapshot.erofs.index import Record
from imgsvc.snapshot.unpack import tarheader as tar
from imgsvc.snapshot.unpack.tarheader import BadLayer
from imgsvc.snapshot.unpack.tree import AUFS, AUFS_LINKS, MissingDirectory, NoDirectory, normalise
from imgsvc.snapshot.xattrs import may_have, may_stand_on

ROOT: Final = 0
_DIRECTORY: Final = stat.S_IFDIR | 0o755
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_MAX_LINKS: Final = 40  # symbolic links in one look-up, as the kernel has it
_FORMS: Final = {
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHAR: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
    tar.REGULAR_ONE: stat.S_IFREG,
    tar.GNU_SPARSE: stat.S_IFREG,
}


class FileTree:
    """A tree of files, each a number; attributes by number.

    mode: with the type's bits. mtime [s], nanoseconds. size [bytes]; of links: of the target. data: of regular files, where
    the bytes begin in their layer's tar stream; of devices the number. layer: which of the replayed layers has the data.
    children: of directories, name → number. links: targets. xattrs, sparse: as in Record, for those that have any.
    """

    def __init__(self) -> None:
        self.mode = array("H")
        self.uid = array("I")
        self.gid = array("I")
        self.mtime = array("q")
        self.nanoseconds = array("I")
        self.size = array("Q")
        self.data = array("Q")
        self.layer = array("H")
        self.children: dict[int, dict[bytes, int]] = {}
        self.links: dict[int, bytes] = {}
        self.xattrs: dict[int, dict[bytes, bytes]] = {}
        self.sparse: dict[int, list[tuple[int, int]]] = {}
        self.parents = {ROOT: ROOT}  # of directories
        self.warnings: Counter[str] = Counter()
        self._layers = 0
        self._new_directory()
        # Of the layer that is being replayed: names it gave by directory, and directories with such names anywhere below.
        self._made: dict[int, set[bytes]] = {}
        self._above_made: set[int] = set()
        self._known: dict[bytes, int] = {}  # directories by the path they were asked for, until a directory or link goes away

    def apply(self, records: Iterable[Record]) -> None:
        """Replay the next layer. Raises: BadLayer; then the tree is worth nothing."""
        self._made = {}
        self._above_made = set()
        self._known = {}
        for record in records:
            self._replay(record)
        self.children[ROOT].pop(AUFS_LINKS, None)
        self._layers += 1

    def _replay(self, record: Record) -> None:
        name = record.name
        path = name[2:] if name.startswith(b"./") else name
        if path.endswith(b"/"):
            path = path[:-1]
        if not path or b"/." in path or path[0] in b"./" or b"//" in path or b"\0" in path or len(path) > tar.MAX_PATH:
            path = normalise(name)
        if not path:
            if record.kind != tar.DIRECTORY:
                raise BadLayer("the root of a layer can only be a directory", name)
            self._describe(ROOT, record, stat.S_IFDIR)
            self._made.setdefault(ROOT, set()).add(b"")
            return
        parent, _, base = path.rpartition(b"/")
        if len(base) > 255:
            raise BadLayer("a path component beyond 255 bytes", name[:200])
        if path.startswith(AUFS) and path != _OPAQUE:
            self._put_aufs(record, path, base)
            return
        if _WHITEOUT in path and self._marker(path, parent, base):
            return
        directory = self._known.get(parent)
        if directory is None:
            directory = self._known[parent] = self._directory(parent, create=True)
        kind = record.kind
        if kind in (tar.DIRECTORY, tar.GNU_DUMP_DIR):
            self._put_directory(record, directory, base)
        elif kind == tar.LINK:
            self._put_link(record, directory, base)
        elif kind in _FORMS:
            self._put_file(record, directory, base)
        else:
            self.warnings[f"entry of unknown type {chr(kind)!r}"] += 1
            return
        self._note(directory, base)

    def _new(self, mode: int) -> int:
        number = len(self.mode)
        self.mode.append(mode)
        self.uid.append(0)
        self.gid.append(0)
        self.mtime.append(0)
        self.nanoseconds.append(0)
        self.size.append(0)
        self.data.append(0)
        self.layer.append(self._layers)
        return number

    def _new_directory(self) -> int:
        number = self._new(_DIRECTORY)
        self.children[number] = {}
        return number

    def _describe(self, number: int, record: Record, form: int) -> None:
        self.mode[number] = form | record.mode & 0o7777
        self.uid[number] = record.uid
        self.gid[number] = record.gid
        self.mtime[number] = record.mtime
        self.nanoseconds[number] = record.nanoseconds
        xattrs = self._kept(record.xattrs, form) if record.xattrs else None
        if xattrs:
            self.xattrs[number] = xattrs
        else:
            self.xattrs.pop(number, None)

    def _kept(self, xattrs: dict[bytes, bytes], form: int) -> dict[bytes, bytes]:
        """What of a file's xattrs an image may set, and Linux has on a file of this type."""
        kept = {name: value for name, value in xattrs.items() if may_have(name) and may_stand_on(name, form)}
        for name in xattrs.keys() - kept.keys():
            self.warnings[f"xattr {name[:64].decode('utf-8', 'backslashreplace')} (not for images to set there)"] += 1
        return kept

    def _put_directory(self, record: Record, parent: int, base: bytes) -> None:
        number = self.children[parent].get(base)
        if number is None or number not in self.children:
            if number is not None:
                self._clear(parent, base)
            number = self._new_directory()
            self.children[parent][base] = number
            self.parents[number] = parent
        self._describe(number, record, stat.S_IFDIR)

    def _put_file(self, record: Record, parent: int, base: bytes) -> None:
        form = _FORMS[record.kind]
        if form == stat.S_IFCHR and not record.rdev:
            self.warnings["character device 0:0 (overlayfs's own mark)"] += 1
            return
        if form == stat.S_IFLNK and (not record.link or b"\0" in record.link or len(record.link) >= tar.MAX_PATH):
            raise BadLayer("a symbolic link without a proper target", record.name)
        names = self.children[parent]
        if base in names:
            self._clear(parent, base)
        number = self._new(form)
        names[base] = number
        self._describe(number, record, form)
        if form == stat.S_IFREG:
            self.size[number] = record.size
            self.data[number] = record.data
            if record.sparse is not None:
                self.sparse[number] = record.sparse
        elif form == stat.S_IFLNK:
            self.links[number] = record.link
            self.size[number] = len(record.link)
            self.mode[number] = form | 0o777
        else:
            self.data[number] = record.rdev

    def _put_aufs(self, record: Record, path: bytes, base: bytes) -> None:
        """AUFS's book-keeping: only files that hard links lead to are needed, and only until the end of their layer."""
        if path == AUFS_LINKS + b"/" + base and record.kind == tar.REGULAR_ONE:
            names = self.children[ROOT]
            if AUFS_LINKS not in names:
                names[AUFS_LINKS] = self._new_directory()
                self.parents[names[AUFS_LINKS]] = ROOT
                self._known = {}
            self._put_file(record, names[AUFS_LINKS], base)

    def _put_link(self, record: Record, parent: int, base: bytes) -> None:
        target = normalise(record.link)
        if not target:
            raise BadLayer("a hard link to nothing", record.name)
        above, _, name = target.rpartition(b"/")
        place = ROOT
        try:
            place = self._directory(above, create=False)
            number = self.children[place].get(name)
        except MissingDirectory:
            number = None
        if number is None:
            shown = target[:200].decode("utf-8", "backslashreplace")
            raise BadLayer(f'a hard link to "{shown}", which does not exist', record.name)
        if number in self.children:
            raise BadLayer("a hard link to a directory", record.name)
        names = self.children[parent]
        if base in names and names[base] != number:
            if self._is_below(place, names[base]):
                raise BadLayer("a hard link in place of the directory that its target is in", record.name)
            self._clear(parent, base)
        names[base] = number

    def _is_below(self, directory: int, top: int) -> bool:
        """Whether a directory is `top` or lies somewhere below it."""
        while directory not in (ROOT, top):
            directory = self.parents[directory]
        return directory == top

    def _clear(self, parent: int, base: bytes) -> None:
        """Remove what is in an entry's way."""
        number = self.children[parent].pop(base)
        if number in self.children or number in self.links:
            self._known = {}

    def _note(self, directory: int, base: bytes) -> None:
        """This layer has given a name: whiteouts leave it alone from here on."""
        made = self._made.get(directory)
        if made is None:
            made = self._made[directory] = set()
            while directory not in self._above_made:
                self._above_made.add(directory)
                directory = self.parents[directory]
        made.add(base)

    def _is_made(self, directory: int, base: bytes) -> bool:
        return base in self._made.get(directory, ())

    def _directory(self, path: bytes, *, create: bool) -> int:
        """A directory by its path. Raises: NoDirectory, MissingDirectory, BadLayer (too many links)."""
        return self._walk(path, create=create)[0]

    def _walk(self, path: bytes, *, create: bool) -> tuple[int, tuple[int, bytes] | None]:
        """A directory by its path, and the first symbolic link on the way to it as (directory, name)."""
        here = ROOT
        first: tuple[int, bytes] | None = None
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                here = self.parents[here]
                continue
            number = self.children[here].get(part)
            if number is None:
                if not create:
                    raise MissingDirectory(path)
                number = self._new_directory()
                self.children[here][part] = number
                self.parents[number] = here
            elif number in self.links:
                first = first or (here, part)
                links += 1
                if links > _MAX_LINKS:
                    raise BadLayer("too many symbolic links on the way", path)
                target = self.links[number]
                if target.startswith(b"/"):
                    here = ROOT
                todo += target.split(b"/")[::-1]
                continue
            elif number not in self.children:
                raise NoDirectory(path)
            here = number
        return here, first

    def _marker(self, path: bytes, parent: bytes, base: bytes) -> bool:
        """Handle whiteouts; False when the name only looks like one somewhere inside a component."""
        if any(part.startswith(_WHITEOUT) for part in parent.split(b"/")):
            raise BadLayer('a directory name that starts with ".wh."', path)
        if not base.startswith(_WHITEOUT):
            return False
        try:
            directory, link = self._walk(parent, create=False)
        except (MissingDirectory, NoDirectory):
            return True  # there is nothing to hide
        if link is not None and self._is_made(*link):
            return True  # a link of this layer is where lower layers had a directory: it does not lead to what is hidden
        if base == _OPAQUE:
            self._clear_lower(directory)
        elif not base.startswith(_WHITEOUT + _WHITEOUT):  # other .wh..wh. names are AUFS's own book-keeping
            name = base[len(_WHITEOUT) :]
            if name in (b"", b".", b".."):
                raise BadLayer("a whiteout of nothing", path)
            self._hide(directory, name)
        else:
            return True
        self._known = {}
        return True

    def _hide(self, directory: int, name: bytes) -> None:
        number = self.children[directory].get(name)
        if number is None:
            return
        if number in self.children:
            if self._is_made(directory, name) or number in self._above_made:
                self._clear_lower(number)
                self._disown(directory, name, number)
                return
        elif self._is_made(directory, name):
            return
        del self.children[directory][name]

    def _clear_lower(self, top: int) -> None:
        """Remove everything below that this layer did not make itself."""
        todo = [top]
        while todo:
            directory = todo.pop()
            names = self.children[directory]
            for name, number in list(names.items()):
                if number in self.children:
                    if self._is_made(directory, name) or number in self._above_made:
                        todo.append(number)
                        self._disown(directory, name, number)
                        continue
                elif self._is_made(directory, name):
                    continue
                del names[name]

    def _disown(self, parent: int, name: bytes, number: int) -> None:
        """A directory that the layer only implies is no longer the one that lower layers had."""
        if not self._is_made(parent, name):
            self.mode[number] = _DIRECTORY
            self.uid[number] = self.gid[number] = 0
            self.mtime[number] = self.nanoseconds[number] = 0
            self.xattrs.pop(number, None)
