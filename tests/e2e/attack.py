"""A node under attack: hostile layers go into a registry and come out of it by PullImage, with both snapshotters at once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc

from imgsvc.api import cri_pb2
from imgsvc.base.oci import MIB, Digest
from tests.snapshot.layers import Entry, tar
from tests.support import images
from tests.support.daemon import RPC_TIMEOUT, Daemon
from tests.support.disk import Disk
from tests.support.images import BuiltDocument, Compression, Layer
from tests.support.registries import RealRegistry

ENTRIES: Final = 20_000
UNPACKED: Final = 256 * MIB
RATIO: Final = 200
SETTINGS: Final = f"""enabled = false
[runtime.runtimes.default]
[runtime.runtimes.copied]
snapshotter = "native"
[images.limits]
unpacked_bytes = {UNPACKED}
entries = {ENTRIES}
ratio = {RATIO}
"""
HANDLERS: Final[Mapping[str, str]] = {"overlayfs": "", "native": "copied"}  # way → runtime handler
REFUSALS: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.RESOURCE_EXHAUSTED})

Tree = Mapping[str, os.stat_result]
Layers = Sequence[bytes | Layer | Sequence[Entry]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one pull: the name of an image that is here now, or why it is not. way: snapshotter."""

    way: str
    image: str
    code: grpc.StatusCode
    text: str

    @property
    def refused(self) -> bool:
        """Whether the layer was taken for what it is."""
        return self.code != grpc.StatusCode.OK


class Node:
    """A daemon, the registry behind its mirror, and a directory outside everything that nobody may touch."""

    def __init__(self, daemon: Daemon, registry: RealRegistry, sentinel: Path) -> None:
        self.daemon, self.registry, self.sentinel = daemon, registry, sentinel
        self._numbers = itertools.count()
        self._stub = daemon.images()

    def push(self, *layers: bytes | Layer | Sequence[Entry]) -> str:
        """An image of these layers, in the registry. Returns its name."""
        name = f"attack/image-{next(self._numbers)}"
        self.registry.push(images.image([_layer(one) for one in layers]), name)
        return f"docker.io/{name}:latest"

    def pull_all(self, attacks: Mapping[str, Layers], ways: Sequence[str] = tuple(HANDLERS)) -> dict[tuple[str, str], Outcome]:
        """Push and pull images, all at the same time. Returns (name of the attack, way) → outcome.

        Raises: AssertionError for a refusal that is not one line about the layer, with a code that is not the daemon's fault.
        """
        names = {attack: self.push(*layers) for attack, layers in attacks.items()}
        calls = {(attack, way): self.start(names[attack], way) for attack in attacks for way in ways}
        return {key: self.outcome(call, names[key[0]], key[1]) for key, call in calls.items()}

    def pull(self, *layers: bytes | Layer | Sequence[Entry], way: str = "overlayfs") -> Outcome:
        """Push and pull one image."""
        return self.pull_all({"": layers}, [way])[("", way)]

    def start(self, name: str, way: str = "overlayfs") -> grpc.Future[cri_pb2.PullImageResponse]:
        """Begin a PullImage."""
        spec = cri_pb2.ImageSpec(image=name, runtime_handler=HANDLERS[way])
        return self._stub.PullImage.future(cri_pb2.PullImageRequest(image=spec), timeout=RPC_TIMEOUT)

    def outcome(self, call: grpc.Future[cri_pb2.PullImageResponse], name: str, way: str = "overlayfs") -> Outcome:
        """Wait for one."""
        error = call.exception()
        if error is None:
            return Outcome(way, name, grpc.StatusCode.OK, "")
        assert isinstance(error, grpc.RpcError)
        code, text = error.code(), error.details() or ""
        assert code in REFUSALS, (name, code, text)
        assert "\n" not in text
        assert "sha256:" in text or "/snapshots/" in text, text
        return Outcome(way, name, code, text)

    @contextlib.contextmanager
    def shown(self, outcome: Outcome) -> Iterator[Path]:
        """The root file system of an image."""
        disk = Disk(self.daemon.root)
        image = disk.images()[outcome.image]
        if outcome.way == "overlayfs":
            with disk.mounted(image) as root:
                yield root
        else:
            number = disk.records("snapshots", "native/")[image["layers"][-1]["snapshot"]]["number"]
            yield self.daemon.root / "snapshots" / "native" / str(number) / "fs"

    def tree(self, outcome: Outcome) -> Tree:
        """Path → status of everything in an image."""
        found = {}
        with self.shown(outcome) as root:
            for here, directories, files, fd in os.fwalk(root):
                for each in directories + files:
                    found[os.path.relpath(os.path.join(here, each), root)] = os.lstat(each, dir_fd=fd)
        return found

    def facts(self) -> list[tuple[Any, ...]]:
        """What has to be the same whatever is pulled: the sentinel, and that nothing is where absolute names point."""
        found: list[tuple[Any, ...]] = [(name, os.path.lexists(name)) for name in ("/abs", "/etc/x", "/sentinel")]
        for path in [self.sentinel, *sorted(self.sentinel.rglob("*"))]:
            s = path.lstat()
            xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            content = path.read_bytes() if path.is_file() else b""
            found.append((path.name, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns, s.st_ctime_ns, xattrs, content))
        return found

    def aim(self, layer: Sequence[Entry]) -> list[Entry]:
        """Entries whose links point at "/sentinel", pointed at the real one."""
        return [
            replace(e, link=str(self.sentinel) + e.link.removeprefix("/sentinel")) if e.link.startswith("/sentinel") else e for e in layer
        ]


def make_sentinel(place: Path) -> Path:
    """A directory that nobody may touch."""
    place.mkdir(mode=0o750)
    (place / "f").write_bytes(b"do not touch")
    (place / "f").chmod(0o640)
    os.setxattr(place / "f", "user.kept", b"1")
    return place


def layer(blob: bytes, diff_id: Digest | None = None, compression: Compression = "gzip") -> Layer:
    """A layer of these very bytes. diff_id: what the image says about it; without one, whatever."""
    media_type = images.layer(b"", compression).media_type
    return Layer(media_type, blob, diff_id or Digest.of(blob))


def resized(document: BuiltDocument, delta: int) -> BuiltDocument:
    """The image, with another size in the descriptor of its first layer."""
    manifest = json.loads(document.data)
    manifest["layers"][0]["size"] += delta
    return replace(document, data=json.dumps(manifest).encode())


def _layer(one: bytes | Layer | Sequence[Entry]) -> Layer:
    if isinstance(one, Layer):
        return one
    return images.layer(one if isinstance(one, bytes) else tar(one), "plain")
