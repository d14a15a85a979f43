"""Hostile and odd archives. Nothing of them ever becomes a path, so the worst they can do is be refused."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from imgsvc.base import oci
from imgsvc.base.errors import DataLoss, ImgsvcError, InvalidArgument, ResourceExhausted
from imgsvc.base.oci import Digest, Manifest, parse_document
from imgsvc.images.archive import reading
from imgsvc.images.archive.reading import ArchiveReader, Named
from imgsvc.snapshot.unpack.tarstream import TarStream
from tests.fakes.store import MemoryStore
from tests.support.images import BuiltDocument, Entry, descriptor, image, layer, tar

APP = image([layer([Entry("a", b"one")])])


def blob(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def layout(document: BuiltDocument = APP, **annotations: str) -> dict[str, bytes]:
    """The files of an OCI layout."""
    entry = {**descriptor(document.media_type, document.data), "annotations": {k.replace("_", "."): v for k, v in annotations.items()}}
    files = {blob(digest): data for digest, data in document.blobs.items()}
    index = {"schemaVersion": 2, "manifests": [entry]}
    return {"oci-layout": b"{}", "index.json": json.dumps(index).encode(), blob(document.digest): document.data, **files}


def docker(**changes: Any) -> dict[str, bytes]:
    """The files of an old Docker archive: layers uncompressed, named by history."""
    plain = tar([Entry("a", b"one")])
    built = image([layer(plain, "plain")], docker=True)
    config = built.blobs[built.config_digest]
    entry = {"Config": "c0ffee.json", "RepoTags": ["docker.io/library/app:1"], "Layers": ["1/layer.tar"], **changes}
    return {
        "1/VERSION": b"1.0",
        "1/json": b"{}",
        "1/layer.tar": plain,
        "c0ffee.json": config,
        "manifest.json": json.dumps([entry]).encode(),
    }


def archive(files: dict[str, bytes]) -> bytes:
    return tar([Entry(name, data) for name, data in files.items()])


def chunks(data: bytes, size: int = 65536) -> Callable[[], bytes]:
    pieces: Iterator[bytes] = iter([data[at : at + size] for at in range(0, len(data), size)])
    return lambda: next(pieces, b"")


def read(data: bytes, store: MemoryStore | None = None) -> list[Named]:
    return ArchiveReader(store or MemoryStore(), TarStream, lambda digest: None).read(chunks(data), "test.tar")


def refused(data: bytes, store: MemoryStore | None = None) -> ImgsvcError:
    with pytest.raises(ImgsvcError) as caught:
        read(data, store)
    return caught.value


def test_a_layout() -> None:
    store = MemoryStore()

    named = read(archive(layout(org_opencontainers_image_ref_name="docker.io/library/app:1")), store)

    assert [(n.target.digest, n.name) for n in named] == [(APP.digest, "docker.io/library/app:1")]
    assert {info.digest for info in store.walk()} == {APP.digest, *APP.blobs}


def test_the_order_of_members_does_not_matter() -> None:
    assert read(archive(dict(reversed(layout().items())))) == read(archive(layout()))


def test_an_old_docker_archive_gets_a_manifest() -> None:
    store = MemoryStore()

    (named,) = read(archive(docker()), store)

    with store.reader(named.target.digest) as reader:
        manifest = parse_document(reader.read_at(0, 10_000), named.target.media_type, "test")
    assert isinstance(manifest, Manifest)
    assert [entry.media_type for entry in manifest.layers] == ["application/vnd.docker.image.rootfs.diff.tar"]
    assert all(store.info(entry.digest) for entry in (manifest.config, *manifest.layers))
    assert named.name == "docker.io/library/app:1"


@pytest.mark.parametrize("compression, ending", [("gzip", ".tar.gzip"), ("zstd", ".tar.zstd"), ("plain", ".tar")])
def test_layers_of_docker_archives_are_known_by_their_first_bytes(compression: Any, ending: str) -> None:
    files = docker()
    files["1/layer.tar"] = layer([Entry("a", b"one")], compression).blob
    store = MemoryStore()

    (named,) = read(archive(files), store)

    with store.reader(named.target.digest) as reader:
        assert json.loads(reader.read_at(0, 10_000))["layers"][0]["mediaType"].endswith(ending)


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_layers_may_be_links_to_others(kind: Any) -> None:
    target = "../1/layer.tar" if kind == "symlink" else "1/layer.tar"
    files = docker(Layers=["1/layer.tar", "2/layer.tar"])
    link = Entry("2/layer.tar", kind=kind, target=target)

    (named,) = read(tar([link, *(Entry(name, data) for name, data in files.items())]))

    assert named.target.size > 0


def test_links_in_a_circle_and_to_elsewhere_are_missing_members() -> None:
    entries = [Entry(name, data) for name, data in docker(Layers=["x"]).items()]
    for links in (
        [Entry("x", kind="symlink", target="y"), Entry("y", kind="symlink", target="x")],
        [Entry("x", kind="symlink", target="/etc/passwd")],
        [Entry("x", kind="symlink", target="../../etc/passwd")],
    ):
        error = refused(tar([*entries, *links]))
        assert isinstance(error, InvalidArgument)
        assert "does not contain" in error.what


def test_a_blob_that_is_not_what_its_name_says_is_refused_and_leaves_nothing() -> None:
    files, store = layout(), MemoryStore()
    victim = next(iter(APP.blobs))
    files[blob(victim)] = b"x" * len(files[blob(victim)])

    assert isinstance(refused(archive(files), store), DataLoss)
    assert store.info(victim) is None
    assert store.list_statuses() == []


def test_an_archive_that_is_cut_short_is_refused_at_every_length() -> None:
    data = archive(layout())
    for length in range(1, len(data.rstrip(b"\0")), 512):
        store = MemoryStore()
        refused(data[:length], store)
        assert store.list_statuses() == []


def test_split_at_every_byte_it_is_the_same_archive() -> None:
    data = archive(layout())
    for size in (1, 3, 511, 513):
        pieces = chunks(data, size)
        assert ArchiveReader(MemoryStore(), TarStream, lambda digest: None).read(pieces, "test.tar") == read(data)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"index.json": b"[]"}, "document"),
        ({"index.json": b'{"schemaVersion":2,"manifests":[]}'}, "lists no images"),
        ({"index.json": b'{"manifests":[],"manifests":[]}'}, "twice"),
        ({"index.json": b"[" * 100_000}, ""),
        ({"blobs/sha256/../../x": b""}, ""),
        ({"blobs/sha256/abc": b""}, "invalid digest"),
        ({"blobs/md5/" + "0" * 32: b""}, "invalid digest"),
    ],
)
def test_malformed_layouts(change: dict[str, bytes], problem: str) -> None:
    files = {**layout(), **change}
    if "../.." in next(iter(change)):
        assert read(archive(files))  # a name that leaves the blobs is just another file, and not a path of ours
        return
    error = refused(archive(files))
    assert isinstance(error, InvalidArgument)
    assert problem in str(error)
    assert error.where


@pytest.mark.parametrize(
    "changes",
    [
        {"Config": None},
        {"Config": 1},
        {"Config": "../c0ffee.json"},
        {"Layers": "x"},
        {"Layers": [1]},
        {"RepoTags": {}},
        {"Layers": ["gone"]},
    ],
)
def test_malformed_docker_archives(changes: dict[str, Any]) -> None:
    assert isinstance(refused(archive(docker(**changes))), InvalidArgument)


def test_ghsa_259w_8hf6_59c2_large_documents_are_refused_unread() -> None:
    class Endless:
        """A reader that claims a large member and counts what is taken of it."""

        def __init__(self) -> None:
            self.taken = 0

        def next_entry(self) -> Any:
            return type("Entry", (), {"name": b"index.json", "kind": ord("0"), "size": 2**40, "link": b"", "sparse": None})()

        def read_data(self) -> bytes:
            self.taken += 1
            return bytes(1024)

    reader = Endless()
    with pytest.raises(ResourceExhausted):
        ArchiveReader(MemoryStore(), lambda chunk: reader, lambda digest: None).read(lambda: b"", "test.tar")
    assert reader.taken == 0


def test_devices_and_members_that_appear_twice_are_refused() -> None:
    assert isinstance(refused(tar([Entry("dev", kind="char", device=(1, 3))])), InvalidArgument)
    entries = [Entry("index.json", b"{}"), Entry("index.json", b"{}")]
    assert "twice" in str(refused(tar(entries)))


def test_too_many_members_are_refused() -> None:
    one = tarfile.TarInfo("x").tobuf()

    error = refused(one * (reading.MAX_ENTRIES + 1))

    assert isinstance(error, ResourceExhausted)


def test_what_is_no_archive_of_images_says_what_would_be() -> None:
    error = refused(tar([Entry("README", b"hello")]))

    assert "index.json" in str(error)
    assert "docker save" in error.hint


def test_a_lease_hears_of_every_blob_before_it_is_stored() -> None:
    store = MemoryStore()
    known: set[Digest] = set()

    def on_blob(digest: Digest) -> None:
        assert store.info(digest) is None
        known.add(digest)

    ArchiveReader(store, TarStream, on_blob).read(chunks(archive(docker())), "test.tar")

    assert known == {info.digest for info in store.walk()}


@pytest.mark.parametrize(
    "name, base, reference",
    [
        ("docker.io/library/app:1", "", "docker.io/library/app:1"),
        ("docker.io/library/app:1", "other.example/x", "docker.io/library/app:1"),
        ("app:1", "", "docker.io/library/app:1"),
        ("v7", "other.example/x", "other.example/x:v7"),
        ("", "other.example/x", "other.example/x:latest"),
        ("", "other.example/x:2", "other.example/x:2"),
    ],
)
def test_names(name: str, base: str, reference: str) -> None:
    target = oci.Descriptor(oci.OCI_MANIFEST, APP.digest, 1)

    assert str(Named(target, name).reference(base)) == reference


def test_without_any_name_one_is_asked_for() -> None:
    with pytest.raises(InvalidArgument, match="does not name the image") as caught:
        Named(oci.Descriptor(oci.OCI_MANIFEST, APP.digest, 1), "v7").reference("")
    assert "--name" in caught.value.hint


def test_a_thousand_small_archives_of_noise_are_refused_in_one_line() -> None:
    source = random.Random(7)
    base = archive(layout())
    for _ in range(1000):
        data = bytearray(base)
        for _ in range(source.randint(1, 8)):
            data[source.randrange(len(data))] = source.randrange(256)
        problem = ""
        try:
            read(bytes(data))
        except ImgsvcError as error:
            problem = str(error)
        assert "\n" not in problem


def test_the_stream_is_read_in_pieces_not_as_a_whole() -> None:
    stream = io.BytesIO(archive(layout()))

    assert ArchiveReader(MemoryStore(), TarStream, lambda digest: None).read(lambda: stream.read(512), "test.tar")
