"""Odd images in one registry, pulled by us and by containerd: what it takes we take, what it refuses we refuse.

Where we mean to differ, DIFFERENCES says why. The peer is Debian's containerd, or the one that IMGSVC_TEST_PEER names.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import zstandard

from imgsvc.api import cri_pb2
from imgsvc.api.cri_pb2_grpc import ImageServiceStub
from imgsvc.base import oci
from imgsvc.base.oci import Digest, Platform
from tests.decrypt.test_containerd import running
from tests.fakes.registry import FakeRegistry
from tests.snapshot.layers import Entry, directory, gz, link, pax_block, raw_header, record, symlink, tar
from tests.snapshot.trees import read_tree
from tests.support.daemon import RPC_TIMEOUT, Daemon, below, new_daemon
from tests.support.images import BuiltDocument, descriptor

pytestmark = [pytest.mark.root, pytest.mark.compat]
LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
HERE: Final = {"os": "linux", "architecture": Platform.host().architecture}
THERE: Final = {"os": "linux", "architecture": "s390x" if HERE["architecture"] != "s390x" else "amd64"}
MARK: Final = "mark"  # a file with the case's name in every layer, by which the tree is found


@dataclass
class Odd:
    """An image to be spoilt by a case. before: what stands in front of its layer's own entry, without an archive's end.

    config_members, manifest_members: replace or add; ... leaves out. config_, layer_: members of the manifest's descriptors.
    """

    name: str
    before: bytes = b""
    pack: Callable[[bytes], bytes] = gz
    config: Callable[[dict[str, Any]], object] = dict
    config_text: Callable[[bytes], bytes] = bytes
    manifest: Callable[[dict[str, Any]], object] = dict
    manifest_text: Callable[[bytes], bytes] = bytes
    index: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None

    def built(self) -> BuiltDocument:
        """What goes into the registry: the image, or an index of it and one for another platform."""
        here = self._image(HERE)
        if self.index is None:
            return here
        there = self._image(THERE)
        listed = self.index(descriptor(here.media_type, here.data), descriptor(there.media_type, there.data))
        data = json.dumps({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, **listed}).encode()
        return BuiltDocument(oci.OCI_INDEX, data, {}, (here, there))

    def _image(self, platform: dict[str, str]) -> BuiltDocument:
        plain = self.before + tar([Entry(MARK, data=self.name.encode())])
        blob = self.pack(plain)
        config: dict[str, Any] = {**platform, "config": {}, "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(plain))]}}
        self.config(config)
        raw = self.config_text(json.dumps(config).encode())
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": descriptor(oci.OCI_CONFIG, raw),
            "layers": [descriptor(LAYER + "+gzip", blob)],
        }
        self.manifest(manifest)
        data = self.manifest_text(json.dumps(manifest).encode())
        return BuiltDocument(oci.OCI_MANIFEST, data, {Digest.of(raw): raw, Digest.of(blob): blob})


Case = dict[str, Any]  # members of Odd


def config(**members: Any) -> Case:
    return {"config": lambda value: value.update(members)}


def runs(**members: Any) -> Case:
    """Members of the config's "config"."""
    return {"config": lambda value: value["config"].update(members)}


def without(name: str, where: str) -> Case:
    return {where: lambda value: value.pop(name)}


def manifest(**members: Any) -> Case:
    return {"manifest": lambda value: value.update(members)}


def stored(**members: Any) -> Case:
    """Members of the layer's descriptor."""
    return {"manifest": lambda value: value["layers"][0].update(members)}


def replaced(old: bytes, new: bytes) -> Case:
    """Bytes of a config that no JSON writer writes, in place of `old` as a user and as a label."""
    return {**runs(User=old.decode(), Labels={"a": old.decode()}), "config_text": lambda data: data.replace(old, new)}


def number(new: bytes) -> Case:
    return {**config(number=4711), "config_text": lambda data: data.replace(b"4711", new)}


def index(*entries: tuple[bool, dict[str, Any]], **members: Any) -> Case:
    """Entries: whether it is the image for here, and members beside the descriptor's."""
    return {"index": lambda here, there: {"manifests": [{**(here if own else there), **more} for own, more in entries], **members}}


