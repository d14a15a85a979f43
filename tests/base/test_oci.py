from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgsvc.base import oci
from imgsvc.base.errors import InvalidArgument, ResourceExhausted
from imgsvc.base.oci import Descriptor, Digest, Index, Manifest, Platform, chain_ids, parse_config, parse_document

HEX = "ab" * 32
DIGEST = f"sha256:{HEX}"
CONFIG: dict[str, Any] = {"mediaType": oci.OCI_CONFIG, "digest": DIGEST, "size": 2}
LAYER: dict[str, Any] = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 3}
MANIFEST: dict[str, Any] = {"schemaVersion": 2, "config": CONFIG, "layers": [LAYER]}
INDEX: dict[str, Any] = {"schemaVersion": 2, "manifests": [{"mediaType": oci.OCI_MANIFEST, "digest": DIGEST, "size": 1}]}


def parse(value: object, content_type: str = "") -> Manifest | Index:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_document(data, content_type, "test")


@pytest.mark.parametrize("text", [DIGEST, "sha512:" + "0f" * 64])
def test_digests_have_algorithm_and_hex(text: str) -> None:
    digest = Digest(text)
    assert f"{digest.algorithm}:{digest.hex}" == text == str(digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "SHA256:" + "a" * 64,
        "sha512:" + "a" * 64,
        "sha256:" + "a" * 128,
        "md5:" + "a" * 32,
        "sha384:" + "a" * 96,
        "sha256:../../etc/passwd",
        "sha256:" + "../" * 21 + "a",
        DIGEST + "\n",
        " " + DIGEST,
        DIGEST + "?ns=x",
        DIGEST + "/..",
        "sha256:" + "\u0661" * 64,  # Arabic digits
        "sha256:" + "a" * 63 + "\0",
    ],
)
def test_c_r3_digests_that_could_become_another_path_or_url_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Digest(text)
    for document in ({**MANIFEST, "layers": [{**LAYER, "digest": text}]}, {**MANIFEST, "config": {**CONFIG, "digest": text}}):
        with pytest.raises(InvalidArgument):
            parse(document)
    with pytest.raises(InvalidArgument):
        parse_config(json.dumps({"rootfs": {"diff_ids": [text]}}).encode(), "test")


@pytest.mark.parametrize(
    "document, content_type",
    [
        ({**MANIFEST, "manifests": []}, ""),
        ({**INDEX, "layers": []}, ""),
        ({**INDEX, "config": CONFIG}, ""),
        ({**INDEX, "layers": []}, oci.OCI_INDEX),
        ({**MANIFEST, "manifests": []}, oci.DOCKER_MANIFEST),
        ({**MANIFEST, "mediaType": oci.OCI_INDEX}, ""),
        ({**INDEX, "mediaType": oci.OCI_MANIFEST}, ""),
        ({**MANIFEST, "mediaType": oci.OCI_MANIFEST}, oci.OCI_INDEX),
        ({**MANIFEST, "mediaType": oci.OCI_MANIFEST}, oci.DOCKER_MANIFEST),
        ({**INDEX, "mediaType": oci.OCI_INDEX}, oci.OCI_MANIFEST + "; charset=utf-8"),
        ({**MANIFEST, "fsLayers": []}, ""),
        ({**MANIFEST, "mediaType": "text/html"}, ""),
        ({**MANIFEST, "mediaType": 7}, ""),
        (MANIFEST, oci.OCI_INDEX),
        (INDEX, oci.OCI_MANIFEST),
        (b'{"schemaVersion":2,"layers":[],"config":{},"layers":[]}', ""),
        (b'{"schemaVersion":2,"config":{"size":1,"size":2},"layers":[]}', ""),
        (b"\xef\xbb\xbf" + json.dumps(MANIFEST).encode(), ""),
        (json.dumps(MANIFEST).encode("utf-16"), ""),
        (json.dumps(MANIFEST).encode("utf-32-be"), ""),
        (json.dumps(MANIFEST).encode() + b" {}", ""),
        (json.dumps(MANIFEST).encode() + b"\0", ""),
    ],
)
def test_c_r1_ambiguous_documents_are_refused(document: object, content_type: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(document, content_type)


@pytest.mark.parametrize("media_type", oci.DOCKER_SCHEMA1)
def test_schema_1_is_refused_with_a_way_out(media_type: str) -> None:
    for document, announced in (({"schemaVersion": 1, "fsLayers": []}, media_type), ({"schemaVersion": 1}, ""), ({}, media_type)):
        with pytest.raises(InvalidArgument, match="schema 1") as caught:
            parse(document, announced)
        assert caught.value.hint


def nested(depth: int) -> bytes:
    return b'{"layers":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    "data",
    [
        b"{" + b" " * oci.MAX_DOCUMENT + b"}",
        json.dumps({**MANIFEST, "layers": [LAYER] * (oci.MAX_DESCRIPTORS + 1)}).encode(),
        json.dumps({**INDEX, "manifests": INDEX["manifests"] * (oci.MAX_DESCRIPTORS + 1)}).encode(),
    ],
    ids=["bytes", "layers", "manifests"],
)
def test_c_r2_c_r14_documents_over_a_limit_are_refused(data: bytes) -> None:
    with pytest.raises(ResourceExhausted):
        parse(data)


