"""Hostile manifests, indexes and configs through PullImage: one clear refusal each, and the daemon goes on (C-R2, C-R14, C-R15)."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from imgsvc.api import cri_pb2
from imgsvc.base import oci
from imgsvc.base.oci import GIB, MIB, Digest, Platform
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.support import hosts_d
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon
from tests.support.images import BuiltDocument, Entry, descriptor

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNKNOWN,  # with a reason that the kubelet looks for
}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], fake: FakeRegistry) -> Daemon:
    made = make_daemon(settings="enabled = false\n")
    hosts_d(made.directory / "hosts.d", {"docker.io": f'fallback = false\n[host."{fake.url}"]\n'})
    made.start()
    return made


def image_of(text: str = "good") -> BuiltDocument:
    return images.image([images.layer([Entry("text", text.encode())])])


def document(value: object, media_type: str = oci.OCI_MANIFEST, *children: BuiltDocument) -> BuiltDocument:
    return BuiltDocument(media_type, value if isinstance(value, bytes) else json.dumps(value).encode(), {}, children)


def index_of(entries: list[dict[str, Any]], *children: BuiltDocument) -> BuiltDocument:
    return document({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries}, oci.OCI_INDEX, *children)


def entry_of(child: BuiltDocument, platform: str = "") -> dict[str, Any]:
    entry = descriptor(child.media_type, child.data)
    if platform:
        shown = Platform.parse(platform)
        entry["platform"] = {"os": shown.os, "architecture": shown.architecture}
    return entry


def refused(daemon: Daemon, name: str) -> tuple[grpc.StatusCode, str]:
    """The refusal of a pull; nothing of it is visible, and the text is one line for a terminal."""
    code, text = cri.refusal(lambda: cri.pull(daemon.images(), name))
    assert code in REFUSALS, (code, text)
    assert text.isprintable()
    assert len(text) < 4000
    assert cri.image_status(daemon.images(), name) is None
    return code, text


def still_works(daemon: Daemon, fake: FakeRegistry) -> None:
    good = image_of()
    fake.add(good, "library/good")
    assert daemon.process
    assert daemon.process.poll() is None
    assert cri.pull(daemon.images(), "good") == str(good.config_digest)
    assert "Traceback" not in daemon.log


def nested(depth: int) -> BuiltDocument:
    """`depth` indexes around an image; all of them are offered under their digests."""
    made = image_of()
    for _ in range(depth):
        made = index_of([entry_of(made)], made)
    return made


def offer_flat(fake: FakeRegistry, made: BuiltDocument, repository: str) -> None:
    """As fake.add, without recursion: for what is nested deeper than Python's stack."""
    fake.manifests[f"{repository}/latest"] = (made.media_type, made.data)
    while True:
        fake.manifests[f"{repository}/{made.digest}"] = (made.media_type, made.data)
        fake.blobs.update({str(digest): data for digest, data in made.blobs.items()})
        if not made.children:
            return
        (made,) = made.children


def test_c_r14_nested_indexes(daemon: Daemon, fake: FakeRegistry) -> None:
    for depth, is_fine in ((1, True), (oci.MAX_INDEX_DEPTH, True), (oci.MAX_INDEX_DEPTH + 1, False), (10_000, False)):
        name = f"library/nested-{depth}"
        offer_flat(fake, nested(depth), name)
        before = len(fake.requests)
        if is_fine:
            assert cri.pull(daemon.images(), name)
            continue
        code, text = refused(daemon, name)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"deeper than {oci.MAX_INDEX_DEPTH}" in text
        assert len(fake.requests) - before <= oci.MAX_INDEX_DEPTH + 3, "it does not even look further down"
    still_works(daemon, fake)


def test_c_r14_an_index_that_names_itself(daemon: Daemon, fake: FakeRegistry) -> None:
    """A true self reference would be a broken hash; a registry can only pretend, and digests tell."""
    pretended = Digest.of(b"myself")
    entry = {"mediaType": oci.OCI_INDEX, "digest": str(pretended), "size": 1000}
    loop = index_of([entry])
    loop = document(loop.data + b" " * (1000 - len(loop.data)), oci.OCI_INDEX)
    fake.add(loop, "library/loop")
    fake.manifests[f"library/loop/{pretended}"] = (loop.media_type, loop.data)
    code, text = refused(daemon, "loop")
    assert code is grpc.StatusCode.DATA_LOSS
    assert pretended in text
    still_works(daemon, fake)


