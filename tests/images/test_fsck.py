"""fsck over images, blobs and snapshots together; content alone is in content/test_local.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import Cancelled
from imgsvc.images.upkeep.fsck import Checker, ContentChecker, FsckReport, ImageChecker, fsck
from tests.support.stored import Stored


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Stored]:
    stored = Stored(tmp_path)
    yield stored
    stored.close()


def check(node: Stored, *, repair: bool = False) -> FsckReport:
    checkers: list[Checker] = [ContentChecker(node.content), ImageChecker(node.images, node.content, [node.snapshotter])]
    return fsck(checkers, deep=True, repair=repair, cancel=CancelToken())


def test_a_sound_store_is_clean(node: Stored) -> None:
    node.add("app", ["base", "app"])
    node.add("artifact", ["weights"], artifact=True)
    report = check(node)
    assert report.findings == ()
    assert report.clean


def test_c_d4_an_image_whose_document_is_gone_is_named(node: Stored) -> None:
    image = node.add("app", ["base"])
    node.add("other", ["base"])
    (node.root / "content/blobs/sha256" / image.documents[0].hex).unlink()
    findings = check(node, repair=True).findings
    assert [(f.kind, f.id) for f in findings] == [("blob", image.documents[0]), ("image", "docker.io/library/app:1")]
    assert findings[0].repaired
    assert not check(node, repair=True).clean, "only pulling brings it back"
    node.add("app", ["base"])
    assert check(node).clean


def test_c_d4_an_image_whose_layer_is_gone_is_named(node: Stored) -> None:
    image = node.add("app", ["base"])
    node.snapshotter.remove(image.layers[0].snapshot)
    (finding,) = check(node).findings
    assert str(finding).startswith("image docker.io/library/app:1: its layer sha256:")
    assert check(node).to_json()["findings"][0]["kind"] == "image"


def test_a_blob_that_is_only_cache_may_be_missing(node: Stored) -> None:
    image = node.add("app", ["base"])
    node.content.delete(image.layers[0].descriptor.digest)
    assert check(node).clean


def test_checking_can_be_stopped(node: Stored) -> None:
    node.add("app", ["base"])
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        fsck([ContentChecker(node.content)], deep=True, repair=False, cancel=token)
