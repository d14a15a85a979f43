"""Contract of snapshot.interfaces.Snapshotter, on both drivers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgsvc.base import kernel
from imgsvc.base.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.removal import unmount_below
from imgsvc.snapshot.detect import detect
from imgsvc.snapshot.erofs.driver import ErofsSnapshotter
from imgsvc.snapshot.interfaces import IDMapping, Key, Kind, Mount, Name, Snapshotter, Usage
from imgsvc.snapshot.mount import mount_all
from imgsvc.snapshot.native import NativeSnapshotter
from imgsvc.snapshot.overlay import UPPERDIR_LABEL, OverlayOptions, OverlaySnapshotter
from tests.snapshot import made_up
from tests.snapshot.bench import Bench
from tests.snapshot.conftest import bench
from tests.snapshot.layers import Entry, directory, link, symlink, tar
from tests.snapshot.test_equality import WAYS, laid

__all__ = ["bench"]

pytestmark = pytest.mark.root

K, K2, V = Key("active"), Key("other"), Key("view")
N, N2 = Name("sha256:one"), Name("sha256:two")
POD = IDMapping(((0, 100_000, 65536),), ((0, 200_000, 65536),))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[MetaDB]:
    opened = MetaDB(tmp_path / "db", sync=False)
    yield opened
    opened.close()


def make(driver: str, root: Path, db: MetaDB) -> Snapshotter:
    if driver == "native":
        return NativeSnapshotter(root / driver, db)
    if driver == "erofs":
        return ErofsSnapshotter(root / driver, db)
    return OverlaySnapshotter(root / "overlayfs", db, OverlayOptions(idmapped=driver == "overlayfs"))


@pytest.fixture(params=["overlayfs", "native", "erofs", "overlayfs without idmapped mounts"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def snapshotter(driver: str, tmp_path: Path, db: MetaDB) -> Iterator[Snapshotter]:
    made = make(driver, tmp_path, db)
    yield made
    made.close()
    unmount_below(tmp_path)  # images stay mounted for containers; one test moves a directory away


@contextmanager
def mounted(mounts: list[Mount], place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    mount_all(mounts, str(place))
    try:
        yield place
    finally:
        kernel.umount(place)


def layer(snapshotter: Snapshotter, name: Name, parent: Name | None, place: Path, **files: str) -> None:
    key = Key(f"making {name}")
    with mounted(snapshotter.prepare(key, parent), place) as root:
        for path, text in files.items():
            (root / path).write_text(text)
    snapshotter.commit(name, key)


def tree(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.iterdir()}


def test_what_is_absent_is_none_not_found_or_success(snapshotter: Snapshotter) -> None:
    assert snapshotter.stat("nothing") is None
    snapshotter.remove("nothing")
    for call in (snapshotter.usage, lambda key: snapshotter.mounts(Key(key)), lambda key: snapshotter.update(key, {})):
        with pytest.raises(NotFound):
            call("nothing")
    with pytest.raises(NotFound):
        snapshotter.commit(N, Key("nothing"))
    with pytest.raises(NotFound):
        snapshotter.prepare(K, Name("nothing"))
    assert list(snapshotter.walk()) == []


@pytest.mark.parametrize("key", ["", "x" * 500, "a\0b"])
def test_keys_are_checked(snapshotter: Snapshotter, key: str) -> None:
    with pytest.raises(InvalidArgument):
        snapshotter.prepare(Key(key), None)
    assert snapshotter.stat(key) is None


def test_a_child_sees_its_parents_and_changes_only_itself(snapshotter: Snapshotter, tmp_path: Path) -> None:
    layer(snapshotter, N, None, tmp_path / "m", a="1", b="1")
    layer(snapshotter, N2, N, tmp_path / "m", b="2", c="2")
    with mounted(snapshotter.prepare(K, N2), tmp_path / "m") as root:
        assert tree(root) == {"a": "1", "b": "2", "c": "2"}
        (root / "a").unlink()
        (root / "d").write_text("3")
    for parent, expected in ((N, {"a": "1", "b": "1"}), (N2, {"a": "1", "b": "2", "c": "2"})):
        with mounted(snapshotter.view(V, parent), tmp_path / "m") as root:
            assert tree(root) == expected
        snapshotter.remove(V)
    with mounted(snapshotter.mounts(K), tmp_path / "m") as root:
        assert tree(root) == {"b": "2", "c": "2", "d": "3"}


def test_a_view_cannot_be_written_to(snapshotter: Snapshotter, tmp_path: Path) -> None:
    layer(snapshotter, N, None, tmp_path / "m", a="1")
    layer(snapshotter, N2, N, tmp_path / "m", b="1")
    for parent in (None, N, N2):
        with mounted(snapshotter.view(V, parent), tmp_path / "m") as root, pytest.raises(OSError, match="Read-only"):
            (root / "x").touch()
        with pytest.raises(FailedPrecondition):
            snapshotter.commit(Name("x"), V)
        snapshotter.remove(V)


def test_keys_and_names_are_taken_once(snapshotter: Snapshotter) -> None:
    snapshotter.prepare(K, None)
    for take in (snapshotter.prepare, snapshotter.view):
        with pytest.raises(AlreadyExists):
            take(K, None)
    snapshotter.commit(N, K)
    assert snapshotter.stat(K) is None
    snapshotter.prepare(K, N)
    with pytest.raises(AlreadyExists):
        snapshotter.commit(N, K)
    assert snapshotter.stat(K) is not None
    with pytest.raises(FailedPrecondition):
        snapshotter.commit(N2, Key(N))
    with pytest.raises(NotFound):
        snapshotter.mounts(Key(N))


def test_only_committed_snapshots_are_parents(snapshotter: Snapshotter) -> None:
    snapshotter.prepare(K, None)
    with pytest.raises(FailedPrecondition):
        snapshotter.prepare(K2, Name(K))
    assert snapshotter.stat(K2) is None


def test_parents_stay_while_they_have_children(snapshotter: Snapshotter) -> None:
    snapshotter.prepare(K, None)
    snapshotter.commit(N, K)
    snapshotter.prepare(K, N)
    snapshotter.view(V, N)
    for key in (V, K):
        with pytest.raises(FailedPrecondition):
            snapshotter.remove(N)
        snapshotter.remove(key)
    snapshotter.remove(N)
    assert list(snapshotter.walk()) == []


def test_records_say_what_there_is(snapshotter: Snapshotter) -> None:
    snapshotter.prepare(K, None, {"a": "1", "b": "1"})
    snapshotter.commit(N, K, labels={"b": "2"})
    snapshotter.prepare(K, N)
    snapshotter.view(V, N)
    updated = snapshotter.update(N, {"a": None, "c": "3"})
    assert updated.labels == {"b": "2", "c": "3"}
    assert updated.updated_at >= updated.created_at
    found = {info.id: (info.kind, info.parent) for info in snapshotter.walk()}
    assert found == {N: (Kind.COMMITTED, None), K: (Kind.ACTIVE, N), V: (Kind.VIEW, N)}
    assert snapshotter.stat(N) == updated


def test_usage_is_recorded_on_commit_and_summed_up(snapshotter: Snapshotter, tmp_path: Path) -> None:
    layer(snapshotter, N, None, tmp_path / "m", a="x" * 10_000)
    measured = snapshotter.usage(N)
    assert measured.size >= 10_000
    assert measured.inodes == 2
    assert snapshotter.total_usage() == measured
    snapshotter.prepare(K, None)
    snapshotter.commit(N2, K, usage=Usage(5, 7))
    assert snapshotter.usage(N2) == Usage(5, 7)
    assert snapshotter.total_usage() == Usage(measured.size + 5, measured.inodes + 7)
    snapshotter.remove(N)
    assert snapshotter.total_usage() == Usage(5, 7)


def test_usage_of_an_active_snapshot_is_measured(snapshotter: Snapshotter, tmp_path: Path) -> None:
    with mounted(snapshotter.prepare(K, None), tmp_path / "m") as root:
        (root / "a").write_text("x" * 100_000)
        os.link(root / "a", root / "b")
    used = snapshotter.usage(K)
    assert 100_000 <= used.size < 140_000
    assert used.inodes == 2


def test_sync_takes_active_snapshots(snapshotter: Snapshotter) -> None:
    snapshotter.prepare(K, None)
    snapshotter.sync([K])
    snapshotter.sync([])


def test_everything_is_there_after_a_restart(snapshotter: Snapshotter, driver: str, tmp_path: Path, db: MetaDB) -> None:
    layer(snapshotter, N, None, tmp_path / "m", a="1")
    snapshotter.prepare(K, N)
    snapshotter.close()
    again = make(driver, tmp_path, db)
    assert again.cleanup() == 0
    with mounted(again.mounts(K), tmp_path / "m") as root:
        assert tree(root) == {"a": "1"}
    again.close()


def test_cleanup_drops_what_is_without_its_other_half(snapshotter: Snapshotter, driver: str, tmp_path: Path, db: MetaDB) -> None:
    layer(snapshotter, N, None, tmp_path / "m", a="1")
    layer(snapshotter, N2, N, tmp_path / "m", b="1")
    root = tmp_path / snapshotter.name
    (root / "999").mkdir()
    numbers = sorted((p for p in root.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    os.rename(numbers[0], tmp_path / "lost")
    assert snapshotter.cleanup() == 1  # the one nobody knew; something stands on the record without a directory
    assert snapshotter.stat(N) is None
    os.rename(numbers[1], tmp_path / "lost, too")
    assert snapshotter.cleanup() == 2
    assert list(snapshotter.walk()) == []
    assert snapshotter.total_usage() == Usage(0, 0)
    snapshotter.close()
    assert [p.name for p in root.iterdir()] == ["trash"]
    assert list((root / "trash").iterdir()) == []


def test_removing_a_large_tree_is_quick_and_happens_behind(snapshotter: Snapshotter, tmp_path: Path) -> None:
    with mounted(snapshotter.prepare(K, None), tmp_path / "m") as root:
        for number in range(300):
            (root / f"d{number}").mkdir()
            for each in range(30):
                (root / f"d{number}" / f"f{each}").touch()
        deep = root
        for _ in range(400):
            deep = deep / "deep"
            deep.mkdir()
    started = time.thread_time()
    snapshotter.remove(K)
    assert time.thread_time() - started < 0.05  # seconds of this thread, whatever else runs: deleting 10 000 names takes ten times that
    assert snapshotter.stat(K) is None
    snapshotter.close()
    left = tmp_path / snapshotter.name / "trash"
    assert list(left.iterdir()) == []


def test_what_was_left_in_the_trash_goes_at_the_next_start(driver: str, tmp_path: Path, db: MetaDB) -> None:
    name = driver.partition(" ")[0]
    left = tmp_path / name / "trash/7/fs"
    left.mkdir(parents=True)
    (left / "f").touch()
    started = make(driver, tmp_path, db)
    started.close()
    assert not (tmp_path / name / "trash/7").exists()


def test_many_threads_prepare_and_remove_at_once(snapshotter: Snapshotter) -> None:
    snapshotter.prepare(K, None)
    snapshotter.commit(N, K)
    failed: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for number in range(10):
                key = Key(f"{thread}-{number}")
                snapshotter.prepare(key, N)
                snapshotter.remove(key)
        except BaseException as error:  # noqa: BLE001  # reported by the assertion
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    snapshotter.remove(N)


def test_owners_are_shifted_for_a_user_namespace(snapshotter: Snapshotter, tmp_path: Path) -> None:
    with mounted(snapshotter.prepare(K, None), tmp_path / "m") as root:
        (root / "own").write_text("x")
        os.chown(root / "own", 5, 6)
        (root / "suid").write_text("x")
        (root / "suid").chmod(0o4755)
    snapshotter.commit(N, K)
    layer(snapshotter, N2, N, tmp_path / "m", more="x")
    for number, parent in enumerate((N, N2, None)):
        key = Key(f"pod-{number}")
        with mounted(snapshotter.prepare(key, parent, mapping=POD), tmp_path / "m") as root:
            assert (root.stat().st_uid, root.stat().st_gid) == (100_000, 200_000)
            (root / "new").write_text("x")
            os.chown(root / "new", 100_001, 200_001)
            if parent is not None:
                assert ((root / "own").stat().st_uid, (root / "own").stat().st_gid) == (100_005, 200_006)
                assert (root / "suid").stat().st_mode & 0o7777 == 0o4755
                (root / "own").write_text("changed")
                assert (root / "own").stat().st_uid == 100_005
        with mounted(snapshotter.mounts(key), tmp_path / "m") as root:
            assert (root / "new").stat().st_uid == 100_001
    with mounted(snapshotter.view(V, N), tmp_path / "m") as root:
        assert (root / "own").stat().st_uid == 5


def test_a_snapshot_is_shown_on_parents_it_was_not_prepared_with(snapshotter: Snapshotter, tmp_path: Path) -> None:
    keys = [Key(f"k{number}") for number in range(3)]
    own = [snapshotter.prepare(key, None) for key in keys]
    for key, mounts in zip(keys, own, strict=True):
        with mounted(mounts, tmp_path / "m") as root:
            (root / key).write_text("x")
    if not snapshotter.parallel:
        with pytest.raises(InvalidArgument):
            snapshotter.stacked(own[1], own[0])
        snapshotter.commit(N, keys[0])
        with pytest.raises(InvalidArgument):
            snapshotter.mounts(keys[1], parent=N)
        return
    both = snapshotter.stacked(own[1], own[0])
    all_three = snapshotter.stacked(own[2], both)
    with mounted(all_three, tmp_path / "m") as root:
        assert set(tree(root)) == set(keys)
        (root / "new").write_text("x")
    with mounted(both, tmp_path / "m") as root:
        assert set(tree(root)) == set(keys[:2])
    with pytest.raises(FailedPrecondition):
        snapshotter.stacked(both, own[2])
    snapshotter.commit(N, keys[0])
    snapshotter.commit(N2, keys[1], parent=N)
    if not isinstance(snapshotter, ErofsSnapshotter):
        assert snapshotter.mounts(keys[2], parent=N2) == all_three, "committing changes nothing about where files are"
    with mounted(snapshotter.mounts(keys[2], parent=N2), tmp_path / "m") as root:
        assert set(tree(root)) == {*keys, "new"}
    snapshotter.prepare(K, N)
    with pytest.raises(FailedPrecondition):
        snapshotter.mounts(K, parent=N2)
    snapshotter.remove(K)
    with pytest.raises(FailedPrecondition):
        snapshotter.remove(N)
    info = snapshotter.stat(N2)
    assert info is not None
    assert info.parent == N


def test_a_hundred_layers_can_be_mounted(snapshotter: Snapshotter, tmp_path: Path) -> None:
    """More than fits into the page that mount(2) takes."""
    parent: Name | None = None
    for number in range(110):
        key = Key(f"layer-{number}")
        source = Path(snapshotter.prepare(key, None)[0].source)
        (source / f"f{number}").touch()
        name = Name(f"name-{number}")
        if not snapshotter.parallel:
            return  # copies do not stack
        snapshotter.commit(name, key, parent=parent)
        parent = name
    deep = snapshotter.prepare(K, parent)
    assert len(",".join(deep[0].options)) > 4096 or snapshotter.name == "erofs"  # which has one mount below
    with mounted(deep, tmp_path / "m") as root:
        assert len(list(root.iterdir())) == 110
    with mounted(snapshotter.prepare(K2, parent, mapping=POD), tmp_path / "m") as root:
        assert (root / "f0").stat().st_uid == 100_000


def test_upperdir_label_and_mount_options_are_containerds(tmp_path: Path, db: MetaDB) -> None:
    made = OverlaySnapshotter(tmp_path / "overlayfs", db, OverlayOptions(("volatile",), upperdir_label=True, sync_remove=True))
    made.prepare(K, None)
    made.commit(N, K)
    (mount,) = made.prepare(K, N)
    assert "volatile" in mount.options
    assert "index=off" in mount.options
    info = made.stat(K)
    assert info is not None
    assert f"upperdir={info.labels[UPPERDIR_LABEL]}" in mount.options
    made.remove(K)
    assert not list((tmp_path / "overlayfs/trash").iterdir())
    made.close()


def test_a_root_that_overlayfs_cannot_take_is_refused(tmp_path: Path, db: MetaDB) -> None:
    with pytest.raises(InvalidArgument):
        OverlaySnapshotter(tmp_path / "a:b", db)


def test_detection_tries_the_kernel(tmp_path: Path, db: MetaDB) -> None:
    found = detect(tmp_path / "here")
    assert found.driver == "overlayfs"
    assert found.options is not None
    assert list((tmp_path / "here").iterdir()) == []
    snapshotter = OverlaySnapshotter(tmp_path / "overlayfs", db, found.options)
    layer(snapshotter, N, None, tmp_path / "m", a="1")
    with mounted(snapshotter.prepare(K, N), tmp_path / "m") as root:
        assert tree(root) == {"a": "1"}
    snapshotter.close()


def test_detection_says_why_not(tmp_path: Path) -> None:
    found = detect(tmp_path / "with,comma")  # mount options cannot spell it
    assert found.driver == "native"
    assert found.options is None
    assert "overlayfs is not usable" in found.reason


LAYERS = {
    "a link that is replaced led to nothing": [[link("link", "nowhere"), Entry("link")]],
    "a link that a directory replaces led to nothing": [[link("a/link", "nowhere"), Entry("a")]],
    "a path through a file that is replaced later": [[Entry("a")], [Entry("a/b"), Entry("a")]],
    "a path through a file that is hidden later": [[Entry("a")], [Entry("a/b"), Entry(".wh..wh..opq")]],
    "a marker below a file": [[Entry("a")], [Entry("a/.wh.b"), Entry("c")]],
    "a path through a link, and the root's own time": [[directory("./", 0o711), symlink("a", "b"), directory("b")], [directory("a/c")]],
    "an opaque root without an entry": [[directory("./", 0o711), Entry("a")], [Entry(".wh..wh..opq"), Entry("b/c")]],
    "a directory that is hidden and implied again": [[directory("a", 0o700), Entry("a/b")], [Entry("a/c"), Entry(".wh.a")]],
}


@pytest.mark.parametrize("made", [*LAYERS.values(), *map(made_up.image, range(25))], ids=[*LAYERS, *map(str, range(25))])
def test_S17_all_drivers_make_the_same_tree_of_an_image_or_none_does(bench: Bench, made: list[list[Entry]]) -> None:
    """Beside one another on overlayfs, in order on overlayfs, in order on native; times of all directories included."""

    def outcome(way: str) -> object:
        try:
            return laid(bench, [tar(entries) for entries in made], way)
        except InvalidArgument:
            return "refused"

    found = {way: outcome(way) for way in WAYS}
    assert {way: tree for way, tree in found.items() if tree != found["native"]} == {}