@pytest.mark.parametrize(
    "data",
    [
        nested(100_000),
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"size":NaN}',
        b'{"size":-Infinity}',
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b"<html>",
    ],
    ids=lambda data: data[:20].decode(errors="replace"),
)
def test_c_r2_c_r15_what_is_not_a_document_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse(data)
    with pytest.raises(InvalidArgument):
        parse_config(data, "test")


@pytest.mark.parametrize("size", [b"9" * 1_000_000, b"1e999", b"1e3", b"1.0"], ids=lambda size: size[:5].decode())
def test_c_r15_numbers_that_no_size_can_be_are_refused_as_sizes_only(size: bytes) -> None:
    body = json.dumps({**MANIFEST, "layers": [{**LAYER, "size": 4711}]}).encode()
    with pytest.raises(InvalidArgument, match="size"):
        parse(body.replace(b"4711", size))
    parse_config(b'{"history":[{"number":' + size + b"}]}", "test")


@pytest.mark.parametrize("value", [b"[]", b"{}", b"[[]]", b'{"a":1}', b'"a"'], ids=bytes.decode)
def test_c_r2_a_document_of_the_largest_size_costs_bounded_memory(value: bytes) -> None:
    body = b'{"layers":[' + b",".join([value] * ((oci.MAX_DOCUMENT - 20) // (len(value) + 1))) + b"]}"
    assert oci.MAX_DOCUMENT - 40 < len(body) <= oci.MAX_DOCUMENT
    tracemalloc.start()
    try:
        with pytest.raises(ResourceExhausted):
            parse(body)
        assert tracemalloc.get_traced_memory()[1] < 32 * oci.MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bad", [None, -1, 2**63, 1.5, "3", True, [], {}])
def test_c_r15_sizes_are_whole_numbers_of_bytes(bad: object) -> None:
    with pytest.raises(InvalidArgument, match="size"):
        parse({**MANIFEST, "layers": [{**LAYER, "size": bad}]})


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": []},
        {"layers": {}},
        {"layers": ""},
        {"layers": False},
        {"layers": 0},
        {"layers": [None]},
        {"layers": [[]]},
        {"layers": ["x"]},
        {"layers": [{}]},
        {"layers": [{**LAYER, "digest": None}]},
        {"layers": [{**LAYER, "mediaType": 1}]},
        {"layers": [{**LAYER, "annotations": {"a": 1}}]},
        {"layers": [{**LAYER, "annotations": []}]},
        {"layers": [{**LAYER, "urls": "https://example"}]},
        {"layers": [{**LAYER, "platform": "linux"}]},
        {"layers": [{**LAYER, "platform": {"os": 1}}]},
        {"annotations": [1]},
        {"artifactType": []},
        {"subject": "x"},
        {"subject": []},
    ],
    ids=str,
)
def test_c_r15_members_of_a_wrong_type_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        parse({**MANIFEST, **change})


