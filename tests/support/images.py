"""Images made from scratch: tar entries → layers → config → manifest, as bytes. No network, no tools.

`busybox()` is a runnable image from Debian's busybox-static; everything else is as odd as a test asks for.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import zstandard

from imgsvc.base import oci
from imgsvc.base.oci import Digest

Compression = Literal["plain", "gzip", "zstd"]
Kind = Literal["file", "dir", "symlink", "hardlink", "fifo", "char", "block"]

_OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
_SUFFIX: Final[Mapping[Compression, str]] = {"plain": "", "gzip": "+gzip", "zstd": "+zstd"}
_TYPES: Final[Mapping[Kind, bytes]] = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tar member. target: of a symlink or hard link. device: (major, minor). pax: extra PAX records, e.g. xattrs."""

    path: str
    data: bytes = b""
    kind: Kind = "file"
    mode: int = 0o755
    target: str = ""
    uid: int = 0
    gid: int = 0
    mtime: int = 1_600_000_000
    device: tuple[int, int] = (0, 0)
    pax: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layer:
    """A finished layer blob and what its descriptor and the config say about it."""

    media_type: str
    blob: bytes
    diff_id: Digest

    @property
    def digest(self) -> Digest:
        """Of the blob, as stored in a registry."""
        return Digest.of(self.blob)


@dataclass(frozen=True, slots=True)
class BuiltDocument:
    """A manifest or an index with all blobs and documents it refers to."""

    media_type: str
    data: bytes
    blobs: Mapping[Digest, bytes]  # layers and configs
    children: tuple[BuiltDocument, ...] = ()  # of an index

    @property
    def digest(self) -> Digest:
        """Of the document."""
        return Digest.of(self.data)

    @property
    def config_digest(self) -> Digest:
        """The image ID, of a manifest."""
        return Digest(json.loads(self.data)["config"]["digest"])


def tar(entries: Iterable[Entry]) -> bytes:
    """The entries as a PAX tar, in order, duplicates and all."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.path)
            info.type, info.mode, info.uid, info.gid, info.mtime = _TYPES[entry.kind], entry.mode, entry.uid, entry.gid, entry.mtime
            info.linkname, info.size, info.pax_headers = entry.target, len(entry.data), dict(entry.pax)
            info.devmajor, info.devminor = entry.device
            archive.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def layer(contents: bytes | Iterable[Entry], compression: Compression = "gzip", *, docker: bool = False) -> Layer:
    """A layer from a tar or from entries."""
    plain = contents if isinstance(contents, bytes) else tar(contents)
    blob = {"plain": _same, "gzip": _gzip, "zstd": zstandard.ZstdCompressor().compress}[compression](plain)
    media_type = _DOCKER_LAYER + _SUFFIX[compression].replace("+", ".") if docker else _OCI_LAYER + _SUFFIX[compression]
    return Layer(media_type, blob, Digest.of(plain))


def image(layers: Sequence[Layer], *, docker: bool = False, platform: str = "", created: str = "", **config: Any) -> BuiltDocument:
    """A manifest. `config`: members of the image config's "config" object, e.g. Cmd=["sh"], Env=["A=b"], User="nobody"."""
    runs_on = oci.Platform.parse(platform) if platform else oci.Platform.host()
    document: dict[str, Any] = {
        "architecture": runs_on.architecture,
        "os": runs_on.os,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [str(made.diff_id) for made in layers]},
    }
    if runs_on.variant:
        document["variant"] = runs_on.variant
    if created:
        document["created"] = created
    raw = _json(document)
    config_type, manifest_type = (oci.DOCKER_CONFIG, oci.DOCKER_MANIFEST) if docker else (oci.OCI_CONFIG, oci.OCI_MANIFEST)
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": descriptor(config_type, raw),
        "layers": [descriptor(made.media_type, made.blob) for made in layers],
    }
    blobs = {Digest.of(raw): raw} | {made.digest: made.blob for made in layers}
    return BuiltDocument(manifest_type, _json(manifest), blobs)


def index(images: Mapping[str, BuiltDocument], *, docker: bool = False) -> BuiltDocument:
    """An index from platform texts ("linux/arm64") to manifests."""
    media_type = oci.DOCKER_LIST if docker else oci.OCI_INDEX
    entries = []
    for text, child in images.items():
        platform = oci.Platform.parse(text)
        shown = {"os": platform.os, "architecture": platform.architecture}
        if platform.variant:
            shown["variant"] = platform.variant
        entries.append({**descriptor(child.media_type, child.data), "platform": shown})
    data = _json({"schemaVersion": 2, "mediaType": media_type, "manifests": entries})
    return BuiltDocument(media_type, data, {}, tuple(images.values()))


def descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    """The descriptor object of some bytes."""
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def busybox_entries() -> list[Entry]:
    """A root file system with Debian's static busybox and links for all its applets."""
    program = shutil.which("busybox")
    if program is None:
        raise FileNotFoundError("busybox; install the Debian package busybox-static")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True, timeout=10).stdout.split()
    directories = [Entry(name, kind="dir") for name in ("bin", "dev", "etc", "proc", "root", "sys", "var")]
    links = [Entry(f"bin/{name}", kind="symlink", target="busybox", mode=0o777) for name in applets if name != "busybox"]
    return [
        *directories,
        Entry("tmp", kind="dir", mode=0o1777),
        Entry("bin/busybox", Path(program).read_bytes()),
        *links,
        Entry("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", mode=0o644),
        Entry("etc/group", b"root:x:0:\nnogroup:x:65534:\n", mode=0o644),
    ]


def busybox(*extra: Layer, compression: Compression = "gzip", docker: bool = False, **config: Any) -> BuiltDocument:
    """A runnable image: busybox below, `extra` layers on top; Cmd is a shell unless `config` says otherwise."""
    base = layer(busybox_entries(), compression, docker=docker)
    return image([base, *extra], docker=docker, **{"Cmd": ["sh"], "Env": ["PATH=/bin"], **config})


def write_layout(document: BuiltDocument, directory: Path, tag: str = "latest") -> None:
    """An OCI image layout, as skopeo reads it. Source: image-spec image-layout.md."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest, data in _everything(document):
        (blobs / digest.hex).write_bytes(data)
    entry = {**descriptor(document.media_type, document.data), "annotations": {"org.opencontainers.image.ref.name": tag}}
    (directory / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    (directory / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": [entry]}))


def _everything(document: BuiltDocument) -> Iterable[tuple[Digest, bytes]]:
    for child in document.children:
        yield from _everything(child)
    yield from document.blobs.items()
    yield document.digest, document.data


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _same(data: bytes) -> bytes:
    return data


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)
