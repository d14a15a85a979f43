"""Checking and repairing the store: after an unclean end, and when an administrator asks.

Repairing means forgetting: a broken blob or layer loses its record, so that the next pull fetches it. Nothing is ever
made up. Each part of the store is one Checker; this module has those for content and images, over their interfaces.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from imgsvc.concurrency import CancelToken
from imgsvc.content.interfaces import Fault, Manager, Provider, Scrubber
from imgsvc.errors import Cancelled
from imgsvc.failpoints import failpoint
from imgsvc.images import Image
from imgsvc.metadb import LastEnd
from imgsvc.oci import Digest
from imgsvc.snapshot.interfaces import Snapshotter

RECOVERY_BUDGET: Final = 10.0  # [s] of hashing before the socket answers; what is left waits for `imgsvc fsck --repair`


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. repaired: done about it, "" when nothing was."""

    kind: str
    id: str
    problem: str
    repaired: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.id}: {self.problem}" + (f", {self.repaired}" if self.repaired else "")


@dataclass(frozen=True, slots=True)
class FsckReport:
    """A whole check. seconds: how long it took."""

    findings: tuple[Finding, ...]
    seconds: float

    @property
    def clean(self) -> bool:
        """Nothing is broken (any more)."""
        return all(finding.repaired for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For `imgsvc fsck --json`."""
        return {"clean": self.clean, "findings": [asdict(finding) for finding in self.findings], "seconds": round(self.seconds, 3)}


class Checker(Protocol):
    """Checks one part of the store."""

    def check(self, *, deep: bool, repair: bool, cancel: CancelToken) -> Iterable[Finding]:
        """Blocking. deep: read everything. Raises: Cancelled, ImgsvcError."""


class Blobs(Manager, Scrubber, Protocol):
    """What checking content needs of a store."""


class ContentChecker:
    """Blobs against their digests, files against records."""

    def __init__(self, content: Blobs) -> None:
        self._content = content

    def check(self, *, deep: bool, repair: bool, cancel: CancelToken) -> Iterator[Finding]:
        """See Checker."""
        for info in self._content.walk():
            cancel.check()
            fault = self._content.check(info.digest, deep=deep, cancel=cancel)
            if fault is not None:
                yield self._broken(info.digest, fault, repair)
        for digest in self._content.strays():
            cancel.check()
            yield self._stray(digest, repair, cancel)

    def _broken(self, digest: Digest, fault: Fault, repair: bool) -> Finding:
        if repair:
            self._content.delete(digest)
        return Finding("blob", digest, fault, "forgotten, the next pull fetches it" if repair else "")

    def _stray(self, digest: Digest, repair: bool, cancel: CancelToken) -> Finding:
        done = ""
        if repair:
            done = "verified and recorded" if self._content.adopt(digest, cancel) else "deleted, its bytes are not what its name says"
        return Finding("blob", digest, Fault.STRAY, done)


class ImageChecker:
    """Images against the blobs and layers they name. Only pulling repairs them."""

    def __init__(self, images: Sequence[Image], content: Provider, snapshotters: Sequence[Snapshotter]) -> None:
        self._images = images
        self._content = content
        self._snapshotters = snapshotters

    def check(self, *, deep: bool, repair: bool, cancel: CancelToken) -> Iterator[Finding]:
        """See Checker. Run it after those for content and snapshots, whose repairs it sees."""
        for image in self._images:
            cancel.check()
            name = next(iter(image.names), image.image_id)
            for digest in image.documents:
                if self._content.info(digest) is None:
                    yield Finding("image", name, f"its document {digest} is not here; pull it again")
            for layer in () if image.artifact else image.layers:
                if layer.snapshot and not any(s.stat(layer.snapshot) for s in self._snapshotters):
                    yield Finding("image", name, f"its layer {layer.snapshot} is not unpacked; pull it again")


def fsck(checkers: Iterable[Checker], *, deep: bool, repair: bool, cancel: CancelToken) -> FsckReport:
    """Run all. Blocking: as long as reading the store takes when deep. Raises: Cancelled, ImgsvcError."""
    began = time.monotonic()
    findings = tuple(finding for checker in checkers for finding in checker.check(deep=deep, repair=repair, cancel=cancel))
    return FsckReport(findings, time.monotonic() - began)


class RecoverableBlobs(Blobs, Protocol):
    """What recovery needs of a content store."""

    def clean_ingests(self) -> list[str]:
        """Remove unfinished writes that cannot be resumed; returns their names."""


def recover(content: RecoverableBlobs, last_end: LastEnd, *, budget: float = RECOVERY_BUDGET) -> list[Finding]:
    """After an unclean end, make the content store what its records say, before anybody is served. Blocking.

    Costs one stat per blob, and hashing of what a kill left half recorded or a power cut touched, up to `budget` [s].
    What does not fit into it is neither visible nor lost. Returns what was done, for the log.
    """
    if last_end is LastEnd.CLEAN:
        return []
    failpoint("content.recover")
    findings = [Finding("ingest", name, "it cannot be resumed", "deleted") for name in content.clean_ingests()]
    deadline = CancelToken()
    timer = threading.Timer(budget, deadline.cancel)
    timer.daemon = True
    timer.start()
    try:
        findings.extend(ContentChecker(content).check(deep=False, repair=True, cancel=deadline))
    except Cancelled:
        findings.append(Finding("content", "", f"not everything was checked within {budget:g} s; run `imgsvc fsck --repair`"))
    finally:
        timer.cancel()
    return findings
