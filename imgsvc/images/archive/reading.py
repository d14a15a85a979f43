"""A tar stream from anywhere → blobs in the content store, and the images it names. Blocking; runs on a thread.

Nothing of the archive touches a path: names are keys of a dictionary, data goes into the content store by digest.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from imgsvc.base.errors import DataLoss, InvalidArgument, ResourceExhausted, printable
from imgsvc.base.oci import (
    DOCKER_CONFIG,
    DOCKER_MANIFEST,
    MAX_DOCUMENT,
    MIB,
    OCI_INDEX,
    Descriptor,
    Digest,
    Index,
    load_json_object,
    parse_document,
)
from imgsvc.base.reference import Reference
from imgsvc.content.interfaces import Store, Writer
from imgsvc.content.verify import DigestMismatch

MAX_JSON: Final = 20 * MIB  # [bytes] of index.json or manifest.json; as containerd since GHSA-259w-8hf6-59c2
MAX_ENTRIES: Final = 100_000  # members of one archive; thirty images of a hundred layers have some 10 000
MAX_LINKS: Final = 16  # links from one name to the next; `docker save` once wrote one
IMAGE_NAME: Final = "io.containerd.image.name"  # a whole reference
REF_NAME: Final = "org.opencontainers.image.ref.name"  # a tag by the specification, a whole reference by habit
_FILE, _LINK, _SYMLINK, _DIRECTORY = ord("0"), ord("1"), ord("2"), ord("5")
_DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
_HINT: Final = "import OCI layouts or Docker archives, as `imgsvc export`, `docker save` and `skopeo copy` write them"
_MAGIC: Final = ((b"\x1f\x8b", ".gzip"), (b"\x28\xb5\x2f\xfd", ".zstd"))


class Entry(Protocol):
    """A tar member. kind: its type byte; sparse: None for an ordinary file."""

    name: bytes
    kind: int
    size: int
    link: bytes
    sparse: list[tuple[int, int]] | None


class TarReader(Protocol):
    """Members in order; snapshot.tarstream has the one we use, hardened for layers."""

    def next_entry(self) -> Entry | None:
        """The next member, None at the end."""

    def read_data(self) -> bytes | memoryview:
        """Some of the member's data, b"" at its end."""


OpenTar = Callable[[Callable[[], bytes]], TarReader]


@dataclass(frozen=True, slots=True)
class Blob:
    """A member that is in the content store now. head: its first bytes, which tell how a layer is compressed."""

    digest: Digest
    size: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Named:
    """One image of an archive. name: a whole reference, a bare tag, or "" when the archive gives none."""

    target: Descriptor
    name: str

    def reference(self, base: str) -> Reference:
        """Its name; `base` is the repository for those that have none. Raises: InvalidArgument."""
        if "/" in self.name or ":" in self.name:
            return Reference.parse(self.name)
        if not base:
            raise InvalidArgument("the archive does not name the image", hint="give --name REGISTRY/REPOSITORY")
        return Reference.parse(f"{base}:{self.name}" if self.name and Reference.parse(base).name == base else base)


@dataclass(slots=True)
class _Members:
    blobs: dict[str, Blob] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    json: dict[str, bytes] = field(default_factory=dict)

    def find(self, name: str) -> Blob:
        """Follow links to a blob. Raises: InvalidArgument."""
        at = name
        for _ in range(MAX_LINKS):
            if at in self.blobs:
                return self.blobs[at]
            if at not in self.links:
                break
            at = self.links[at]
        raise InvalidArgument(f'the archive does not contain "{printable(name, 160)}"', hint="it is incomplete; write it again")