def test_c_r14_containerd_14000_two_manifests_with_one_config(daemon: Daemon, fake: FakeRegistry) -> None:
    """An index with gzip and zstd variants of one image: what is chosen is there in full, by any name and in any order."""
    plain = images.tar([Entry("text", b"the same in both")])
    variants = [images.image([images.layer(plain, compression)]) for compression in ("gzip", "zstd")]
    assert variants[0].config_digest == variants[1].config_digest
    host = str(Platform.host())
    made = index_of([entry_of(variant, host) for variant in variants], *variants)
    fake.add(made, "library/twice")
    wanted = str(variants[0].config_digest)
    names = ["twice", *(f"twice@{variant.digest}" for variant in variants)]
    for name in [*names, *reversed(names)]:
        assert cri.pull(daemon.images(), name) == wanted
        shown = json.loads(daemon.cli("inspect", name).stdout)
        layers = {layer["digest"] for layer in shown["layers"]}
        assert any(layers <= {str(d) for d in variant.blobs} for variant in variants), "layers of one manifest, not of both"
        assert shown["manifest"]["digest"] in {str(variant.digest) for variant in variants}
    for name in names:
        seen = cri.image_status(daemon.images(), name)
        assert seen
        assert seen.id == wanted
    assert len(list(daemon.root.glob("snapshots/*/*/**/text"))) == 1
    done = daemon.cli("fsck")
    assert done.returncode == 0, done.stdout
    assert daemon.cli("gc").returncode == 0
    assert cri.image_status(daemon.images(), "twice")


def test_c_r14_100000_platforms(daemon: Daemon, fake: FakeRegistry) -> None:
    good = image_of()
    entry = {"mediaType": oci.OCI_MANIFEST, "digest": str(good.digest), "size": 1}
    fake.add(index_of([entry] * 25_000), "library/wide")  # as many as 4 MiB hold
    many = index_of([{**entry, "platform": {"os": "linux", "architecture": f"a{n}"}} for n in range(100_000)])
    assert len(many.data) > oci.MAX_DOCUMENT
    fake.add(many, "library/wider")
    for name in ("wide", "wider"):
        began = time.monotonic()
        code, _ = refused(daemon, name)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert time.monotonic() - began < 10
    most = [{**entry, "platform": {"os": "linux", "architecture": f"a{n}"}} for n in range(oci.MAX_DESCRIPTORS - 1)]
    fake.add(index_of([*most, entry_of(good, str(Platform.host()))], good), "library/allowed")
    assert cri.pull(daemon.images(), "allowed") == str(good.config_digest)
    fake.add(index_of(most), "library/others")
    code, text = refused(daemon, "others")
    assert code is grpc.StatusCode.NOT_FOUND
    assert f"and {len(most) - 32} more" in text


