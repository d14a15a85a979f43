"""Hostile and odd image documents: no record makes a listing fail, and what other engines take is taken."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from imgsvc.api import cri_pb2
from imgsvc.base import oci
from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import InvalidArgument, NotFound, ResourceExhausted
from imgsvc.base.oci import Descriptor, Digest, ImageConfig, Manifest, Platform, load_json_object, parse_config, parse_document
from imgsvc.images.choosing import MAX_DOCUMENTS, Chosen, choose
from imgsvc.images.records import TABLE, ImageStore, check_image
from imgsvc.images.upkeep.fsck import ImageChecker, fsck
from tests.fakes.registry import FakeRegistry
from tests.registry.support import hosts_d
from tests.support import cri, images
from tests.support.daemon import RPC_TIMEOUT, Daemon
from tests.support.images import BuiltDocument, Entry, Layer, descriptor
from tests.support.stored import Stored

HOST: Final = Platform.host()
FOREIGN: Final = Platform("linux", "s390x" if HOST.architecture != "s390x" else "amd64")
POISON_PULLS: Final = 40


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


LAYER: Final = images.layer([Entry("text", b"shared by all")])


def manifest_of(raw: bytes, layers: Sequence[dict[str, Any]], config_type: str = oci.OCI_CONFIG, **members: Any) -> BuiltDocument:
    """A manifest over LAYER, with layer descriptors as told."""
    value = {"schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "config": descriptor(config_type, raw), "layers": layers, **members}
    return BuiltDocument(oci.OCI_MANIFEST, json.dumps(value).encode(), {Digest.of(raw): raw, LAYER.digest: LAYER.blob})


def config_of(layers: int = 1, platform: Platform = HOST, **members: Any) -> bytes:
    """An image config for so many times LAYER."""
    value: dict[str, Any] = {
        "os": platform.os,
        "architecture": platform.architecture,
        "rootfs": {"type": "layers", "diff_ids": [str(LAYER.diff_id)] * layers},
    }
    if platform.variant:
        value["variant"] = platform.variant
    return json.dumps({**value, **members}).encode()


def entry_of(layer: Layer = LAYER, **changes: Any) -> dict[str, Any]:
    return {**descriptor(layer.media_type, layer.blob), **changes}


def poisons(seed: random.Random) -> Iterator[BuiltDocument]:
    """Images whose documents are made to break what reads their records later. No two are the same."""
    number = 0
    while True:
        number += 1
        mark = {"com.example.number": str(number)}
        size = seed.choice([2**62, 2**63 - 1, 2**63, 2**64, -1, 0, len(LAYER.blob) - 1, len(LAYER.blob) + 1, 2**40])
        user = seed.choice(
            ["9" * 5000, "0" * 5000 + "7", "-1", "+1", "1000:" + "9" * 5000, "\udc80", "a\0b", "\u202e", "x" * 70000, ":", "٣"]
        )
        labels: dict[str, Any] = seed.choice([{"a": None}, {"\ud800": "\udfff"}, {"n" * 70000: ""}, {"": "\0"}])
        match seed.randrange(9):
            case 8:
                new = images.layer([Entry("text", str(number).encode())])
                raw = config_of(rootfs={"type": "layers", "diff_ids": [str(new.diff_id)]})
                made = manifest_of(raw, [entry_of(new, size=size)])
                yield replace(made, blobs={**made.blobs, new.digest: new.blob})
            case 0:
                yield manifest_of(config_of(config={"Labels": mark}), [entry_of(size=size)])
            case 1:
                yield manifest_of(config_of(4, config={"Labels": mark}), [entry_of(size=size)] * 4)
            case 2:
                yield manifest_of(config_of(config={"User": user, "Labels": mark}), [entry_of()])
            case 3:
                yield manifest_of(config_of(config={"Labels": {**labels, **mark}}, created="\udcff"), [entry_of()])
            case 4:
                raw = config_of(config={"User": "@", "Labels": mark}).replace(b"@", seed.choice([b"\xff", b"\xe4\xf6", b"\xed\xa0\x80"]))
                yield manifest_of(raw, [entry_of()])
            case 5:
                raw = config_of(config={"Labels": mark, "Env": None, "Cmd": [None], "Volumes": None}, history=None, number=123)
                raw = raw.replace(b"123", b"9" * 5000)
                yield manifest_of(raw, [entry_of(annotations=None, urls=None)], annotations={"a": None})
            case 6:
                raw = config_of(config={"Labels": mark})
                value = {"schemaVersion": 2, "config": {**descriptor(oci.OCI_CONFIG, raw), "size": size}, "layers": [entry_of()]}
                yield BuiltDocument(oci.OCI_MANIFEST, json.dumps(value).encode(), {Digest.of(raw): raw, LAYER.digest: LAYER.blob})
            case 7:
                good = manifest_of(config_of(config={"Labels": mark}), [entry_of()])
                leaf = {**descriptor(good.media_type, good.data), "size": seed.choice([len(good.data), size])}
                wide = [{**leaf, "digest": str(Digest.of(b"%d" % n))} for n in range(seed.choice([0, 4000]))]
                value = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [*wide, leaf]}
                yield BuiltDocument(oci.OCI_INDEX, json.dumps(value).encode(), {}, (good,))


def outcome(daemon: Daemon, name: str) -> tuple[grpc.StatusCode, str]:
    """What a pull comes to: OK and the image ID, or the refusal."""
    try:
        return grpc.StatusCode.OK, cri.pull(daemon.images(), name)
    except grpc.RpcError as refused:
        return refused.code(), refused.details() or ""


def listings_work(daemon: Daemon) -> list[cri_pb2.Image]:
    """Every way of listing answers, and tells of the same images. Returns them."""
    service = daemon.images()
    listed = list(service.ListImages(cri_pb2.ListImagesRequest(), timeout=RPC_TIMEOUT).images)
    streamed = [image for page in service.StreamImages(cri_pb2.StreamImagesRequest(), timeout=RPC_TIMEOUT) for image in page.images]
    assert [image.id for image in listed] == [image.id for image in streamed]
    for image in listed:
        request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=image.id), verbose=True)
        assert service.ImageStatus(request, timeout=RPC_TIMEOUT).image.id == image.id
        assert 0 < image.size < 2**40
    return listed


def commands_work(daemon: Daemon, some: str) -> None:
    for command in (["images"], ["df"], ["inspect", some], ["fsck"]):
        done = daemon.cli(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


@pytest.mark.parametrize("seed", [17])
def test_S2_no_sequence_of_pulls_makes_a_listing_a_start_fsck_or_a_removal_fail(daemon: Daemon, fake: FakeRegistry, seed: int) -> None:
    good = manifest_of(config_of(), [entry_of()])
    fake.add(good, "library/s2-good")
    assert cri.pull(daemon.images(), "s2-good") == str(good.config_digest)
    taken = {str(good.config_digest)}
    source = poisons(random.Random(seed))
    for number in range(POISON_PULLS):
        fake.add(next(source), f"library/s2-{number}")
        code, text = outcome(daemon, f"s2-{number}")
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), text
        if code is grpc.StatusCode.OK:
            taken.add(text)
        if number % 10 == 0:
            listings_work(daemon)
    assert 1 < len(taken) < POISON_PULLS
    listed = listings_work(daemon)
    assert {image.id for image in listed} == taken
    commands_work(daemon, listed[-1].id)
    daemon.kill()
    daemon.start()
    assert listings_work(daemon) == listed
    for image in listed:
        daemon.images().RemoveImage(cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=image.id)), timeout=RPC_TIMEOUT)
    assert listings_work(daemon) == []
    assert "Traceback" not in daemon.log


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Stored]:
    stored = Stored(tmp_path)
    yield stored
    stored.close()


def findings(node: Stored, *, repair: bool = False) -> list[str]:
    checker = ImageChecker(node.images, node.content, [node.snapshotter])
    return [str(finding) for finding in fsck([checker], deep=False, repair=repair, cancel=CancelToken()).findings]


@pytest.mark.parametrize(
    "damage",
    [{"size": 2**65}, {"size": -1}, {"repo_tags": ["\udcff"]}, {"layers": None}, {"config": []}, {"manifest": {}}, {"image_id": "x"}],
    ids=lambda damage: next(iter(damage)),
)
def test_S2_one_bad_record_costs_one_image_and_fsck_finds_it(node: Stored, damage: dict[str, Any]) -> None:
    bad, good = node.add("bad", ["base"]), node.add("good", ["base"])
    with node.db.read() as txn:
        record = txn.get(TABLE, bad.image_id)
    assert record
    node.db.write(lambda txn: txn.put(TABLE, bad.image_id, {**record, **damage}))

    node.images = ImageStore(node.db)

    assert [image.image_id for image in node.images.all()] == [good.image_id]
    (finding,) = findings(node)
    assert bad.image_id in finding
    assert "cannot be used" in finding
    findings(node, repair=True)
    assert findings(node) == []
    node.add("bad", ["base"])
    assert len(ImageStore(node.db).all()) == 2


def test_S2_no_record_is_made_that_a_listing_could_not_show(node: Stored) -> None:
    image = node.add("app", ["base"])
    for change in ({"size": 2**64}, {"size": -1}, {"config": replace(image.config, user="\udc80")}, {"repo_tags": ("\ud800",)}):
        with pytest.raises(InvalidArgument):
            check_image(replace(image, **change))


def test_S2_fsck_compares_recorded_sizes_with_stored_blobs(node: Stored) -> None:
    image = node.add("app", ["base"])
    lie = replace(image.layers[0], descriptor=replace(image.layers[0].descriptor, size=2**62))
    asyncio.run(node.images.add(replace(image, layers=(lie,)), "docker.io/library/app:2", ""))
    (finding,) = findings(node)
    assert f"{lie.descriptor.digest} has 400 bytes, its descriptor says {2**62}" in finding


def parsed_config(data: bytes) -> ImageConfig:
    return parse_config(data, "test")


@pytest.mark.parametrize("escape", [b"\\ud800", b"\\udfff x", b"\\ud800\\u0041", b"\xff", b"gr\xf6\xdfe", b"\xed\xa0\x80"], ids=repr)
def test_P16_what_is_no_character_becomes_the_replacement_character(escape: bytes) -> None:
    data = config_of(config={"Labels": {"a": "@", "smile": "\U0001f600"}, "User": "@", "Env": ["A=\\\\ud800 @"]}).replace(b"@", escape)
    found = parsed_config(data)
    assert "\ufffd" in found.labels["a"]
    assert found.user == found.labels["a"]
    assert found.labels["smile"] == "\U0001f600"
    assert found.env[0].startswith("A=\\\\ud800 "), "an escaped backslash begins no escape"
    json.dumps(dict(found.raw), ensure_ascii=False).encode()


def test_P16_null_is_the_empty_value_wherever_it_stands() -> None:
    found = parsed_config(
        config_of(config={"Labels": {"a": None}, "Env": [None, "A=b"], "Cmd": [None], "User": None, "Volumes": {"/v": None}})
    )
    assert (found.labels, found.env, found.cmd, found.user, found.volumes) == ({"a": ""}, ("", "A=b"), ("",), "", ("/v",))
    made = manifest_of(config_of(), [entry_of(annotations={"a": None}, urls=[None], platform=None)], annotations={"b": None}, subject=None)
    manifest = parse_document(made.data, made.media_type, "test")
    assert isinstance(manifest, Manifest)
    assert (manifest.annotations, manifest.layers[0].annotations, manifest.layers[0].urls) == ({"b": ""}, {"a": ""}, ("",))


def test_P16_credentials_and_signatures_are_not_mended() -> None:
    for bad in (b'{"a":"\\ud800"}', b'{"a":"\xff"}', b'{"a":' + b"9" * 5000 + b"}"):
        with pytest.raises(InvalidArgument):
            load_json_object(bad, "test", limit=1_000_000)


def test_P16_members_are_found_in_any_case_and_two_of_one_name_are_ambiguous() -> None:
    assert parsed_config(json.dumps({"CONFIG": {"user": "7"}, "rootFS": {}, "OS": "linux"}).encode()).user == "7"
    with pytest.raises(InvalidArgument, match="ambiguous"):
        parsed_config(b'{"config":{"User":"1000","user":"0"}}')
    made = json.loads(manifest_of(config_of(), [entry_of()]).data)
    with pytest.raises(InvalidArgument, match="ambiguous"):
        parse_document(json.dumps({**made, "MANIFESTS": []}).encode(), "", "test")


def index_of(*entries: tuple[BuiltDocument, dict[str, Any]]) -> BuiltDocument:
    value = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX}
    listed = [{**descriptor(made.media_type, made.data), **members} for made, members in entries]
    return BuiltDocument(oci.OCI_INDEX, json.dumps({**value, "manifests": listed}).encode(), {}, tuple(made for made, _ in entries))


def told(platform: Platform) -> dict[str, Any]:
    return {"platform": {"os": platform.os, "architecture": platform.architecture, "variant": platform.variant}}


HERE: Final = manifest_of(config_of(config={"Cmd": ["here"]}), [entry_of()])
ELSEWHERE: Final = manifest_of(config_of(platform=FOREIGN), [entry_of()])
SBOM: Final = manifest_of(b"{}", [entry_of()], "application/vnd.example.sbom.config+json", artifactType="application/spdx+json")
UNTYPED: Final = manifest_of(config_of(config={"Cmd": ["old"]}), [entry_of()], oci.UNTYPED)
NO_IMAGE: Final = manifest_of(b"just text", [entry_of()], oci.UNTYPED)


@pytest.mark.parametrize(
    "target, expected",
    {
        "P6 the other platform first": (index_of((ELSEWHERE, {}), (HERE, {})), HERE),
        "P6 one that says what it is wins": (index_of((UNTYPED, {}), (HERE, told(HOST))), HERE),
        "P6 nothing fits": (index_of((ELSEWHERE, {}), (ELSEWHERE, told(FOREIGN))), None),
        "P6 an index inside": (index_of((index_of((ELSEWHERE, {})), {}), (index_of((HERE, {})), {})), HERE),
        "P6 the entry is believed": (index_of((ELSEWHERE, told(HOST)), (HERE, {})), ELSEWHERE),
        "P6 without an index anything is taken": (ELSEWHERE, ELSEWHERE),
        "P7 an artifact first": (index_of((SBOM, {}), (HERE, {})), HERE),
        "P7 an artifact that claims the platform": (index_of((SBOM, told(HOST)), (HERE, told(HOST))), HERE),
        "P7 an artifact and no image": (index_of((ELSEWHERE, told(FOREIGN)), (SBOM, {})), SBOM),
        "P7 an artifact alone": (SBOM, SBOM),
        "P7 an entry of a type that no manifest has": (index_of((HERE, {"mediaType": "application/spdx+json"}), (UNTYPED, {})), UNTYPED),
        "P10 an untyped config": (UNTYPED, UNTYPED),
        "P10 untyped and no image": (index_of((NO_IMAGE, {}), (HERE, {})), HERE),
    }.values(),
)
def test_P6_P7_P10_which_image_an_index_stands_for(target: BuiltDocument, expected: BuiltDocument | None) -> None:
    stored = {}
    todo = [target]
    while todo:
        made = todo.pop()
        stored.update({made.digest: made.data, **made.blobs})
        todo += made.children

    async def read(wanted: Descriptor) -> bytes:
        return stored[wanted.digest]

    async def chosen() -> Chosen:
        return await choose(Descriptor(target.media_type, target.digest, len(target.data)), HOST, read, "test")

    if expected is None:
        with pytest.raises(NotFound, match=f"the index offers {FOREIGN}"):
            asyncio.run(chosen())
        return
    found = asyncio.run(chosen())
    assert found.documents[-2][0].digest == expected.digest
    assert (found.config is None) is (expected is SBOM)


def test_P6_an_index_of_unnamed_platforms_costs_a_bounded_number_of_requests() -> None:
    others = [manifest_of(config_of(platform=FOREIGN, created=str(n)), [entry_of()]) for n in range(200)]
    stored = {made.digest: made.data for made in others} | {digest: data for made in others for digest, data in made.blobs.items()}
    target = index_of(*((made, {}) for made in others))
    asked = []

    async def read(wanted: Descriptor) -> bytes:
        asked.append(wanted)
        return stored.get(wanted.digest, target.data)

    with pytest.raises(ResourceExhausted, match="name their platforms"):
        asyncio.run(choose(Descriptor(target.media_type, target.digest, len(target.data)), HOST, read, "test"))
    assert len(asked) == MAX_DOCUMENTS


def test_P6_P10_a_pull_takes_what_fits_and_old_images_run(daemon: Daemon, fake: FakeRegistry) -> None:
    fake.add(index_of((SBOM, {}), (ELSEWHERE, {}), (UNTYPED, {})), "library/p6")
    assert cri.pull(daemon.images(), "p6") == str(UNTYPED.config_digest)
    shown = json.loads(daemon.cli("inspect", "p6").stdout)
    assert shown["artifact"] is False
    assert shown["manifest"]["digest"] == UNTYPED.digest
    assert not [request for request in fake.seen("library/p6/blobs/") if request.path.endswith(str(SBOM.config_digest))]


def test_S2_long_users_do_not_make_a_listing_too_large_to_send(daemon: Daemon, fake: FakeRegistry) -> None:
    """The kubelet takes 16 MiB per answer; a config may have 4 MiB."""
    for number in range(5):
        fake.add(manifest_of(config_of(config={"User": "u" * 3_900_000 + str(number)}), [entry_of()]), f"library/long-{number}")
        cri.pull(daemon.images(), f"long-{number}")
    listed = listings_work(daemon)
    assert len(listed) == 5
    assert all(image.username.endswith("…") and not image.HasField("uid") for image in listed)
