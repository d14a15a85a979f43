"""A node's store as it lies on disk, read without any of its code: records by lmdb alone, layers mounted by mount(8)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb

from tests.snapshot.trees import Reference, read_tree


class Disk:
    """What is below a daemon's --root, whether a daemon runs on it or not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers = root / "snapshots" / "overlayfs"

    def records(self, table: str, prefix: str = "") -> dict[str, dict[str, Any]]:
        """One table, by key without `prefix`."""
        with lmdb.open(str(self.root / "metadata"), readonly=True, lock=False, max_dbs=20) as env:
            database = env.open_db(table.encode(), create=False)
            with env.begin(db=database) as txn:
                found = {bytes(key).decode(): json.loads(bytes(value)) for key, value in txn.cursor()}
        return {key.removeprefix(prefix): record for key, record in found.items() if key.startswith(prefix)}

    def images(self) -> dict[str, dict[str, Any]]:
        """By name; each name once."""
        found = {}
        for record in self.records("images").values():
            found.update(dict.fromkeys((*record["repo_tags"], *record["repo_digests"]), record))
        return found

    def snapshots(self) -> dict[str, dict[str, Any]]:
        """By key or name."""
        return self.records("snapshots", "overlayfs/")

    def blobs(self) -> set[str]:
        """Digests of the files that are there, recorded or not."""
        return {f"sha256:{path.name}" for path in (self.root / "content" / "blobs" / "sha256").iterdir()}

    def ingests(self) -> list[dict[str, Any]]:
        """Records of unfinished writes; a directory without one is an empty record."""
        found = []
        for directory in (self.root / "content" / "ingest").iterdir():
            record = directory / "record"
            found.append(json.loads(record.read_text()) if record.exists() else {})
        return found

    def directories(self) -> set[int]:
        """Numbers of the snapshot directories that are in sight."""
        return {int(path.name) for path in self.layers.iterdir() if path.name.isdigit()}

    def layer_directory(self, name: str) -> Path:
        """Where the files of one snapshot are."""
        return self.layers / str(self.snapshots()[name]["number"]) / "fs"

    @contextlib.contextmanager
    def mounted(self, image: Mapping[str, Any]) -> Iterator[Path]:
        """An image's layers, as the kernel shows them to a container."""
        directories = [self.layer_directory(layer["snapshot"]) for layer in reversed(image["layers"])]
        with tempfile.TemporaryDirectory(prefix="imgsvc-", dir="/tmp") as place:
            lower = ":".join(map(str, directories))
            options = ["--bind", lower] if len(directories) == 1 else ["-t", "overlay", "-o", f"ro,lowerdir={lower}", "overlay"]
            subprocess.run(["mount", *options, place], check=True, timeout=20)
            try:
                yield Path(place)
            finally:
                subprocess.run(["umount", place], check=True, timeout=20)


class Expected:
    """What an image of these layers (plain tars) has to look like, by GNU tar."""

    def __init__(self, directory: Path, layers: Sequence[bytes]) -> None:
        reference = Reference(directory)
        for layer in layers:
            reference.apply(layer)
        self._unowned = frozenset(reference.unowned_times)
        self._tree = read_tree(reference.root, unowned_times=self._unowned)

    def check(self, disk: Disk, image: Mapping[str, Any]) -> None:
        """Raises: AssertionError with the names that differ."""
        with disk.mounted(image) as root:
            found = read_tree(root, unowned_times=self._unowned)
        assert found == self._tree, sorted(n for n in found.keys() | self._tree.keys() if found.get(n) != self._tree.get(n))
