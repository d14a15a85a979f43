"""Who gets what from the mirror endpoint, and in which form."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import InvalidArgument, PermissionDenied
from imgsvc.base.http1 import FileBody, Request, Response
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import OCI_CONFIG, OCI_INDEX, Descriptor, Digest, Manifest, parse_config, parse_document
from imgsvc.images.mirror.server import Mirror, repository
from imgsvc.images.provenance import Provenance, parts
from imgsvc.images.records import Image, ImageStore, build_image
from tests.fakes.store import MemoryStore
from tests.images.verification.signing import Signer
from tests.support.images import BuiltDocument, Entry, image, index, layer

APP = image([layer([Entry("a", b"one")])])
NAME = "docker.io/library/app"


class Node:
    """A store with images, and a mirror over it."""

    def __init__(self, directory: Path, *, private: bool = False) -> None:
        self.db = MetaDB(directory / "db", sync=False)
        self.images, self.content, self.threads = ImageStore(self.db), MemoryStore(), Threads(2, "test")
        self.provenance = Provenance(self.db)
        self.refused: set[Digest] = set()
        self.mirror = Mirror(self.images, self.content, self.threads, provenance=self.provenance, check=self.check, private=private)

    async def check(self, image: Image) -> None:
        if image.image_id in self.refused:
            raise PermissionDenied("not signed")

    def put(
        self, document: BuiltDocument, *, credentials: tuple[str, ...] = (), name: str = NAME, top: BuiltDocument | None = None
    ) -> None:
        """An image as a pull leaves it; top: the index it was chosen from."""
        documents = [d for d in (top, document) if d is not None]
        blobs = {d.digest: d.data for d in documents} | dict(document.blobs)
        for digest, data in blobs.items():
            writer = self.content.writer(digest, total=len(data), expected=digest)
            writer.write(data)
            writer.commit(len(data), digest)
        manifest = parse_document(document.data, document.media_type, "test")
        assert isinstance(manifest, Manifest)
        raw = document.blobs[manifest.config.digest]
        config = parse_config(raw if manifest.config.media_type == OCI_CONFIG else b"{}", "test")
        descriptors = [Descriptor(d.media_type, d.digest, len(d.data)) for d in documents]
        record = build_image(
            descriptors[-1],
            manifest,
            config,
            [""] * len(manifest.layers),
            [False] * len(manifest.layers),
            [*descriptors, manifest.config],
            {},
            artifact=manifest.config.media_type != OCI_CONFIG,
        )
        asyncio.run(self.provenance.record(name, parts(record), anonymous=not credentials))
        asyncio.run(self.images.add(record, f"{name}:1", f"{name}@{descriptors[0].digest}"))

    def get(self, path: str, *, client: str = "", query: dict[str, str] | None = None, headers: dict[str, str] | None = None) -> Response:
        request = Request("GET", path, {k: [v] for k, v in (query or {}).items()}, headers or {}, client)
        return asyncio.run(self.mirror.handle(request))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def new(**options: Any) -> Node:
        made.append(Node(tmp_path / str(len(made)), **options))
        return made[-1]

    yield new
    for node in made:
        node.db.close()
        node.threads.close()


def content(response: Response) -> bytes:
    if isinstance(response.body, FileBody):
        data = os.pread(response.body.fd, response.body.count, response.body.offset)
        os.close(response.body.fd)
        return data
    assert isinstance(response.body, bytes)
    return response.body


def header(response: Response, name: str) -> str:
    return dict(response.headers)[name]


@pytest.mark.parametrize(
    "path, query",
    [
        ("library/app", {"ns": "docker.io"}),
        ("library/app", {}),
        ("docker.io/library/app", {}),
    ],
)
@pytest.mark.parametrize("target", ["1", APP.digest])
def test_a_manifest_by_tag_and_digest_in_every_way_a_client_may_name_it(
    make: Callable[..., Node], path: str, query: dict[str, str], target: str
) -> None:
    node = make()
    node.put(APP)

    response = node.get(f"/v2/{path}/manifests/{target}", query=query)

    assert response.status == 200
    assert content(response) == APP.data
    assert header(response, "Content-Type") == APP.media_type
    assert header(response, "Docker-Content-Digest") == APP.digest


def test_an_index_is_served_as_it_was_pulled(make: Callable[..., Node]) -> None:
    node, top = make(), index({"linux/amd64": APP})
    node.put(APP, top=top)

    response = node.get("/v2/library/app/manifests/1")

    assert content(response) == top.data
    assert header(response, "Content-Type") == OCI_INDEX
    assert node.get(f"/v2/library/app/manifests/{APP.digest}").status == 200


@pytest.mark.parametrize(
    "wanted, status, part, shown",
    [
        ("", 200, slice(None), ""),
        ("bytes=2-5", 206, slice(2, 6), "bytes 2-5/"),
        ("bytes=-3", 206, slice(-3, None), ""),
        ("bytes=5-2", 200, slice(None), ""),
        ("bytes=99999999-", 416, slice(0, 0), "bytes */"),
    ],
)
def test_blobs_with_ranges(make: Callable[..., Node], wanted: str, status: int, part: slice, shown: str) -> None:
    node = make()
    node.put(APP)
    for digest, data in APP.blobs.items():
        response = node.get(f"/v2/library/app/blobs/{digest}", headers={"range": wanted} if wanted else {})
        assert response.status == status
        assert content(response) == data[part]
        assert dict(response.headers).get("Content-Range", "").startswith(shown)


def test_a_range_of_another_blob_is_answered_whole(make: Callable[..., Node]) -> None:
    node = make()
    node.put(APP)
    digest, data = next(iter(APP.blobs.items()))

    assert content(node.get(f"/v2/library/app/blobs/{digest}", headers={"range": "bytes=1-2", "if-range": '"other"'})) == data


def test_a_private_image_is_not_there_for_others(make: Callable[..., Node]) -> None:
    node = make()
    node.put(APP, credentials=("CRI request",))
    everything = [f"manifests/{t}" for t in ("1", APP.digest)] + [f"blobs/{digest}" for digest in APP.blobs]

    for what in everything:
        assert node.get(f"/v2/library/app/{what}").status == 404
        assert node.get(f"/v2/library/app/{what}", client="peer").status == 404


def test_a_private_image_for_clients_with_a_certificate(make: Callable[..., Node]) -> None:
    node = make(private=True)
    node.put(APP, credentials=("CRI request",))

    assert node.get("/v2/library/app/manifests/1").status == 404
    assert node.get("/v2/library/app/manifests/1", client="peer").status == 200


def test_parts_are_served_only_under_a_name_of_their_image(make: Callable[..., Node]) -> None:
    node = make()
    node.put(APP)

    for digest in (APP.digest, *APP.blobs):
        assert node.get(f"/v2/library/other/blobs/{digest}").status == 404
        assert node.get(f"/v2/library/app/blobs/{digest}", query={"ns": "other.example"}).status == 404


def test_c_e5_what_may_not_be_used_here_is_not_handed_on(make: Callable[..., Node]) -> None:
    node = make()
    node.put(APP)
    node.refused.add(APP.config_digest)

    for what in ("manifests/1", f"manifests/{APP.digest}", *(f"blobs/{digest}" for digest in APP.blobs)):
        assert node.get(f"/v2/library/app/{what}").status == 403


def test_referrers_are_those_that_are_here(make: Callable[..., Node]) -> None:
    node, attached = make(), Signer().bundle(APP)
    node.put(APP)
    assert node.get(f"/v2/library/app/referrers/{APP.digest}").status == 404

    node.put(attached)
    found = json.loads(content(node.get(f"/v2/library/app/referrers/{APP.digest}")))
    assert [entry["digest"] for entry in found["manifests"]] == [attached.digest]
    assert found["manifests"][0]["artifactType"].startswith("application/vnd.dev.sigstore.bundle")
    other = node.get(f"/v2/library/app/referrers/{APP.digest}", query={"artifactType": "other/type"})
    assert other.status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2/_catalog",
        "/v2/library/app/tags/list",
        "/v2/library/app/blobs/uploads/",
        "/v2/library/app/manifests/absent",
        "/v2/library/app/manifests/sha256:" + "0" * 64,
        "/v1/library/app/manifests/1",
    ],
)
def test_everything_else_is_not_there(make: Callable[..., Node], path: str) -> None:
    node = make()
    node.put(APP)

    response = node.get(path)

    assert response.status == 404
    assert json.loads(content(response))["errors"]


@pytest.mark.parametrize(
    "path",
    [
        "/v2/library/app/blobs/sha256:..",
        "/v2/library/app/manifests/a b",
        "/v2/library/../app/manifests/1",
        "/v2/LIBRARY/app/manifests/1",
        "/v2/a:b/c/manifests/1",
        "/v2/a@sha256:0/manifests/1",
        "/v2//manifests/1",
    ],
)
def test_names_that_are_none_are_refused(make: Callable[..., Node], path: str) -> None:
    node = make()
    node.put(APP)

    assert node.get(path).status in (400, 404)


def test_which_registry_is_meant() -> None:
    assert repository("library/app", "docker.io").name == "docker.io/library/app"
    assert repository("app", "").name == "docker.io/library/app"
    assert repository("registry.example/a/b", "").name == "registry.example/a/b"
    assert repository("registry.example_5000/a", "").name == "registry.example:5000/a"
    assert repository("localhost_5000/a", "").name == "localhost:5000/a"
    assert repository("a/b", "registry.example:5000").name == "registry.example:5000/a/b"
    for bad in ("a:1", "a@sha256:" + "0" * 64):
        with pytest.raises(InvalidArgument):
            repository(bad, "docker.io")
