"""`imgsvc fsck --root DIR`: checking a store on which no daemon runs, also one whose metadata cannot be read.

Records that cannot be parsed are forgotten when repairing, and a database that cannot be opened is set aside. Image
records are lost, so images must be pulled again. Blobs whose digest still matches are kept, so that little of
that goes over the network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import DataLoss, NotFound, Unimplemented
from imgsvc.base.metadb.database import MetaDB, set_aside
from imgsvc.content.local import LocalStore
from imgsvc.images.records import ImageStore
from imgsvc.images.upkeep.fsck import (
    Checker,
    ContentChecker,
    Finding,
    FsckReport,
    ImageChecker,
    LayerChecker,
    MetadataChecker,
    fsck,
    recover,
)
from imgsvc.snapshot import native, overlay
from imgsvc.snapshot.erofs import driver as erofs
from imgsvc.snapshot.interfaces import Name, ScrubbableSnapshotter

METADATA = "metadata"  # below the root


def check_offline(root: Path, *, deep: bool, repair: bool) -> FsckReport:
    """Check, and repair if asked, the store below `root`. Blocking.

    Raises: NotFound (no store there), FailedPrecondition (a daemon runs on it, or it is a newer one's), ResourceExhausted.
    """
    if not (root / METADATA).is_dir():
        raise NotFound("there is no store", where=str(root), hint="name the daemon's root with --root")
    lost: list[Finding] = []
    with ExitStack() as stack:
        try:
            db = MetaDB(root / METADATA)
        except DataLoss as error:
            if not repair:
                return FsckReport((Finding("metadata", str(root / METADATA), error.what),), 0.0)
            aside = set_aside(root / METADATA)
            lost.append(Finding("metadata", str(root / METADATA), error.what, f"set aside as {aside.name}; pull the images again"))
            db = MetaDB(root / METADATA)
        stack.callback(db.close)
        lost += MetadataChecker(db).check(deep=deep, repair=repair, cancel=CancelToken())
        if not all(finding.repaired for finding in lost):
            return FsckReport(tuple(lost), 0.0)  # the rest is read record by record
        images, content, drivers, findings = _open(root, db, stack)
        checkers: list[Checker] = [
            ContentChecker(content),
            LayerChecker(drivers, _cannot_compare),
            ImageChecker(images, content, drivers),
        ]
        report = fsck(checkers, deep=deep, repair=repair, cancel=CancelToken())
    return FsckReport((*lost, *findings, *report.findings), report.seconds)


def _open(root: Path, db: MetaDB, stack: ExitStack) -> tuple[ImageStore, LocalStore, list[ScrubbableSnapshotter], Iterable[Finding]]:
    """What a daemon would find, after the repair that every daemon's start does."""
    images = ImageStore(db)
    content = LocalStore(root, db, sync=True)
    findings = recover(content, db.last_end, budget=sys.float_info.max)
    makers = {overlay.NAME: overlay.OverlaySnapshotter, erofs.NAME: erofs.ErofsSnapshotter, native.NAME: native.NativeSnapshotter}
    drivers: list[ScrubbableSnapshotter] = []
    for name, make in makers.items():
        if (root / "snapshots" / name).is_dir():
            drivers.append(make(root / "snapshots" / name, db))
            stack.callback(drivers[-1].close)
    return images, content, drivers, findings


def _cannot_compare(_snapshotter: str, _name: Name, _cancel: CancelToken) -> str:
    raise Unimplemented("comparing layers needs a running daemon")
