"""Image records: names, lookups, moves, removal, persistence."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from imgsvc.base import failpoints
from imgsvc.base.errors import InvalidArgument, NotFound
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import OCI_MANIFEST, Descriptor, Digest, ImageConfig, Platform, parse_config
from imgsvc.base.reference import Reference
from imgsvc.images.records import Image, ImageStore, Layer

NAME = "docker.io/library/app"


def image(seed: str) -> Image:
    """An image whose ID depends on `seed`."""
    raw = f'{{"os":"linux","architecture":"amd64","config":{{"User":"{seed}"}}}}'.encode()
    layer = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(b"blob" + raw), 7)
    return Image(
        image_id=Digest.of(raw),
        manifest=Descriptor(OCI_MANIFEST, Digest.of(b"manifest" + raw), 10),
        config=parse_config(raw, "test"),
        layers=(Layer(layer, Digest.of(b"diff" + raw), "snapshot"),),
        documents=(Digest.of(b"manifest" + raw), Digest.of(raw)),
        size=17,
        created_at=1.5,
        provenance={"resolved_by": "http://mirror", "blobs": {layer.digest: {"http://mirror": 7}}},
    )


def repo_digest(of: Image) -> str:
    return f"{NAME}@{of.manifest.digest}"


@pytest.fixture
def db(tmp_path: Path) -> Iterator[MetaDB]:
    database = MetaDB(tmp_path / "db", sync=False)
    yield database
    database.close()


T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def test_an_image_is_found_by_every_name_it_has(db: MetaDB) -> None:
    store, first = ImageStore(db), image("a")

    run(store.add(first, f"{NAME}:1", repo_digest(first)))

    hexadecimal = first.image_id.hex
    for text in (
        first.image_id,
        hexadecimal,
        hexadecimal[:12],
        f"sha256:{hexadecimal[:12]}",
        "app:1",
        f"{NAME}:1",
        f"index.{NAME}:1",
        repo_digest(first),
        f"{NAME}:other@{first.manifest.digest}",
    ):
        found = store.find(text)
        assert found is not None, text
        assert found.image_id == first.image_id, text


def test_what_is_not_here_is_none_and_what_cannot_be_a_name_is_an_error(db: MetaDB) -> None:
    store = ImageStore(db)

    assert store.find("app:2") is None
    assert store.find("sha256:" + "0" * 64) is None
    assert store.find("0" * 64) is None
    with pytest.raises(InvalidArgument):
        store.find("App:2")


def test_a_short_id_of_two_images_is_refused(db: MetaDB) -> None:
    store = ImageStore(db)
    by_short: dict[str, list[Image]] = {}
    for number in range(10_000):
        candidate = image(str(number))
        by_short.setdefault(candidate.image_id.hex[:4], []).append(candidate)
    short, twins = next((short, images) for short, images in by_short.items() if len(images) > 1)
    run(store.add(twins[0], f"{NAME}:1", ""))
    run(store.add(twins[1], f"{NAME}:2", ""))

    with pytest.raises(InvalidArgument, match="ambiguous"):
        store.find(short)


def test_a_tag_moves_and_the_old_image_stays_by_digest(db: MetaDB) -> None:
    store, old, new = ImageStore(db), image("old"), image("new")
    run(store.add(old, f"{NAME}:1", repo_digest(old)))

    run(store.add(new, f"{NAME}:1", repo_digest(new)))

    assert store.find("app:1").image_id == new.image_id  # type: ignore[union-attr]
    left = store.find(repo_digest(old))
    assert left is not None
    assert left.repo_tags == ()
    assert left.repo_digests == (repo_digest(old),)


def test_records_survive_a_restart_whole(db: MetaDB) -> None:
    stored = run(ImageStore(db).add(image("a"), f"{NAME}:1", repo_digest(image("a"))))

    again = ImageStore(db)

    assert again.all() == [stored]
    assert again.find("app:1") == stored


def test_removing_an_image_removes_all_its_names(db: MetaDB) -> None:
    store, one = ImageStore(db), image("a")
    run(store.add(one, f"{NAME}:1", repo_digest(one)))
    run(store.add(one, f"{NAME}:2", ""))

    assert run(store.remove(one.image_id)) is not None

    assert store.find("app:1") is store.find("app:2") is store.find(one.image_id) is None
    assert ImageStore(db).all() == []
    assert run(store.remove(one.image_id)) is None


def test_removing_one_name_keeps_an_image_that_has_another(db: MetaDB) -> None:
    store, one = ImageStore(db), image("a")
    run(store.add(one, f"{NAME}:1", ""))
    run(store.tag("app:1", Reference.parse("app:2")))

    run(store.untag("app:1"))
    assert store.find("app:1") is None
    assert store.find("app:2") is not None
    run(store.untag("app:2"))
    assert store.all() == []


def test_a_tag_needs_an_image_and_a_tag(db: MetaDB) -> None:
    store, one = ImageStore(db), image("a")
    run(store.add(one, f"{NAME}:1", ""))

    with pytest.raises(NotFound):
        run(store.tag("nothing:1", Reference.parse("app:2")))
    with pytest.raises(InvalidArgument):
        run(store.tag("app:1", Reference.parse(repo_digest(one))))


@pytest.mark.parametrize(
    "pattern, pinned",
    [
        ("app:1", True),
        (f"{NAME}:1", True),
        (f"index.{NAME}:1", True),
        ("docker.io/*", True),
        ("*app*", True),
        ("app:2", False),
        ("app", False),
    ],
)
def test_pins_match_exact_names_globs_and_keywords(db: MetaDB, pattern: str, pinned: bool) -> None:
    store = ImageStore(db, [pattern])
    one = run(store.add(image("a"), f"{NAME}:1", ""))

    assert store.pinned(one) is pinned


def test_an_artifact_needs_no_image_config(db: MetaDB) -> None:
    store = ImageStore(db)
    artifact = replace(image("a"), artifact=True, config=ImageConfig(platform=Platform("linux", "amd64"), diff_ids=()))

    run(store.add(artifact, f"{NAME}:1", ""))

    again = ImageStore(db).find("app:1")
    assert again is not None
    assert again.artifact
    assert again.config.diff_ids == ()


def test_a_caller_who_leaves_while_it_is_written_leaves_disk_and_memory_alike(tmp_path: Path) -> None:
    async def life() -> None:
        db = MetaDB(tmp_path, sync=False)
        store, here, told = ImageStore(db), image("here"), []
        await store.add(here, f"{NAME}:here", "")
        store.on_change(lambda change, of: told.append(change))
        failpoints.arm("metadb.commit=delay:100*2")
        for work in (store.add(image("new"), f"{NAME}:new", ""), store.remove(here.image_id)):
            leaving = asyncio.create_task(work)
            await asyncio.sleep(0.02)
            leaving.cancel()
            await asyncio.wait([leaving])
            assert leaving.cancelled()
        await db.awrite(lambda txn: None)  # behind all that was begun
        assert told == ["added", "removed"]
        for each in (store, ImageStore(db)):
            assert [found.repo_tags for found in each.all()] == [(f"{NAME}:new",)]
        failpoints.arm("")
        db.close()

    asyncio.run(life())