def entries(*found: Entry, layout: int = tarfile.PAX_FORMAT) -> Case:
    """Entries before the layer's own."""
    whole = tar([*found, Entry("last")], layout)
    at = whole.rindex(b"last\0")
    return {"before": whole[: at - at % 512] if layout != tarfile.PAX_FORMAT else tar(found, layout)[: _end(tar(found, layout))]}


def _end(archive: bytes) -> int:
    """Where the zero blocks at the end begin."""
    end = len(archive)
    while end and archive[end - 512 : end] == bytes(512):
        end -= 512
    return end


def packed(pack: Callable[[bytes], bytes], suffix: str = "+gzip") -> Case:
    return {"pack": pack, **stored(mediaType=LAYER + suffix)}


def zstd(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(plain)


CASES: Final[dict[str, Case]] = {
    "plain": {},
    "labels with null": runs(Labels={"a": None}),
    "lists with null": runs(Env=None, Cmd=[None], Entrypoint=None),
    "half a surrogate": replaced(b"@", b"\\ud800"),
    "Latin-1": replaced(b"@", b"gr\xf6\xdfe"),
    "members in other case": {"config": lambda value: value.update(CONFIG={"user": "7", "config": value.pop("config")})},
    "a user of many zeros": runs(User="0" * 24 + "1000"),
    "unknown members": config(history=[{"created_by": None, "number": 1e300}], more={"deep": [[[{}]]]}),
    "a long number": number(b"9" * 6000),
    "not a number": number(b"NaN"),
    "env is a text": runs(Env="A=b"),
    "volumes without a value": runs(Volumes={"/v": None}, ExposedPorts={"80": None}),
    "no operating system": without("os", "config"),
    "config null": config(config=None),
    "byte order mark": {"config_text": lambda data: b"\xef\xbb\xbf" + data},
    "space around": {"manifest_text": lambda data: b"\n\t " + data + b" \n"},
    "no schema version": without("schemaVersion", "manifest"),
    "no media type": without("mediaType", "manifest"),
    "annotations with null": manifest(annotations={"a": None}),
    "subject null": manifest(subject=None, artifactType=None),
    "size a text": stored(size="7"),
    "size too small": stored(size=1),
    "urls null": stored(urls=None, platform=None, data=None),
    "manifests too": manifest(manifests=[]),
    "no platform, other first": index((False, {}), (True, {})),
    "no platform, nothing fits": index((False, {}), (False, {})),
    "platform null": index((True, {"platform": None})),
    "unknown platform": index((False, {"platform": {"os": "unknown", "architecture": "unknown"}}), (True, {"platform": HERE})),
    "platforms in other words": index((True, {"platform": {"os": "linux", "architecture": os.uname().machine}})),
    "index annotations null": index((True, {"platform": HERE, "annotations": {"a": None}}), annotations=None),
    "plain tar called gzip": packed(bytes),
    "zstd called gzip": packed(zstd),
    "gzip called tar": packed(gz, ""),
    "gzip of two members": packed(lambda plain: gz(plain[:700]) + gz(plain[700:])),
    "gzip with a name": packed(lambda plain: b"\x1f\x8b\x08\x18" + bytes(5) + b"\x03name\0comment\0" + gz(plain)[10:]),
    "zstd after a skippable frame": packed(lambda plain: b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstd(plain), "+zstd"),
    "garbage called gzip": packed(lambda plain: b"garbage" * 1000),
    "GNU format": entries(Entry("g" * 150, data=b"x"), symlink("s", "t" * 150), layout=tarfile.GNU_FORMAT),
    "names from the root": entries(Entry("/abs/file", data=b"x"), directory("./dot/"), Entry("./dot/file")),
    "aufs": entries(Entry(".wh..wh.plnk/1.2", data=b"x"), directory(".wh..wh.orph"), link("linked", ".wh..wh.plnk/1.2")),
    "plus signs": {"before": pax_block(record(b"uid", b"+7") + record(b"mtime", b"+1.5")) + raw_header(b"plus")},
    "zeros in front": {"before": pax_block(record(b"gid", b"0" * 25 + b"7")) + raw_header(b"zeros")},
    "empty PAX values": {"before": pax_block(record(b"path", b"") + record(b"uid", b"")) + raw_header(b"kept")},
    "a NUL in a name": {"before": pax_block(record(b"path", b"a\0b")) + raw_header(b"nul")},
    "a lone zero block": {"before": raw_header(b"one") + bytes(512)},
    "wrong checksum": {"before": raw_header(b"one").replace(b"one", b"two", 1)},
    "V7 directory": {"before": raw_header(b"v7/", 0, b"\0", magic=bytes(8)) + raw_header(b"v7/file", 0, b"\0", magic=bytes(8))},
    "a file's name that ends in a slash": {"before": raw_header(b"file/")},
    "a hard link to nothing": entries(link("nowhere-link", "nowhere")),
    "through a file": entries(Entry("file"), Entry("file/below")),
    "a directory replaced": entries(Entry("d/x", data=b"x"), Entry("d", data=b"now a file")),
    "the same twice": entries(Entry("twice", data=b"1", mode=0o600), Entry("twice", data=b"22", mode=0o755)),
    "odd modes and times": entries(Entry("suid", mode=0o6755, uid=7, gid=8), Entry("old", mtime=86400.5), directory("sticky", 0o1777)),
}
DIFFERENCES: Final[dict[str, str]] = {
    "no platform, other first": "containerd looks at the first such entry only, and finds no image",
    "gzip called tar": "containerd goes by the label here; Docker and skopeo go by the bytes, as we do",
    "aufs": "containerd shows AUFS's own files; Docker, which wrote such layers, leaves them out",
}


@dataclass(frozen=True)
class Puller:
    """A CRI image service, and the directory below which its snapshots' files are, whichever snapshotter it has."""

    service: ImageServiceStub
    root: Path

    def outcome(self, reference: str, name: str) -> dict[str, Any] | str:
        """What CRI tells of the image and its tree, or "refused"."""
        spec = cri_pb2.ImageSpec(image=reference)
        try:
            self.service.PullImage(cri_pb2.PullImageRequest(image=spec), timeout=RPC_TIMEOUT)
        except grpc.RpcError:
            return "refused"
        seen = self.service.ImageStatus(cri_pb2.ImageStatusRequest(image=spec), timeout=RPC_TIMEOUT).image
        roots = [path.parent for path in below(self.root) if path.name == MARK and path.read_text() == name]
        return {"id": seen.id, "uid": seen.uid.value, "username": seen.username, "tree": _comparable(roots[0]) if roots else None}


def _comparable(root: Path) -> dict[str, Any]:
    """A tree without what no layer says: times of directories."""
    directories = {path for path, facts in read_tree(root).items() if path and facts[0].startswith("0o4")}
    return read_tree(root, unowned_times=directories)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Puller]:
    program = os.environ.get("IMGSVC_TEST_PEER") or shutil.which("containerd")
    if program is None:
        pytest.skip("containerd is not installed")
    place = tmp_path_factory.mktemp("peer")
    with running(place, program) as made, grpc.insecure_channel(made.address) as channel:
        yield Puller(ImageServiceStub(channel), place / "root")


@pytest.fixture(scope="module")
def ours() -> Iterator[Puller]:
    daemon: Daemon = new_daemon(network=False, settings='enabled = false\n[images]\nsnapshotter = "native"\nsync = "none"\n')
    try:
        daemon.start()
        yield Puller(daemon.images(), daemon.root / "snapshots")
        assert "Traceback" not in daemon.log
    finally:
        daemon.close()


@pytest.mark.parametrize("name", CASES)
def test_P4_to_P22_what_containerd_takes_we_take(name: str, fake: FakeRegistry, ours: Puller, peer: Puller) -> None:
    repository = f"odd/case-{list(CASES).index(name)}"
    fake.add(replace(Odd(name), **CASES[name]).built(), repository)
    reference = f"{fake.address}/{repository}:latest"
    found, expected = ours.outcome(reference, name), peer.outcome(reference, name)
    if name in DIFFERENCES:
        assert found != expected, "the difference is gone"
    else:
        assert found == expected
