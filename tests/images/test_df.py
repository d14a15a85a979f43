"""Disk usage: shared and unique bytes."""

from __future__ import annotations

from pathlib import Path

from imgsvc.images.upkeep.df import disk_usage
from imgsvc.images.upkeep.nodes import Images, stored_sizes
from tests.support.stored import Stored


def test_bytes_are_unique_or_shared_and_add_up(tmp_path: Path) -> None:
    node = Stored(tmp_path)
    first, second = node.add("first", ["base", "one"]), node.add("second", ["base", "two"])
    node.put("garbage")
    images = Images(node.images, node.content, {"native": node.snapshotter}, ["native"])
    sizes = stored_sizes(node.content, node.content, [node.snapshotter])
    usage = disk_usage([(image, images.needs(image)) for image in (first, second)], sizes)
    by_id = {image.image_id: image for image in usage.images}
    shared = len("base") * 100 + 1000
    documents = len("manifest first config first ") * 100
    assert by_id[first.image_id].shared == by_id[second.image_id].shared == shared
    assert by_id[first.image_id].unique == documents + len("one") * 100 + 1000
    assert usage.unreferenced == len("garbage") * 100
    assert sum(image.unique for image in usage.images) + shared + usage.unreferenced == sum(sizes.values())
    assert usage.classes["snapshot"] == (3000, 3)
    assert usage.to_json()["classes"]["content"]["count"] == 8
    node.close()