class ArchiveReader:
    """Reads one archive. `on_blob` is called with every digest before it is stored, so that a lease can name it first."""

    def __init__(self, content: Store, open_tar: OpenTar, on_blob: Callable[[Digest], None]) -> None:
        self._content = content
        self._open_tar = open_tar
        self._on_blob = on_blob
        self._members = _Members()

    def read(self, next_chunk: Callable[[], bytes], name: str) -> list[Named]:
        """Store every blob and say which images there are. name: what the archive is called in errors.

        Args: next_chunk: the next bytes of the stream, b"" at its end.
        Raises: InvalidArgument (not an archive of images, or malformed), DataLoss (cut short, digest mismatch),
        ResourceExhausted (a limit, or the disk).
        """
        try:
            self._walk(self._open_tar(next_chunk))
            return self._images()
        except InvalidArgument as error:
            # The tar reader was written for layers and says so.
            raise InvalidArgument(error.what.removeprefix("bad layer: "), where=error.where or name, hint=error.hint) from error
        except DataLoss as error:
            what = error.what.replace("the layer's tar stream", "the archive")
            raise DataLoss(what, where=error.where or name, hint=error.hint or "it is cut short or damaged; write it again") from error

    def _walk(self, tar: TarReader) -> None:
        count = 0
        while (entry := _next(tar, first=not count)) is not None:
            count += 1
            if count > MAX_ENTRIES:
                raise ResourceExhausted(f"an archive of more than {MAX_ENTRIES} members")
            name = _clean(entry.name)
            if entry.kind == _FILE and entry.sparse is None:
                self._file(name, entry, tar)
            elif entry.kind in (_LINK, _SYMLINK):
                base = posixpath.dirname(name) if entry.kind == _SYMLINK else ""
                self._members.links[name] = posixpath.normpath(posixpath.join(base, _text(entry.link)))
            elif entry.kind != _DIRECTORY:
                raise InvalidArgument(f'"{printable(name, 160)}" is neither a file nor a link')

    def _file(self, name: str, entry: Entry, tar: TarReader) -> None:
        if name in self._members.blobs or name in self._members.json:
            raise InvalidArgument(f'"{printable(name, 160)}" is there twice')
        if name in ("oci-layout", "index.json", "manifest.json"):
            if entry.size > MAX_JSON:
                raise ResourceExhausted(f"{name} has {entry.size} bytes; at most {MAX_JSON} are accepted")
            self._members.json[name] = b"".join(_data(tar))
        elif (digest := _blob_name(name)) is not None:
            self._members.blobs[name] = self._store_known(digest, entry.size, tar)
        elif name.endswith((".json", ".tar")):
            self._members.blobs[name] = self._store_unknown(entry.size, tar)

    def _store_known(self, digest: Digest, size: int, tar: TarReader) -> Blob:
        """A blob whose name says its digest: the content store holds it to that."""
        self._on_blob(digest)
        known = self._content.info(digest)
        if known is not None:
            # The store has it already, but the archive has to have it too: its name alone proves nothing.
            seen = hashlib.new(digest.algorithm)

            head = _head(tar, seen.update)
            if (actual := Digest.from_hash(digest.algorithm, seen.hexdigest())) != digest:
                raise DigestMismatch(digest, actual, "archive")
            return Blob(digest, known.size, head)
        writer = self._content.writer(f"import-{uuid.uuid4().hex}", total=size, expected=digest)
        with self._only_whole(writer):
            head = _head(tar, writer.write)
            writer.commit(size, digest)
        return Blob(digest, size, head)

    def _store_unknown(self, size: int, tar: TarReader) -> Blob:
        """A member of a Docker archive, named by history: its digest is found out on the way."""
        sha256 = hashlib.sha256()
        writer = self._content.writer(f"import-{uuid.uuid4().hex}", total=size)

        def write(data: bytes | memoryview) -> None:
            sha256.update(data)
            writer.write(data)

        with self._only_whole(writer):
            head = _head(tar, write)
            digest = Digest.from_hash("sha256", sha256.hexdigest())
            self._on_blob(digest)
            writer.commit(size, digest)
        return Blob(digest, size, head)

    def _store_document(self, document: dict[str, Any]) -> Descriptor:
        data = json.dumps(document, separators=(",", ":")).encode()
        digest = Digest.of(data)
        self._on_blob(digest)
        if self._content.info(digest) is None:
            writer = self._content.writer(f"import-{uuid.uuid4().hex}", total=len(data), expected=digest)
            with self._only_whole(writer):
                writer.write(data)
                writer.commit(len(data), digest)
        return Descriptor(DOCKER_MANIFEST, digest, len(data))

    @contextmanager
    def _only_whole(self, writer: Writer) -> Iterator[None]:
        """A write that fails leaves nothing: a stream cannot be resumed."""
        try:
            yield
        except BaseException:
            writer.close()
            self._content.abort(writer.ingest_ref)
            raise

    def _images(self) -> list[Named]:
        members = self._members
        if "index.json" in members.json:
            return self._from_layout(members.json["index.json"])
        if "manifest.json" in members.json:
            return self._from_docker(members.json["manifest.json"])
        raise InvalidArgument("neither index.json nor manifest.json is in it", hint=_HINT)

    def _from_layout(self, raw: bytes) -> list[Named]:
        document = parse_document(raw, OCI_INDEX, "index.json")
        if not isinstance(document, Index) or not document.manifests:
            raise InvalidArgument("index.json lists no images")
        for entry in document.manifests:
            self._members.find(f"blobs/{entry.digest.algorithm}/{entry.digest.hex}")
        return [Named(entry, entry.annotations.get(IMAGE_NAME) or entry.annotations.get(REF_NAME, "")) for entry in document.manifests]

    def _from_docker(self, raw: bytes) -> list[Named]:
        named: list[Named] = []
        # The strict parser takes objects only.
        entries = load_json_object(b'{"images":' + raw + b"}", "manifest.json", limit=MAX_JSON)["images"]
        if not isinstance(entries, list) or not entries:
            raise InvalidArgument("manifest.json lists no images", hint=_HINT)
        for entry in entries:
            if not isinstance(entry, dict):
                raise InvalidArgument("an entry of manifest.json is not an object")
            target = self._docker_manifest(entry)
            named += [Named(target, tag) for tag in _strings(entry, "RepoTags") or [""]]
        return named

    def _docker_manifest(self, entry: dict[str, Any]) -> Descriptor:
        """Write the manifest that a Docker archive leaves out."""
        config = entry.get("Config")
        if not isinstance(config, str):
            raise InvalidArgument("an entry of manifest.json has no Config")
        found = self._members.find(config)
        if found.size > MAX_DOCUMENT:
            raise ResourceExhausted(f"the image config has {found.size} bytes; at most {MAX_DOCUMENT} are accepted")
        layers = [self._members.find(name) for name in _strings(entry, "Layers")]
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": Descriptor(DOCKER_CONFIG, found.digest, found.size).to_json(),
            "layers": [Descriptor(_layer_type(layer.head), layer.digest, layer.size).to_json() for layer in layers],
        }
        return self._store_document(document)


