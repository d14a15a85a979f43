"""Named points at which a test can stop, fail or slow the program. Nothing is armed unless a test says so.

Entry points (daemon, unpack worker) call `arm(os.environ.get(ENV, ""))` once; the text lists points separated by ";"::

    IMGSVC_FAILPOINTS="content.commit.renamed=kill; metadb.commit=error:ENOSPC*2; gc.remove=delay:50; content.write=kill@3"

    kill         SIGKILL to this process: what is on disk now is what the next start finds
    error[:NAME] raise OSError with that errno name (EIO when left out), as the operating system would
    delay:MS     wait, to widen a race [ms]
    *COUNT       act that many times, then never again (default: always)     @HIT  first act at this hit (default: 1)

POINTS is the registry: a name that is not in it cannot be armed or used (tests/base/test_failpoints.py compares it with the
source), so a crash test that walks over it reaches every point there is.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from typing import Final

from imgsvc.base.errors import InvalidArgument

log = logging.getLogger(__name__)

ENV: Final = "IMGSVC_FAILPOINTS"

# name: what is true at that point
POINTS: Final[dict[str, str]] = {
    "content.ingest.created": "the ingest directory exists, its record does not",
    "content.ingest.recorded": "the ingest's record exists, no byte of it does",
    "content.write": "about to write a chunk",
    "content.written": "a chunk is in the file, the journal does not know it",
    "content.journaled": "a chunk is in the file and in the journal",
    "content.truncate": "about to cut an ingest",
    "content.commit": "all bytes are there, nothing is checked",
    "content.commit.checked": "size and digest are right, nothing is synced",
    "content.commit.synced": "the bytes are on disk, in the ingest directory",
    "content.commit.renamed": "the blob has its final name, the directory is not synced",
    "content.commit.dirsynced": "the blob is on disk under its final name, without a record",
    "content.commit.recorded": "the blob is visible, its ingest directory is left over",
    "content.abort": "about to drop an ingest",
    "content.update": "about to change labels",
    "content.delete": "about to delete a blob",
    "content.delete.forgotten": "the record is gone, the bytes are there",
    "content.delete.unlinked": "record and bytes are gone",
    "content.recover": "about to repair the content store after an unclean end",
    "content.adopt": "a blob without a record is verified, about to be recorded",
    "metadb.opened": "the database is open, its format is not checked",
    "metadb.migrate": "inside the migration's transaction",
    "metadb.commit": "changes are made in the transaction, which is not committed",
    "metadb.committed": "the transaction is on disk, its caller does not know yet",
    "metadb.close": "about to take the mark of an unclean end away",
    "lease.create": "about to create a lease",
    "lease.add": "about to add resources to a lease",
    "lease.delete": "about to delete a lease",
    "lease.expire": "leases have expired, their records are there",
    "gc.mark": "about to mark",
    "gc.marked": "marked, nothing removed",
    "gc.remove": "about to remove one thing",
    "gc.removed": "one thing is removed",
    "gc.slice": "between two slices of a sweep",
    "gc.evict": "about to choose cached blobs to give up",
    "pull.resolved": "the registry answered, nothing is on disk",
    "pull.documents": "index, manifest and config are stored, no layer is",
    "pull.layers": "every layer is committed, the image has no name",
    "layer.prepared": "an active snapshot for a layer exists, nothing is in it",
    "layer.downloaded": "all bytes of a layer arrived, the blob is not committed",
    "layer.unpacked": "a layer's files are there, those below it are as they will be",
    "layer.settled": "a layer is as it will be, not on disk",
    "layer.synced": "a layer is on disk, not committed",
    "layer.committed": "a layer is committed",
    "unpack.begin": "an unpack worker has its order, nothing is laid down",
    "unpack.entry": "an unpack worker is about to lay down one entry of a layer",
    "unpack.laid": "an unpack worker has laid down a whole layer, the daemon does not know yet",
    "unpack.settle": "an unpack worker is about to fit a layer to its parents",
    "unpack.settled": "an unpack worker has fitted a layer to its parents, the daemon does not know yet",
    "snapshot.recorded": "an active snapshot's record exists, its directory does not",
    "snapshot.built": "the EROFS image of some layers is on disk, without its name",
    "snapshot.forgotten": "a snapshot's record is gone, its directory is there",
    "snapshot.discarded": "a snapshot's directory is out of sight, its files are there",
    "image.add": "about to write an image's record",
    "image.added": "an image's record is on disk",
    "image.remove": "about to remove an image's record",
    "image.removed": "an image's record is gone, its parts are there",
    "prepull.pulled": "a wanted image is here, the pre-pull service has not noted it",
    "sandbox.recorded": "a sandbox's record is on its way, nothing of it exists",
    "sandbox.namespaces": "namespaces and files of a pod exist, its network does not",
    "sandbox.network": "a pod is attached to its networks, its pause process does not run",
    "sandbox.pause": "everything of a pod exists, its record does not say so",
    "sandbox.stopped": "a pod's processes, network and files are gone, its record does not say so",
    "sandbox.released": "nothing of a pod exists but its record",
    "container.recorded": "a container's record is on its way, nothing of it exists",
    "container.root": "a container's snapshot exists, it is not mounted",
    "container.bundle": "a container's root is mounted, its configuration written",
    "container.created": "a container's init waits to start, its record does not say so",
    "container.started": "a container's init runs, its record does not say so",
    "container.deleted": "a container's processes and cgroup are gone, its files are there",
    "container.released": "nothing of a container exists but its record",
    "watch.container": "about to wait for the end of a container",
    "watch.pod": "about to wait for the end of what holds a pod",
}

_TERM = re.compile(
    r"(?P<name>[a-z0-9.-]+)=(?P<action>kill|error|delay)(?::(?P<argument>[A-Z0-9]+))?(?:\*(?P<count>[0-9]+))?(?:@(?P<first>[0-9]+))?"
)


@dataclass(slots=True)
class _Action:
    kind: str
    number: int  # errno, or delay [ms]
    left: int  # times still to act; -1 without end
    skip: int  # hits still to let pass


_armed: dict[str, _Action] = {}
_lock = threading.Lock()


def arm(text: str) -> None:
    """Replace what is armed; "" disarms everything. Raises: InvalidArgument naming the term that is wrong."""
    actions = dict(_parse(term.strip()) for term in text.split(";") if term.strip())
    with _lock:
        _armed.clear()
        _armed.update(actions)
    if actions:
        log.warning("failpoints armed (this is a test): %s", text)


def armed(name: str) -> bool:
    """Whether `name` is armed: for loops that would feel even that look. Not for what may be armed later."""
    return name in _armed


def failpoint(name: str) -> None:
    """Act if `name` is armed. Costs one dictionary lookup otherwise."""
    if _armed:
        time.sleep(_act(name) / 1000)


async def afailpoint(name: str) -> None:
    """As failpoint, for the event loop: a delay holds up the caller only."""
    if _armed:
        await asyncio.sleep(_act(name) / 1000)


def _act(name: str) -> int:
    """Kill or raise, or the delay [ms] the caller has to wait."""
    with _lock:
        action = _armed.get(name)
        if action is None or action.left == 0:
            return 0
        if action.skip > 0:
            action.skip -= 1
            return 0
        action.left -= action.left > 0
    if action.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action.kind == "error":
        raise OSError(action.number, f"{os.strerror(action.number)} (failpoint {name})")
    return action.number


def _parse(term: str) -> tuple[str, _Action]:
    match = _TERM.fullmatch(term)
    if match is None or match["name"] not in POINTS:
        raise InvalidArgument(f'"{term}" is not a failpoint', where=ENV, hint="use name=kill|error[:ERRNO]|delay:MS[*COUNT][@HIT]")
    kind, argument = match["action"], match["argument"] or ""
    if kind == "delay" and argument.isdecimal():
        number = int(argument)
    elif kind == "error" and hasattr(errno, argument or "EIO"):
        number = int(getattr(errno, argument or "EIO"))
    elif kind == "kill" and not argument:
        number = 0
    else:
        raise InvalidArgument(f'"{term}": "{argument}" does not fit {kind}', where=ENV)
    count = -1 if match["count"] is None else int(match["count"])
    return match["name"], _Action(kind, number, count, max(0, int(match["first"] or 1) - 1))