def test_c_r15_a_manifest_without_config_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="config"):
        parse({"schemaVersion": 2, "layers": [LAYER]})


def test_null_members_mean_absent_as_go_writes_them() -> None:
    found = parse({**MANIFEST, "layers": None, "annotations": None, "mediaType": oci.DOCKER_MANIFEST})
    assert isinstance(found, Manifest)
    assert (found.layers, found.annotations, found.media_type) == ((), {}, oci.DOCKER_MANIFEST)
    config = parse_config(b'{"config":{"Env":null,"Cmd":null,"Labels":null,"Volumes":null},"rootfs":{"diff_ids":null}}', "test")
    assert (config.env, config.cmd, config.labels, config.volumes, config.diff_ids) == ((), (), {}, (), ())


@pytest.mark.parametrize(
    "change", [{"Env": "A=b"}, {"Env": [1]}, {"User": 0}, {"User": {}}, {"Cmd": {}}, {"Labels": {"a": 1}}, {"Volumes": []}]
)
def test_c_r15_configs_with_a_wrong_type_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        parse_config(json.dumps({"config": change}).encode(), "test")


def test_the_error_names_the_document_and_the_entry() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse({**MANIFEST, "layers": [LAYER, {**LAYER, "size": -1}]})
    assert caught.value.where == "test: layers[1]"


def inline(content: bytes, **change: Any) -> dict[str, Any]:
    return {**LAYER, "digest": str(Digest.of(content)), "size": len(content), "data": base64.b64encode(content).decode(), **change}


def test_embedded_data_is_verified() -> None:
    assert Descriptor.from_json(inline(b"abc")).data == b"abc"
    for wrong in (
        inline(b"abc", size=4),
        inline(b"abc", digest=DIGEST),
        inline(b"abc", data="YWJk"),
        inline(b"abc", data="YWJj\n"),
        inline(b"abc", data=1),
    ):
        with pytest.raises(InvalidArgument):
            Descriptor.from_json(wrong)


def test_a_descriptor_survives_json() -> None:
    platform = {"os": "windows", "architecture": "amd64", "os.version": "10.0.1", "os.features": ["win32k"]}
    value = {**LAYER, "annotations": {"a": "b"}, "platform": platform, "artifactType": "x/y", "urls": ["https://a"]}
    assert Descriptor.from_json(value).to_json() == value


def test_an_artifact_is_told_from_an_image() -> None:
    for media_type, is_artifact in ((oci.OCI_CONFIG, False), (oci.DOCKER_CONFIG, False), (oci.OCI_EMPTY, True), ("application/x", True)):
        found = parse({**MANIFEST, "config": {**CONFIG, "mediaType": media_type}})
        assert isinstance(found, Manifest)
        assert (found.read_config(b"{}", "test") is None) is is_artifact


def parses_or_is_refused(attempt: Callable[[], object]) -> None:
    """Anything but one of our own errors about the document fails the test."""
    try:
        attempt()
    except (InvalidArgument, ResourceExhausted) as error:
        if not str(error).isprintable():
            raise AssertionError(f"not fit for a log: {str(error)!r}") from error


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([DIGEST, oci.OCI_INDEX, oci.OCI_MANIFEST, oci.OCI_CONFIG]),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                sorted({*MANIFEST, *INDEX, *LAYER, "data", "platform", "urls", "annotations", "subject", "rootfs", "diff_ids", "os"})
            ),
            children,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=400)