def _next(tar: TarReader, *, first: bool) -> Entry | None:
    try:
        return tar.next_entry()
    except (DataLoss, InvalidArgument) as error:
        if not first:
            raise
        raise InvalidArgument("not a tar archive", hint=_HINT) from error


def _data(tar: TarReader) -> Iterator[bytes | memoryview]:
    while data := tar.read_data():
        yield data


def _head(tar: TarReader, write: Callable[[bytes | memoryview], object]) -> bytes:
    """Hand a member's data on; returns its first bytes."""
    head = b""
    for data in _data(tar):
        head += bytes(data[: 4 - len(head)])
        write(data)
    return head


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument("a member's name is not UTF-8") from error


def _clean(raw: bytes) -> str:
    return posixpath.normpath(_text(raw))


def _blob_name(name: str) -> Digest | None:
    """The digest of `blobs/ALGORITHM/HEX`, None for other names. Raises: InvalidArgument for a blob that is misnamed."""
    parts = name.split("/")
    return Digest(f"{parts[1]}:{parts[2]}") if len(parts) == 3 and parts[0] == "blobs" else None


def _layer_type(head: bytes) -> str:
    return _DOCKER_LAYER + next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), "")


def _strings(entry: dict[str, Any], name: str) -> list[str]:
    value = entry.get(name)
    if value is None:  # as Go writes an empty list
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidArgument(f"{name} of an entry of manifest.json is not a list of strings")
    return value
