"""Images like those people pull, made on the spot: from this interpreter's files, shared objects of this system, and noise.

    py     a Python application with its packages and large shared objects: 2 layers
    many   the same files in 21 layers
    node   74 000 small files in deep directories, as npm leaves them: 2 layers
    ml     packages, machine code and weights that do not compress: more than 700 MiB in 3 layers

Layers are compressed as registries have them: gzip, zlib's level 6. File times are whole seconds, as builders write them.
"""

from __future__ import annotations

import io
import itertools
import random
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from imgsvc.base.oci import KIB, MIB, Digest
from tests.support.images import BuiltDocument, Layer, image

_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
_CODE: Final = 8 * MIB  # [bytes] of one made-up shared object
_MTIME: Final = 1_700_000_000

Files = Iterator[tuple[str, bytes]]  # path, contents


def build(name: str) -> tuple[BuiltDocument, int]:
    """The image of that name, and how many entries its layers have."""
    groups = IMAGES[name]()
    with ThreadPoolExecutor() as threads:
        layers = list(threads.map(_packed, groups))
    return image([made for made, _ in layers]), sum(entries for _, entries in layers)


def _packed(files: Files) -> tuple[Layer, int]:
    out = io.BytesIO()
    directories: set[str] = set()
    entries = 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, data in files:
            for parent in [str(above) for above in Path(path).parents][-2::-1]:
                if parent not in directories:
                    directories.add(parent)
                    archive.addfile(_entry(parent, tarfile.DIRTYPE, 0o755))
                    entries += 1
            entry = _entry(path, tarfile.REGTYPE, 0o644)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
            entries += 1
    plain = out.getvalue()
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return Layer(_LAYER, packer.compress(plain) + packer.flush(), Digest.of(plain)), entries


def _entry(path: str, form: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.mtime = form, mode, _MTIME
    return entry


def _packages(copies: int) -> Files:
    """This interpreter's packages, so many times beside each other."""
    root = Path(sysconfig.get_path("purelib"))
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    for number in range(copies):
        for path in found:
            yield f"usr/lib/python{number}/site-packages/{path.relative_to(root)}", path.read_bytes()


def _machine_code(mebibytes: int) -> Files:
    """Shared objects of this system, one after the other, cut into files of a size; repeats are too far apart for gzip to see."""
    objects = (path for root in ("/usr/lib", "/usr/local/lib") for path in sorted(Path(root).rglob("*.so*")))
    large = [path for path in objects if path.is_file() and not path.is_symlink() and path.stat().st_size > MIB]
    pieces = itertools.chain.from_iterable(_cut(path.read_bytes()) for path in itertools.cycle(large))
    rest = b""
    for number in range(mebibytes * MIB // _CODE):
        while len(rest) < _CODE:
            rest += next(pieces)
        yield f"usr/lib/lib{number}.so", rest[:_CODE]
        rest = rest[_CODE:]


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[at : at + MIB] for at in range(0, len(data), MIB))


def _weights(mebibytes: int) -> Files:
    source = random.Random(1)
    for number in range(mebibytes // 50):
        yield f"srv/model/weights-{number}.bin", source.randbytes(50 * MIB)


def _modules(files: int) -> Files:
    """Small files of source text, ten to a directory, each a part of this interpreter's library at a place of its own."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in library)
    source = random.Random(2)
    for number in range(files):
        size = min(int(source.expovariate(1 / (5 * KIB))), 200 * KIB)
        at = source.randrange(len(text) - size)
        package = f"srv/app/node_modules/package-{number // 100}/lib/part-{number // 10 % 10}"
        yield f"{package}/file-{number % 10}.js", text[at : at + size]


def _dealt(files: Files, parts: int) -> list[Files]:
    """The same files as so many groups, in turn."""
    everything = list(files)
    return [iter(everything[first::parts]) for first in range(parts)]


def _py() -> Sequence[Files]:
    return [_packages(3), _machine_code(200)]


def _many() -> Sequence[Files]:
    return _dealt(itertools.chain.from_iterable(_py()), 21)


def _node() -> Sequence[Files]:
    return _dealt(_modules(67_000), 2)


def _ml() -> Sequence[Files]:
    return [_packages(1), _machine_code(700), _weights(450)]


IMAGES: Final[dict[str, Callable[[], Sequence[Files]]]] = {"py": _py, "many": _many, "node": _node, "ml": _ml}
