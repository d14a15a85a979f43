"""Images that are really in a store, made without a registry: blobs, snapshots and a record each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.oci import OCI_MANIFEST, Descriptor, Digest, ImageConfig, Platform
from imgsvc.content.interfaces import Store
from imgsvc.content.local import LocalStore
from imgsvc.images.records import Image, ImageStore, Layer
from imgsvc.snapshot.interfaces import Key, Name, Usage
from imgsvc.snapshot.native import NativeSnapshotter

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


class Stored:
    """A node's stores on a root of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.db = MetaDB(root / "meta", sync=False)
        self.content = LocalStore(root, self.db, sync=False)
        self.snapshotter = NativeSnapshotter(root / "snapshots" / "native", self.db, sync_remove=True)
        self.images = ImageStore(self.db)

    def close(self) -> None:
        self.snapshotter.close()
        self.db.close()

    def add(self, name: str, layers: Sequence[str], *, artifact: bool = False) -> Image:
        """An image of `layers`, base first; equal text is the same layer. Each blob is the text a hundred times."""
        manifest, config = self.put(f"manifest {name} "), self.put(f"config {name} ")
        stored, parent = [], None
        for text in layers:
            blob = self.put(text)
            parent = None if artifact else self.unpack(text, parent)
            stored.append(Layer(Descriptor(LAYER_TYPE, blob, len(text) * 100), blob, parent or ""))
        image = Image(
            image_id=config,
            manifest=Descriptor(OCI_MANIFEST, manifest, len(f"manifest {name} ") * 100),
            config=ImageConfig(platform=Platform.host(), diff_ids=()),
            layers=tuple(stored),
            documents=(manifest, config),
            size=1,
            created_at=0,
            artifact=artifact,
        )
        return asyncio.run(self.images.add(image, f"docker.io/library/{name}:1", ""))

    def put(self, text: str) -> Digest:
        return put_blob(self.content, text.encode() * 100)

    def unpack(self, text: str, parent: Name | None) -> Name:
        name = Name(Digest.of(f"{parent} {text}".encode()))
        if self.snapshotter.stat(name) is None:
            self.snapshotter.prepare(Key(f"unpack-{name}"), parent)
            self.snapshotter.commit(name, Key(f"unpack-{name}"), usage=Usage(1000, 2))
        return name


def put_blob(store: Store, data: bytes) -> Digest:
    """Store some bytes."""
    digest = Digest.of(data)
    writer = store.writer(f"put-{digest}", total=len(data), expected=digest)
    try:
        writer.write(data)
        writer.commit(len(data), digest)
    finally:
        writer.close()
    return digest
