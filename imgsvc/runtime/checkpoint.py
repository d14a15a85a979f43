"""CheckpointContainer: a running container's memory and state in an archive; the container goes on.

The OCI runtime has criu dump the processes. The archive is an uncompressed tar, laid out and named as Podman and CRI-O do
it, so that their tools can look into it:

============ ======================================================================
checkpoint/  criu's images
config.dump  JSON: id, name, rootfsImage, rootfsImageRef, runtime, createdTime, checkpointedTime
spec.dump    the OCI specification the container runs with
dump.log     what criu said
============ ======================================================================

Files the container has changed are not in it (no rootfs-diff.tar): it is for looking at, and for a restore beside the same
writable layer.

Source: KEP-2008; checkpointctl's metadata (names of files and keys); criu(8).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from imgsvc.base.concurrency import in_thread
from imgsvc.base.errors import AlreadyExists, InvalidArgument, NotFound
from imgsvc.base.fsutil import private_dir, sync_dir
from imgsvc.base.removal import discard
from imgsvc.runtime.core import Core, os_errors
from imgsvc.runtime.processes.exits import now_ns
from imgsvc.runtime.records import ContainerRecord
from imgsvc.runtime.state import require_running

DEFAULT_TIMEOUT_S: Final = 600.0  # the kubelet asks with 0 when its caller names none; gigabytes go to disk at some 100 MB/s


async def checkpoint(core: Core, container_id: str, location: str, timeout_s: float) -> None:
    """Dump a running container into a new archive at `location` (absolute). timeout_s: of the dump, 0 for DEFAULT_TIMEOUT_S.

    Raises: NotFound (also the directory), InvalidArgument, AlreadyExists (the archive), FailedPrecondition (not running; no criu, or it cannot
    do it), DeadlineExceeded.
    """
    _check_location(location)
    full_id = core.records.container(container_id).id
    with os_errors("writing a checkpoint"):
        async with core.locks.hold(full_id):
            record = core.records.container(full_id)
            require_running(record, core.boot_id)
            with _scratch(core.paths.root, full_id) as scratch:
                await core.runtime_of(record).checkpoint(full_id, scratch / "checkpoint", scratch / "work", timeout_s or DEFAULT_TIMEOUT_S)
                await in_thread(_write_archive, Path(location), scratch, core.paths.bundle(full_id), _describe(record))


def _check_location(location: str) -> None:
    if not os.path.isabs(location) or location.endswith("/"):
        raise InvalidArgument("the location of a checkpoint must be an absolute path of a file", where=location)
    if not os.path.isdir(os.path.dirname(location)):
        raise NotFound("the directory for the checkpoint does not exist", where=location)
    if os.path.lexists(location):
        raise _taken(location)


def _taken(location: str) -> AlreadyExists:
    return AlreadyExists("a file exists already, and a checkpoint does not replace it", where=location)


@contextmanager
def _scratch(root: Path, container_id: str) -> Iterator[Path]:
    """A directory on disk: images are as large as the container's memory. What a killed daemon leaves goes at the next start."""
    directory = root / "checkpoints" / container_id
    try:
        for name in ("checkpoint", "work"):
            private_dir(directory / name)
        yield directory
    finally:
        discard(directory)


def _describe(record: ContainerRecord) -> dict[str, str]:
    return {
        "id": record.id,
        "name": record.config.metadata.name,
        "rootfsImage": record.image_name,
        "rootfsImageRef": record.image_ref,
        "runtime": record.handler,
        "createdTime": _time(record.created_at),
        "checkpointedTime": _time(now_ns()),
    }


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds // 10**9, UTC).isoformat().replace("+00:00", "Z")


def _write_archive(location: Path, scratch: Path, bundle: Path, description: dict[str, str]) -> None:
    """Publish the archive at once and complete; it never replaces a file. Memory of a process is secret: mode 0600. Blocking."""
    fd = os.open(location.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, "config.dump", json.dumps(description).encode())
            _add(archive, "spec.dump", (bundle / "config.json").read_bytes())
            if (scratch / "work/dump.log").exists():
                _add(archive, "dump.log", (scratch / "work/dump.log").read_bytes())
            archive.add(scratch / "checkpoint", "checkpoint")
        stream.flush()
        os.fsync(fd)
        try:
            # With a descriptor, or Python calls link(2), which does not follow.
            os.link(f"/proc/self/fd/{fd}", location, src_dir_fd=fd, follow_symlinks=True)
        except FileExistsError as error:
            raise _taken(str(location)) from error
    sync_dir(location.parent)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    archive.addfile(entry, io.BytesIO(data))