@given(json_values, st.sampled_from(["", *sorted(oci.INDEX_TYPES | oci.MANIFEST_TYPES), "text/html"]))
def test_c_r15_any_json_parses_or_is_refused_by_an_error_of_ours(value: Any, content_type: str) -> None:
    data = json.dumps(value).encode()
    parses_or_is_refused(lambda: parse_document(data, content_type, "fuzz"))
    parses_or_is_refused(lambda: parse_config(data, "fuzz"))


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_c_r15_any_bytes_parse_or_are_refused_by_an_error_of_ours(data: bytes) -> None:
    parses_or_is_refused(lambda: parse_document(data, "", "fuzz"))
    parses_or_is_refused(lambda: parse_config(data, "fuzz"))


@settings(max_examples=300)
@given(st.data())
def test_c_r15_a_damaged_manifest_parses_or_is_refused(data: st.DataObject) -> None:
    good = bytearray(json.dumps({**MANIFEST, "layers": [inline(b"abc")]}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    parses_or_is_refused(lambda: parse(bytes(good)))


def test_chain_ids_follow_the_specification() -> None:
    first, second, third = (Digest.of(bytes([n])) for n in range(3))
    two = Digest.of(f"{first} {second}".encode())
    assert chain_ids([first, second, third]) == [first, two, Digest.of(f"{two} {third}".encode())]
    assert chain_ids([]) == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("amd64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/amd64/v1", "linux/amd64"),
        ("Linux/AMD64/v3", "linux/amd64/v3"),
    ],
)
def test_platforms_have_one_spelling(text: str, shown: str) -> None:
    assert str(Platform.parse(text)) == shown


@pytest.mark.parametrize("text", ["", "/", "linux/", "a/b/c/d", "linux/amd 64", "linux/é"])
def test_bad_platforms_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Platform.parse(text)


def index_of(*platforms: dict[str, Any] | None) -> Index:
    entries = [
        {"mediaType": oci.OCI_MANIFEST, "digest": str(Digest.of(bytes([n]))), "size": n, **({"platform": p} if p else {})}
        for n, p in enumerate(platforms)
    ]
    found = parse({"schemaVersion": 2, "manifests": entries})
    assert isinstance(found, Index)
    return found


def arm(variant: str) -> dict[str, Any]:
    return {"os": "linux", "architecture": "arm", "variant": variant}


def amd(variant: str = "") -> dict[str, Any]:
    return {"os": "linux", "architecture": "amd64", "variant": variant}


@pytest.mark.parametrize(
    "wanted, offered, order",
    [
        ("linux/arm/v7", [arm("v5"), arm("v8"), arm("v7"), arm("v6")], [2, 3, 0]),
        ("linux/arm/v6", [arm("v7"), arm("v6")], [1]),
        ("linux/amd64/v3", [amd(), amd("v4"), amd("v3"), amd("v2")], [2, 3, 0]),
        ("linux/amd64", [amd("v2"), amd(), amd("v1")], [1, 2]),
        ("linux/arm64", [{"os": "linux", "architecture": "arm64"}, arm("v7")], [0]),
        ("linux/amd64", [None, amd()], [1, 0]),
        ("linux/amd64", [{"os": "windows", "architecture": "amd64"}], []),
        ("linux/amd64", [{**amd(), "os.features": ["erofs"]}, amd()], [1]),
        ("linux/amd64", [{"os": "unknown", "architecture": "unknown"}, amd()], [1]),
    ],
)
def test_candidates_are_those_that_run_here_best_first(wanted: str, offered: list[dict[str, Any] | None], order: list[int]) -> None:
    assert [d.size for d in index_of(*offered).candidates(Platform.parse(wanted))] == order


def test_the_error_says_what_is_on_offer() -> None:
    offered = [Platform.parse(text) for text in ("linux/arm/v7", "linux/amd64")]
    found = oci.no_platform(Platform.parse("linux/s390x"), offered, "name")
    assert str(found) == "name: no manifest for platform linux/s390x; the index offers linux/amd64, linux/arm/v7"
