"""Made-up and mutated layers as EROFS images on this kernel, against the same layers laid down file by file.

    unshare -m python -m tests.snapshot.fuzz_erofs SECONDS [SEED]

runs for as long as you like (an hour before a release); test_fuzz.py runs a bounded part of it. For each seed: the layers'
indexes, the image, a mount, every name, attribute and byte read and compared with what the extractor that the other drivers
use makes of them. Either both refuse an image, or both show the same; the kernel has nothing to say. An index that was tampered with gives
one of our own errors or an image that the kernel can take or refuse. Anything else ends it with the seed.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imgsvc.base import kernel
from imgsvc.base.errors import ImgsvcError
from imgsvc.base.removal import remove_tree
from imgsvc.snapshot.erofs.build import OpenLayer, build_image
from imgsvc.snapshot.erofs.index import record
from imgsvc.snapshot.erofs.mounting import mount_image
from imgsvc.snapshot.unpack.tarstream import TarStream
from tests.snapshot import fuzz, made_up
from tests.snapshot.layers import Entry, directory, link, symlink, tar
from tests.snapshot.trees import read_tree

EARLIEST, LATEST = -(2**31) * 10**9, 0x37FFFFFFF * 10**9  # [ns since the epoch]


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


class KernelLog:
    """What the kernel complains about."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def complaints(self) -> list[str]:
        """Warnings and worse about EROFS since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while line := os.read(self._fd, 8192).decode("utf-8", "replace"):
                level = int(line.partition(",")[0]) & 7
                if level <= 4 and "erofs" in line:
                    found.append(line.partition(";")[2].partition("\n")[0])
        return found


def large(source: random.Random) -> list[list[Entry]]:
    """Fewer images with what the small ones have not: long names, large directories, large xattrs, links over links, many layers."""
    names = [source.choice(["x", "ü", "\udcff"]) * source.randint(1, 80) + str(n) for n in range(source.randint(1, 150))]
    layers: list[list[Entry]] = []
    files: set[str] = set()
    for _ in range(source.randint(1, 12)):
        layer: list[Entry] = [directory("d", source.choice([0o755, 0o1777]), mtime=source.choice([-(2.0**31), 0.5, 2.0**33]))]
        for name in source.sample(names, source.randint(0, len(names))):
            choice = source.randrange(10)
            files.discard(name)
            if choice < 6:
                xattrs = {f"user.{'n' * source.randint(1, 250)}": bytes(source.randint(0, 3000))} if choice == 5 else {}
                size = source.choice([0, 1, 511, 512, 513, 4096, source.randint(0, 20_000)])
                layer.append(Entry(f"d/{name}", data=source.randbytes(size), uid=source.randrange(2**32 - 1), xattrs=xattrs))
            elif choice == 6:
                layer.append(symlink(f"d/{name}", "t" * source.randint(1, 1000)))
            elif choice == 7 and files:
                layer.append(link(f"d/{name}", f"d/{source.choice(sorted(files))}"))
            elif choice == 8:
                layer.append(Entry(f"d/.wh.{name}"))
            else:
                layer.append(
                    Entry(f"d/sub{source.randrange(9)}/{name}", "char", device=(source.randrange(4096), source.randrange(1, 2**20)))
                )
            if choice < 8:
                files.add(name)
        layers.append(layer)
    return layers


def model(layers: Sequence[bytes], root: Path) -> dict[str, Any] | str:
    """What the other drivers show, or why they refuse a layer."""
    root.mkdir(mode=0o755)
    try:
        for layer in layers:
            fuzz.extract(layer, root, in_place=True, chunk=1 << 20, max_bytes=1 << 40)
    except ImgsvcError as error:
        return str(error)
    return read_tree(root, unowned_times=_Everything())


def write_image(layers: Sequence[bytes], scratch: Path, source: random.Random, *, tamper: bool = False) -> str:
    """Files of an image: layer N's stream as N.tar, and the image. Returns why it is refused, "" when it is not."""
    with contextlib.ExitStack() as stack:
        opened = []
        for number, layer in enumerate(layers):
            stream, index = io.BytesIO(layer), io.BytesIO()
            try:
                record(TarStream(lambda stream=stream: stream.read(source.choice([700, 4096, 1 << 20]))), index.write)  # type: ignore[misc]
            except ImgsvcError as error:
                return str(error)
            found = bytearray(index.getvalue())
            for _ in range(source.randint(1, 4) if tamper and found else 0):
                at = source.randrange(len(found))
                found[at] = source.randrange(256)
            (scratch / f"{number}.tar").write_bytes(layer)
            (scratch / f"{number}.index").write_bytes(found)
            files = [stack.enter_context((scratch / f"{number}.{kind}").open("rb")) for kind in ("tar", "index")]
            opened.append(OpenLayer(files[0].fileno(), files[1].fileno()))
        output = stack.enter_context((scratch / "image").open("w+b"))
        try:
            build_image(opened, output.fileno())
        except ImgsvcError as error:
            return str(error)
    return ""


