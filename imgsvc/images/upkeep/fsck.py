"""Checking and repairing the store: after an unclean end, and when an administrator asks.

Repairing means forgetting: a broken blob or layer loses its record, so that the next pull fetches it. Nothing is ever
made up. Each part of the store is one Checker, over its interface.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import Cancelled, FailedPrecondition, ImgsvcError
from imgsvc.base.failpoints import failpoint
from imgsvc.base.metadb.database import LastEnd
from imgsvc.base.oci import Digest
from imgsvc.content.interfaces import Fault, Manager, Provider, Scrubbable
from imgsvc.content.verify import wrong_size
from imgsvc.images.records import Image
from imgsvc.snapshot.interfaces import Kind, Name, ScrubbableLayers, SnapshotInfo, Snapshotter

RECOVERY_BUDGET: Final = 10.0  # [s] of hashing before the socket answers; what is left waits for `imgsvc fsck --repair`


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, or one object that was not checked (broken is false then).

    repaired: done about it, "" when nothing was.
    """

    kind: str
    id: str
    problem: str
    repaired: str = ""
    broken: bool = True

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
        return all(finding.repaired or not finding.broken for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For `imgsvc fsck --json`."""
        return {"clean": self.clean, "findings": [asdict(finding) for finding in self.findings], "seconds": round(self.seconds, 3)}


class Checker(Protocol):
    """Checks one part of the store."""

    def check(self, *, deep: bool, repair: bool, cancel: CancelToken) -> Iterable[Finding]:
        """Blocking. deep: read everything. Raises: Cancelled; ImgsvcError and OSError when it cannot go on."""


class Blobs(Manager, Scrubbable, Protocol):
    """What checking content needs of a store."""


class Metadata(Protocol):
    """What checking the metadata database needs of it."""

    def scrub(self, *, repair: bool) -> list[str]:
        """Names of the records that cannot be parsed. repair: forget them."""


class MetadataChecker:
    """Records that cannot be read. Run it first: what forgetting them leaves behind is for the others to find."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def check(self, *, deep: bool, repair: bool, cancel: CancelToken) -> Iterator[Finding]:
        """See Checker."""
        for name in self._metadata.scrub(repair=repair):
            yield Finding("metadata", name, "the record cannot be parsed", "forgotten" if repair else "")


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
        def mend() -> str:
            self._content.delete(digest)
            return "forgotten, the next pull fetches it"

        return _mended("blob", digest, fault, mend if repair else None)

    def _stray(self, digest: Digest, repair: bool, cancel: CancelToken) -> Finding:
        def mend() -> str:
            return "verified and recorded" if self._content.adopt(digest, cancel) else "deleted, its bytes are not what its name says"

        return _mended("blob", digest, Fault.STRAY, mend if repair else None)


def _mended(kind: str, name: str, problem: str, mend: Callable[[], str] | None) -> Finding:
    """A finding about what is broken, after `mend` did what it says. That failing is part of the finding, and ends nothing else."""
    try:
        return Finding(kind, name, problem, mend() if mend else "")
    except (Cancelled, FailedPrecondition):
        raise
    except ImgsvcError as error:
        return Finding(kind, name, f"{problem}; not repaired: {error}")


Compare = Callable[[str, Name, CancelToken], str]  # (snapshotter, layer) → how its files differ from its blob, "" if they do not


class LayerChecker:
    """Directories of layers against their records and, when deep, their files against the blobs they came from."""

    def __init__(self, snapshotters: Iterable[ScrubbableLayers], compare: Compare) -> None:
        """compare: blocking; raises ImgsvcError, NotFound among them, when it cannot be done."""
        self._snapshotters = list(snapshotters)
        self._compare = compare

    def check(self, *, deep: bool, repair: bool, cancel: CancelToken) -> Iterator[Finding]:
        """See Checker. A layer on top of a broken one is not compared: it cannot be unpacked again."""
        for snapshotter in self._snapshotters:
            broken: set[Name | None] = set()
            for name, parent in _parents_first(snapshotter.walk()):
                cancel.check()
                label = f"{snapshotter.name}/{name}"
                problem: str = snapshotter.check(name) or ""
                if deep and not problem and parent not in broken:
                    try:
                        problem = self._compare(snapshotter.name, name, cancel)
                    except Cancelled:
                        raise
                    except ImgsvcError as error:
                        yield Finding("layer", label, f"not compared with its blob: {error}", broken=False)
                if problem or parent in broken:
                    broken.add(name)
                if problem:
                    yield self._broken(snapshotter, name, problem, repair)
            for directory in snapshotter.strays():
                yield self._stray(snapshotter, directory, repair)

    def _broken(self, snapshotter: ScrubbableLayers, name: Name, problem: str, repair: bool) -> Finding:
        def mend() -> str:
            gone = snapshotter.forget(name)
            return "forgotten" + (f" with {len(gone) - 1} on top of it" if len(gone) > 1 else "") + ", the next pull unpacks it"

        label = f"{snapshotter.name}/{name}"
        try:
            return _mended("layer", label, problem, mend if repair else None)
        except FailedPrecondition as error:
            return Finding("layer", label, f"{problem}; it stays because {error.what}")

    def _stray(self, snapshotter: ScrubbableLayers, directory: str, repair: bool) -> Finding:
        def mend() -> str:
            snapshotter.discard_stray(directory)
            return "deleted"

        return _mended("layer", f"{snapshotter.name}/{directory}", "a directory without a record", mend if repair else None)


def _parents_first(snapshots: Iterable[SnapshotInfo]) -> Iterator[tuple[Name, Name | None]]:
    """(name, parent) of the committed ones."""
    on_top: dict[Name | None, list[Name]] = {}
    committed = {Name(info.id): info.parent for info in snapshots if info.kind is Kind.COMMITTED}
    for name, parent in committed.items():
        on_top.setdefault(parent if parent in committed else None, []).append(name)
    todo = on_top.get(None, [])[::-1]
    while todo:
        name = todo.pop()
        yield name, committed[name]
        todo += on_top.get(name, [])


class Images(Protocol):
    """What checking images needs of their records."""

    unusable: dict[str, str]

    def all(self) -> list[Image]:
        """Every image."""

    def forget_unusable(self, image_id: str) -> None:
        """Delete a record that is in `unusable`."""


class ImageChecker:
    """Image records, and the blobs and layers they name. Only pulling repairs an image; a record of none is deleted."""

    def __init__(self, images: Images, content: Provider, snapshotters: Sequence[Snapshotter]) -> None:
        self._store = images
        self._images = images.all()
        self._content = content
        self._snapshotters = snapshotters

    def check(self, *, deep: bool, repair: bool, cancel: CancelToken) -> Iterator[Finding]:
        """See Checker. Run it after those for content and snapshots, whose repairs it sees."""
        for image_id, reason in list(self._store.unusable.items()):
            yield self._unusable(image_id, reason, repair)
        for image in self._images:
            cancel.check()
            name = next(iter(image.names), image.image_id)
            for digest in image.documents:
                if self._content.info(digest) is None:
                    yield Finding("image", name, f"its document {digest} is not here; pull it again")
            for descriptor in (image.manifest, *(layer.descriptor for layer in image.layers)):
                if problem := wrong_size(self._content, descriptor):
                    yield Finding("image", name, f"{problem}; remove the image, then pull it again")
            for layer in () if image.artifact else image.layers:
                if layer.snapshot and not any(s.stat(layer.snapshot) for s in self._snapshotters):
                    yield Finding("image", name, f"its layer {layer.snapshot} is not unpacked; pull it again")

    def _unusable(self, image_id: str, reason: str, repair: bool) -> Finding:
        def mend() -> str:
            self._store.forget_unusable(image_id)
            return "forgotten; pull the image again"

        return _mended("image", image_id, f"its record cannot be used ({reason})", mend if repair else None)


def fsck(checkers: Iterable[Checker], *, deep: bool, repair: bool, cancel: CancelToken) -> FsckReport:
    """Run all; what one cannot read keeps none of the others from running. Blocking: as long as reading the store takes when deep.

    Raises: Cancelled.
    """
    began = time.monotonic()
    findings: list[Finding] = []
    for checker in checkers:
        try:
            findings.extend(checker.check(deep=deep, repair=repair, cancel=cancel))
        except Cancelled:
            raise
        except (ImgsvcError, OSError) as error:
            findings.append(Finding("store", "", f"not checked to the end: {error}"))
    return FsckReport(tuple(findings), time.monotonic() - began)


class RecoverableBlobs(Blobs, Protocol):
    """What recovery needs of a content store."""

    def clean_ingests(self) -> list[str]:
        """Remove unfinished writes that cannot be resumed; returns their names."""


def recover(content: RecoverableBlobs, last_end: LastEnd, *, budget: float = RECOVERY_BUDGET) -> list[Finding]:
    """After an unclean end, make the content store match its records, before the first request is served. Blocking.

    Costs one stat per blob, and hashing of what a kill left half recorded or a power cut touched, up to `budget` [s].
    What does not fit into it is neither visible nor lost. Returns what was done, for the log.
    """
    if last_end is LastEnd.CLEAN:
        return []
    failpoint("content.recover")
    findings = [Finding("ingest", name, "it cannot be resumed", "deleted") for name in content.clean_ingests()]
    deadline = CancelToken()
    timer = threading.Timer(min(budget, threading.TIMEOUT_MAX), deadline.cancel)
    timer.daemon = True
    timer.start()
    try:
        findings.extend(ContentChecker(content).check(deep=False, repair=True, cancel=deadline))
    except Cancelled:
        findings.append(Finding("content", "", f"not everything was checked within {budget:g} s; run `imgsvc fsck --repair`"))
    finally:
        timer.cancel()
    return findings