def peak_memory(daemon: Daemon) -> int:
    """[bytes] ever resident."""
    with open(f"/proc/{daemon.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


@pytest.mark.parametrize("what", ["manifest", "blob", "error", "gzip"])
def test_c_r2_documents_without_end(daemon: Daemon, fake: FakeRegistry, what: str) -> None:
    """5 GiB in chunks: cut off at the limit, with a memory of a few MiB."""
    good = image_of(what)
    fake.add(good, f"library/endless-{what}")
    cri.pull(daemon.images(), f"endless-{what}")  # so that everything is loaded before memory is measured
    before = peak_memory(daemon)
    endless = {
        "manifest": Reply(200, {"Content-Type": oci.OCI_MANIFEST}, b" " * MIB, length=-1, repeat=5 * GIB // MIB),
        "blob": Reply(200, {"Content-Type": "application/octet-stream"}, b"x" * MIB, length=-1, repeat=5 * GIB // MIB),
        "error": Reply(500, {"Content-Type": "application/json"}, b"x" * MIB, length=-1, repeat=5 * GIB // MIB),
        "gzip": Reply(200, {"Content-Type": oci.OCI_MANIFEST, "Content-Encoding": "gzip"}, gzip.compress(b" " * 512 * MIB, 9)),
    }[what]
    config = image_of(f"another {what}")
    name = f"library/worse-{what}"
    fake.add(config, name)
    part = f"{name}/blobs/{config.config_digest}" if what == "blob" else f"{name}/manifests/"
    fake.rule(fake.on(part, endless, method="GET" if what in ("blob", "gzip", "manifest") else ""))
    if what in ("manifest", "gzip"):
        fake.rule(fake.on(part, Reply(405), method="HEAD"))
    began, sent = time.monotonic(), fake.sent

    code, text = cri.refusal(lambda: cri.pull(daemon.images(), name))

    assert code in {*REFUSALS, grpc.StatusCode.UNAVAILABLE}, text
    assert time.monotonic() - began < 30
    assert fake.sent - sent < 256 * MIB
    assert peak_memory(daemon) - before < 64 * MIB
    still_works(daemon, fake)


def config_of(value: object) -> BuiltDocument:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    layer = images.layer([Entry("a", b"1")])
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": descriptor(oci.OCI_CONFIG, raw),
        "layers": [descriptor(layer.media_type, layer.blob)],
    }
    return BuiltDocument(oci.OCI_MANIFEST, json.dumps(manifest).encode(), {Digest.of(raw): raw, layer.digest: layer.blob})


def hostile() -> Iterator[tuple[str, BuiltDocument]]:
    """Manifests and configs that no tool writes."""
    good = json.loads(image_of().data)
    layer = good["layers"][0]

    def manifest(**changes: Any) -> BuiltDocument:
        return document({**good, **changes})

    yield "null", document(b"null")
    yield "empty", document(b"")
    yield "list", document([])
    yield "text", document(b'"manifest"')
    yield "not-utf-8", document(b'{"schemaVersion": 2, "a": "\xff"}')
    yield "bom", document(b"\xef\xbb\xbf" + json.dumps(good).encode())
    yield "utf-16", document(json.dumps(good).encode("utf-16"))
    yield "deep", document(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "long-number", document(b'{"schemaVersion": ' + b"9" * 1_000_000 + b"}")
    yield "duplicate-keys", document(json.dumps(good).encode()[:-1] + b', "layers": []}')
    yield "nan", document(b'{"schemaVersion": NaN}')
    yield "no-config", document({k: v for k, v in good.items() if k != "config"})
    yield "config-null", manifest(config=None)
    yield "layers-null-entry", manifest(layers=[None])
    yield "layers-object", manifest(layers={"0": layer})
    yield "size-negative", manifest(layers=[{**layer, "size": -1}])
    yield "size-float", manifest(layers=[{**layer, "size": 1.5}])
    yield "size-bool", manifest(layers=[{**layer, "size": True}])
    yield "size-huge", manifest(layers=[{**layer, "size": 2**63}])
    yield "digest-path", manifest(layers=[{**layer, "digest": "sha256:../../etc/passwd"}])
    yield "digest-short", manifest(layers=[{**layer, "digest": layer["digest"][:-1]}])
    yield "digest-md5", manifest(layers=[{**layer, "digest": "md5:" + "0" * 32}])
    yield "both-kinds", manifest(manifests=[layer])
    yield "fs-layers", manifest(fsLayers=[])
    yield "schema-1", manifest(schemaVersion=1)
    yield "other-type", manifest(mediaType=oci.OCI_INDEX)
    yield "annotations-list", manifest(annotations=["a"])
    yield "million-layers", document(b'{"schemaVersion":2,"config":{},"layers":[' + b"{}," * 1_000_000 + b"{}]}")
    yield "index-empty", index_of([])
    yield "index-null", index_of([None])  # type: ignore[list-item]  # the point of it
    yield "c-null", config_of(None)
    yield "c-list", config_of([])
    yield "c-rootfs-null", config_of({"architecture": "amd64", "os": "linux", "rootfs": None})
    yield "c-more-layers", config_of({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [str(Digest.of(b"1"))] * 2}})
    yield "c-no-layers", config_of({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}})
    yield "c-diff-id", config_of({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": ["sha256:x"]}})
    yield "c-env-numbers", config_of({"config": {"Env": [1]}, "rootfs": {"diff_ids": [str(Digest.of(b"1"))]}})
    yield "c-deep", config_of(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)


def test_c_r15_malformed_documents_are_refused_and_the_daemon_lives(daemon: Daemon, fake: FakeRegistry) -> None:
    for name, made in hostile():
        repository = f"library/hostile-{name}"
        fake.add(made, repository)
        _, text = refused(daemon, repository)
        assert f"hostile-{name}" in text or any(str(d) in text for d in (made.digest, *made.blobs)), text
        assert not [
            r
            for r in fake.seen(f"{repository}/blobs/")
            if made.blobs and r.path.rpartition("/")[2] != json.loads(made.data)["config"]["digest"]
        ]
    still_works(daemon, fake)
    listed = daemon.images().ListImages(cri_pb2.ListImagesRequest(), timeout=RPC_TIMEOUT).images
    assert [tag for image in listed for tag in image.repo_tags] == ["docker.io/library/good:latest"]