@contextlib.contextmanager
def mounted(count: int, scratch: Path) -> Iterator[Path]:
    """Where an image of so many layers is mounted, for a `with` block."""
    place = scratch / "mnt"
    place.mkdir()
    mount_image(scratch / "image", [scratch / f"{number}.tar" for number in range(count)], place)
    try:
        yield place
    finally:
        kernel.umount(place)
        place.rmdir()


def read_image(count: int, scratch: Path) -> dict[str, Any]:
    """What the kernel makes of it."""
    with mounted(count, scratch) as place:
        return read_tree(place, unowned_times=_Everything())


def once(seed: int, root: Path, kmsg: KernelLog | None, seeds: Sequence[bytes]) -> str:
    """One image; what became of it. kmsg: None where other work may make the kernel complain. Raises: AssertionError."""
    source = random.Random(seed)
    choice = source.randrange(10)
    if choice < 3:
        layers = [tar(layer) for layer in made_up.image(seed)]
    elif choice < 7:
        layers = [tar(layer) for layer in large(source)]
    else:
        layers = [fuzz.mutate(source.choice(seeds), source) for _ in range(source.randint(1, 3))]
    tamper = choice == 9
    with tempfile.TemporaryDirectory(dir=root) as directory:
        scratch = Path(directory)
        refused = write_image(layers, scratch, source, tamper=tamper)
        if tamper:
            if not refused:
                with contextlib.suppress(OSError):
                    read_image(len(layers), scratch)
            return f"tampered, {'refused' if refused else 'read'}"
        expected = model(layers, scratch / "model")
        remove_tree(scratch / "model")
        assert bool(refused) == isinstance(expected, str), f"image: {refused}, files: {expected if isinstance(expected, str) else 'fine'}"
        if isinstance(expected, str):
            return "refused"
        found, expected = _in_range(read_image(len(layers), scratch)), _in_range(expected)
        assert found == expected, _differences(found, expected)
        assert not (said := kmsg.complaints() if kmsg else []), said
        return "equal"


def _in_range(tree: dict[str, Any]) -> dict[str, Any]:
    """With times that ext4 has, too: EROFS knows any second."""
    return {
        name: (*facts[:3], min(max(facts[3], EARLIEST), LATEST), *facts[4:]) if isinstance(facts, tuple) else facts
        for name, facts in tree.items()
    }


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    both = [(name, found.get(name), expected.get(name)) for name in found.keys() | expected.keys()]
    return "\n".join(f"{name}: image {one!r:.300}, files {other!r:.300}" for name, one, other in both if one != other)


def main() -> int:
    """Run for argv[1] seconds; prints the seed of a failure."""
    until = time.monotonic() + float(sys.argv[1])
    seed = first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 48)
    kmsg, layers, ends = KernelLog(), fuzz.seeds(), dict[str, int]()
    with tempfile.TemporaryDirectory(prefix="imgsvc-fuzz-") as scratch:
        while time.monotonic() < until:
            try:
                end = once(seed, Path(scratch), kmsg, layers)
            except BaseException:
                print(f"failed with seed {seed}", flush=True)
                raise
            ends[end] = ends.get(end, 0) + 1
            seed += 1
    print(f"{seed - first} images from seed {first}: {ends}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
