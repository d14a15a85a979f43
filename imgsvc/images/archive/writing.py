"""Images → one tar stream that is an OCI image layout and a Docker archive at once. Blocking, a chunk at a time."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from imgsvc.base.oci import MIB, OCI_INDEX, Digest
from imgsvc.base.reference import Reference
from imgsvc.content.interfaces import Provider
from imgsvc.images.archive.reading import IMAGE_NAME, REF_NAME
from imgsvc.images.records import Image

CHUNK: Final = MIB  # [bytes] per read and per message


@dataclass(frozen=True, slots=True)
class Exported:
    """One image of an export. names: the tags it is to have where it is loaded; may be empty."""

    image: Image
    names: tuple[str, ...]


def blobs_of(image: Image) -> list[Digest]:
    """What the export of an image contains: manifest, config, layers."""
    return [image.manifest.digest, image.image_id, *(layer.descriptor.digest for layer in image.layers)]


def write_archive(images: Sequence[Exported], content: Provider) -> Iterator[bytes]:
    """The archive in chunks, none of them empty. The same images give the same bytes.

    Raises: NotFound, DataLoss: a blob is not there or not whole.
    """
    blobs = list(dict.fromkeys(digest for exported in images for digest in blobs_of(exported.image)))
    yield _member("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
    yield _member("index.json", _json(_index(images)))
    yield _member("manifest.json", _json([_docker_entry(exported) for exported in images if not exported.image.artifact]))
    yield _directory("blobs")
    for algorithm in sorted({digest.algorithm for digest in blobs}):
        yield _directory(f"blobs/{algorithm}")
    for digest in blobs:
        yield from _blob(digest, content)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _blob(digest: Digest, content: Provider) -> Iterator[bytes]:
    with content.reader(digest) as reader:
        yield _header(_path(digest), reader.size)
        offset = 0
        while data := reader.read_at(offset, CHUNK):
            yield data
            offset += len(data)
        if padding := -reader.size % tarfile.BLOCKSIZE:
            yield bytes(padding)


def _index(images: Sequence[Exported]) -> dict[str, Any]:
    entries = []
    for exported in images:
        image = exported.image
        target = replace(image.manifest, platform=None if image.artifact else image.config.platform, annotations={})
        for name in exported.names or ("",):
            annotations = {IMAGE_NAME: name, REF_NAME: Reference.parse(name).tag} if name else {}
            entries.append(replace(target, annotations=annotations).to_json())
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}


def _docker_entry(exported: Exported) -> dict[str, Any]:
    """Source: Docker image-spec v1.2; paths are those of the layout, as Docker itself writes them since version 25."""
    return {
        "Config": _path(exported.image.image_id),
        "RepoTags": list(exported.names) or None,
        "Layers": [_path(layer.descriptor.digest) for layer in exported.image.layers],
    }


def _path(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _directory(name: str) -> bytes:
    info = tarfile.TarInfo(name + "/")
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info.tobuf(tarfile.GNU_FORMAT)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size  # GNU's format holds more than 8 GiB
    return info.tobuf(tarfile.GNU_FORMAT)
