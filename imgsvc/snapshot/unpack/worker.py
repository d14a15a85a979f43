"""The process that unpacks: a small server that is started by exec, and the children it forks.

The server holds no threads and reads no layer, so forking it is safe and takes a millisecond where starting Python and
importing takes thirty; every layer still gets a process that has never seen another one. That process gives up what
it does not need before it looks at a byte of the layer: namespaces, capabilities, resources, the daemon's descriptors.
Settling needs CAP_SYS_ADMIN, which a process that parsed a layer must not get back; it reads no layer, and its processes
go on from one to the next. Any of them may be killed at any time; the caller removes the snapshot then.

Protocol (SOCK_SEQPACKET sockets, messages of one process to the other, in both directions in order):
* to the server: b"job" with the child's job socket; answer: b"pid" with a pidfd.
* on the job socket to the child: a request (see messages.py), with descriptors: [journal, source, spare_cpu] to unpack,
  [journal] to settle, [index, source, spare_cpu, tar stream] to record, [output] to merge, with the layers' files in further messages.
  When it is to unpack or to record, 8-byte big-endian counts of readable bytes follow. `spare_cpu` is a file whose one byte
  says whether there is a processor (not 0) that no other layer is being unpacked on.
* on the job socket from the child: 8-byte big-endian counts of bytes it is done with, then its verdict. No verdict means that the
  process died. One that has settled takes another request after it.
"""

from __future__ import annotations

import array
import codecs
import contextlib
import ctypes
import functools
import gc
import importlib
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from imgsvc.base import confinement, failpoints, kernel
from imgsvc.base.errors import DataLoss, ImgsvcError, Internal, InvalidArgument, ResourceExhausted, from_os_error
from imgsvc.base.failpoints import failpoint
from imgsvc.base.fsutil import copy_metadata
from imgsvc.base.removal import remove_at
from imgsvc.snapshot.erofs.build import OpenLayer, build_image, write_all
from imgsvc.snapshot.erofs.index import record
from imgsvc.snapshot.interfaces import COUNT, Mount
from imgsvc.snapshot.mount import mount_all
from imgsvc.snapshot.unpack.extract import Extractor, entry_reached
from imgsvc.snapshot.unpack.inflate import READ_SIZE, Ahead, BlobReader, TarBytes, Transform, TransformReader, open_layer
from imgsvc.snapshot.unpack.laying import InPlaceStyle, Journal, OverlayStyle
from imgsvc.snapshot.unpack.messages import (
    Failed,
    LayerBytes,
    Merge,
    Merged,
    Record,
    Request,
    Settle,
    Settled,
    Unpack,
    Unpacked,
    Verdict,
    pack_verdict,
    unpack_request,
)
from imgsvc.snapshot.unpack.settle import NeedsParents, Settler
from imgsvc.snapshot.unpack.tarheader import BadLayer, Header
from imgsvc.snapshot.unpack.tarstream import TarStream
from imgsvc.snapshot.unpack.tree import Tree

_UNPACK_CAPABILITIES: Final = sum(
    1 << c for c in (kernel.CAP_CHOWN, kernel.CAP_DAC_OVERRIDE, kernel.CAP_FOWNER, kernel.CAP_FSETID, kernel.CAP_MKNOD, kernel.CAP_SETFCAP)
)
_SETTLE_CAPABILITIES: Final = _UNPACK_CAPABILITIES | 1 << kernel.CAP_SYS_ADMIN  # opaque marks are trusted.* xattrs
_ADDRESS_SPACE: Final = 1024**3  # [bytes] per job: zstd may ask for a window of 128 MiB, nothing for more
_OPEN_FILES: Final = 4096  # per job: a path of 2048 directories is walked with one descriptor each
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
STRIDE: Final = 1024**2  # [bytes] after which a child tells how far it is
MAX_FDS: Final = 200  # with one message; the kernel takes 253
MAX_MESSAGE: Final = 160 * 1024  # [bytes] of a job description; 500 lower directories fit


def serve(control: socket.socket, transform: str) -> None:
    """Fork a child per job until the daemon closes its end."""
    make_transform = _load(transform) if transform else None
    with contextlib.suppress(OSError):  # glibc loads it when a thread is cancelled; a process in the layer's root could not
        ctypes.CDLL("libgcc_s.so.1")
    for encoding in ("ascii", "latin-1", "unicode_escape"):  # modules of Python's, which are loaded on first use
        codecs.lookup(encoding)
    _leave_the_network()
    kernel.stand_back()
    _limit_resources()
    kernel.keep_freed_memory()
    os.umask(0)
    signal.signal(signal.SIGCHLD, _reap)
    gc.disable()  # nothing here makes cycles; without it forked pages stay shared
    gc.freeze()
    while True:
        _, fds, _, _ = socket.recv_fds(control, 16, 1)
        if not fds:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # the pid stays ours until its pidfd is open
        pid = os.fork()
        if not pid:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            _child(socket.socket(fileno=fds[0]), make_transform)
        pidfd = os.pidfd_open(pid)
        for fd in fds:
            os.close(fd)
        control.sendmsg([b"pid"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))])
        os.close(pidfd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _load(name: str) -> Callable[[bytes], Transform]:
    module, _, attribute = name.partition(":")
    factory: Callable[[bytes], Transform] = getattr(importlib.import_module(module), attribute)
    return factory


def _leave_the_network() -> None:
    with contextlib.suppress(PermissionError):  # without CAP_SYS_ADMIN the network stays in reach; nothing here uses it
        kernel.unshare(kernel.CLONE_NEWNET)


def _reap(_signal: int, _frame: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _child(job: socket.socket, make_transform: Callable[[bytes], Transform] | None) -> None:
    """Take requests and answer them until one fails, a layer is unpacked or the daemon has gone. Never returns."""
    try:
        again = True
        while again:
            message, fds, _, _ = socket.recv_fds(job, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            if not message:
                break
            request = unpack_request(message)
            verdict = _verdict(request, job, fds, make_transform)
            again = isinstance(verdict, Settled)
            job.send(pack_verdict(verdict))
    finally:
        os._exit(0)


def _verdict(request: Request, job: socket.socket, fds: list[int], make_transform: Callable[[bytes], Transform] | None) -> Verdict:
    try:
        return _answer(request, job, fds, make_transform)
    except ImgsvcError as error:
        return Failed(error, needs_parents=isinstance(error, NeedsParents))
    except RecursionError:
        return Failed(BadLayer("directories nested too deeply"))
    except MemoryError:
        if isinstance(request, Merge):
            hint = 'use the snapshotter "overlayfs" for this image'
            return Failed(ResourceExhausted("so many files need more memory than a worker may use", hint=hint))
        return Failed(ResourceExhausted("the layer needs more memory than a worker may use"))
    except OSError as error:
        return Failed(from_os_error(error, "unpacking failed"))
    except BaseException as error:  # noqa: BLE001  # the edge of the process
        _print_trace(error)
        return Failed(Internal("the unpack worker met a bug of ours; its trace is in the log"))


def _answer(request: Request, job: socket.socket, fds: list[int], make_transform: Callable[[bytes], Transform] | None) -> Verdict:
    match request:
        case Settle():
            return _settle(request, fds[0])
        case Merge():
            return _merge(request, job, fds[0])
        case Record():
            index, source, spare_cpu, tar = fds
            return _record(request, job, tar, index, source, spare_cpu, make_transform)
        case Unpack():
            journal, source, spare_cpu = fds
            return _unpack(request, job, journal, source, spare_cpu, make_transform)


def _print_trace(error: BaseException) -> None:
    """As traceback.print_exc, without the lines of source, which a layer could have put into the place of ours."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        print(f"  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}", file=sys.stderr)
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _limit_resources() -> None:
    """Of every process: they inherit what the server has, and each that sets its own copies pages for it."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _OPEN_FILES),) * 2)
    sys.setrecursionlimit(_OPEN_FILES)


def _begin() -> float:
    """The start of a layer, unpacked or recorded. Returns: the time."""
    failpoint("unpack.begin")
    return time.monotonic()


def _laid() -> None:
    """The end of a layer, unpacked or recorded."""
    failpoint("unpack.laid")


def _unpack(
    request: Unpack, job: socket.socket, journal: int, source: int, spare_cpu: int, make_transform: Callable[[bytes], Transform] | None
) -> Unpacked:
    started = _begin()
    style = OverlayStyle() if request.rebase else InPlaceStyle()
    root = _open_target(request)
    privileged = kernel.effective_capabilities() & _UNPACK_CAPABILITIES == _UNPACK_CAPABILITIES
    confinement.enter(root)
    kernel.keep_capabilities(_UNPACK_CAPABILITIES)
    confinement.allow_only(confinement.Calls.UNPACK)
    limits = request.layer.limits
    with _reading(request.layer, job, source, spare_cpu, make_transform) as layer:
        stream = TarStream(layer.next_chunk)
        tree = Tree(root, style.create_implied)
        extractor = Extractor(tree, style, max_entries=limits.entries, max_bytes=limits.unpacked_bytes, privileged=privileged)
        extractor.run(stream)
        stream.drain()
    if isinstance(style, OverlayStyle):
        os.write(journal, style.journal.dump())
    _laid()
    return layer.verdict(started, extractor.entries, extractor.size, extractor.inodes, extractor.warnings)


def _record(
    request: Record,
    job: socket.socket,
    tar: int,
    index: int,
    source: int,
    spare_cpu: int,
    make_transform: Callable[[bytes], Transform] | None,
) -> Unpacked:
    """Write the layer's tar stream and its index to two files. Neither a right nor a directory is needed for that."""
    started = _begin()
    _give_everything_up()
    limits = request.layer.limits
    size = 0

    def check(entry: Header, count: int) -> None:
        entry_reached()
        if limits.entries and count > limits.entries:
            raise ResourceExhausted(f"the layer has more than {limits.entries} entries", hint="raise the limit on entries if you trust it")

    def write_index(data: bytes) -> None:
        nonlocal size
        size += len(data)
        write_all(index, data)

    with _reading(request.layer, job, source, spare_cpu, make_transform) as layer:

        def next_chunk() -> bytes:
            chunk = layer.next_chunk()
            write_all(tar, chunk)
            return chunk

        stream = TarStream(next_chunk)
        entries = record(stream, write_index, check)
        stream.drain()
    _laid()
    return layer.verdict(started, entries, layer.data.total + size, 2, {})


def _merge(request: Merge, job: socket.socket, output: int) -> Merged:
    """Write the image of the layers whose files come in further messages, base first: [tar stream, index] each."""
    _give_everything_up()
    fds: list[int] = []
    while len(fds) < 2 * request.layers:
        message, more, _, _ = socket.recv_fds(job, COUNT, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(1)  # the daemon is gone
        fds += more
    written = build_image([OpenLayer(tar, index) for tar, index in zip(fds[::2], fds[1::2], strict=True)], output)
    return Merged(written.size, written.inodes, written.warnings)


def _give_everything_up() -> None:
    """For work on descriptors alone."""
    confinement.become_stranger()
    confinement.only_below(None)
    confinement.allow_only(confinement.Calls.UNPACK)


class _Reading:
    """A layer's bytes on their way: decrypted, inflated, hashed, counted."""

    def __init__(self, layer: LayerBytes, waited: Waiting, raw: BlobReader, sealed: TransformReader | None, spare_cpu: int) -> None:
        self._algorithm = layer.diff_id.partition(":")[0]
        self._waited = waited
        self._raw = raw
        self._spare_cpu = spare_cpu
        self.data = TarBytes(
            open_layer(Ahead(lambda: sealed.read(READ_SIZE), self._has_spare_cpu) if sealed else raw, layer.media_type),
            raw,
            algorithm=self._algorithm,
            max_bytes=layer.limits.unpacked_bytes,
            max_ratio=layer.limits.ratio,
        )
        self.next_chunk = Ahead(self.data.next_chunk, self._has_spare_cpu).next_chunk

    def _has_spare_cpu(self) -> bool:
        return os.pread(self._spare_cpu, 1, 0) != b"\0"

    def verdict(self, started: float, entries: int, size: int, inodes: int, warnings: Mapping[str, int]) -> Unpacked:
        """The verdict on a layer that is unpacked."""
        total = time.monotonic() - started
        return Unpacked(
            diff_id=f"{self._algorithm}:{self.data.hexdigest()}",
            unpacked=self.data.total,
            entries=entries,
            size=size,
            inodes=inodes,
            warnings=dict(Counter(warnings).most_common(20)),
            timings={"waited": self._waited.seconds, "unpacked": total - self._waited.seconds},
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


@contextlib.contextmanager
def _reading(
    layer: LayerBytes, job: socket.socket, source: int, spare_cpu: int, make_transform: Callable[[bytes], Transform] | None
) -> Iterator[_Reading]:
    """A layer's bytes for a `with` block, which ends with the verdict on a decrypted layer."""
    waited = Waiting(job)
    raw = BlobReader(source, layer.size, waited.wait_for)
    sealed: TransformReader | None = None
    if layer.secret is not None:
        if make_transform is None:
            raise Internal("a layer with a key, but no transform is configured")
        sealed = TransformReader(raw, make_transform(layer.secret))
    with _authenticated(sealed):
        yield _Reading(layer, waited, raw, sealed, spare_cpu)


@contextlib.contextmanager
def _authenticated(sealed: TransformReader | None) -> Iterator[None]:
    """No way out of the block before the verdict on a decrypted layer: what broke over wrong plaintext is not the cause."""
    try:
        yield
    except (DataLoss, InvalidArgument, ResourceExhausted):
        if sealed is not None:
            sealed.judge()
        raise
    if sealed is not None:
        sealed.judge()


class Waiting:
    """Waits for the daemon to say how far the blob may be read, and tells it how far it was. seconds: spent on waiting."""

    def __init__(self, job: socket.socket) -> None:
        self.seconds = 0.0
        self._job = job
        self._available = 0

    def wait_for(self, offset: int) -> int:
        """Blocks until more than `offset` bytes may be read; returns how many, STRIDE beyond it at most.

        Ends the process when the daemon is gone.
        """
        if offset:
            with contextlib.suppress(OSError):  # the daemon does not read it: only the display lags
                self._job.send(offset.to_bytes(COUNT, "big"), socket.MSG_DONTWAIT)
        started = time.monotonic()
        while self._available <= offset:
            message = self._job.recv(COUNT)
            if not message:
                os._exit(1)
            while message:
                self._available = int.from_bytes(message, "big")
                try:
                    message = self._job.recv(COUNT, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
        self.seconds += time.monotonic() - started
        return min(self._available, offset + STRIDE)


def _open_target(request: Unpack) -> int:
    """The root to unpack into; mounted in a mount namespace of this process's own where it is more than a directory."""
    mounts = list(request.mounts)
    if request.wipe:
        _wipe(mounts)
    if request.rebase or (len(mounts) == 1 and mounts[0].type == "bind"):
        return _apart(_target_of(mounts))
    return _mounted(mounts, os.path.dirname(_target_of(mounts)), _apart)


def _apart(directory: str) -> int:
    """A descriptor of a directory, as the root of a detached mount where this process may make one."""
    try:
        return kernel.detached(directory)
    except OSError:
        return _opened(directory)


def _opened(directory: str) -> int:
    return os.open(directory, _OPEN_DIR)


def _wipe(mounts: list[Mount]) -> None:
    """Empty the directory of a snapshot that is unpacked again, on its parents now; it is the root that these show."""
    target = os.open(_target_of(mounts), _OPEN_DIR)
    parent = next((os.open(m.value("lowerdir").partition(":")[0], _OPEN_DIR) for m in mounts if m.value("lowerdir")), -1)
    try:
        for name in os.listdir(target):
            remove_at(target, os.fsencode(name))
        if parent >= 0:
            copy_metadata(parent, target, os.fstat(parent))
    finally:
        os.close(target)
        if parent >= 0:
            os.close(parent)


def _target_of(mounts: list[Mount]) -> str:
    """The directory an active snapshot's changes go to."""
    for mount in mounts:
        if mount.type == "bind":
            return mount.source
        if upper := mount.value("upperdir"):
            return upper
    raise Internal("a snapshot without a writable directory")


def _mounted(mounts: list[Mount], place: str, opened: Callable[[str], int] = _opened) -> int:
    """A descriptor of the root mounted on the directory `place`, which the mounts may be below of. Other processes do not see the mount; closing the descriptor ends it."""
    _leave_the_mounts()
    mount_all(mounts, place)
    try:
        return opened(place)
    finally:
        for _ in mounts:
            kernel.umount(place)


@functools.cache
def _leave_the_mounts() -> None:
    kernel.unshare_mounts()


def _settle(request: Settle, journal: int) -> Settled:
    failpoint("unpack.settle")
    kernel.keep_capabilities(_SETTLE_CAPABILITIES)
    _settle_only()
    mounts = list(request.mounts)
    options = [option for mount in mounts for option in mount.options]
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, journal)
        upper = _tree(os.open(_target_of(mounts), _OPEN_DIR), opened)
        below = _parents(mounts)
        lower = None if below is None else _tree(below, opened)
        xattr = "user.overlay.opaque" if "userxattr" in options else "trusted.overlay.opaque"
        settler = Settler(upper, lower, Journal.load(os.pread(journal, os.fstat(journal).st_size, 0)), opaque_xattr=xattr)
        settler.run()
    failpoint("unpack.settled")
    return Settled(settler.size, settler.inodes)


@functools.cache
def _settle_only() -> None:
    confinement.allow_only(confinement.Calls.SETTLE)


def _tree(root: int, opened: contextlib.ExitStack) -> Tree:
    """A tree that is closed with its root."""
    opened.callback(os.close, root)
    tree = Tree(root)
    opened.callback(tree.close)
    return tree


def _parents(mounts: list[Mount]) -> int | None:
    """A descriptor of the merged view of all parents of an active overlayfs snapshot, None when it has none."""
    options = [option for mount in mounts for option in mount.options]
    lowers = next((lowers for mount in mounts if (lowers := mount.value("lowerdir"))), "")
    if not lowers:
        return None
    if ":" not in lowers:
        return os.open(lowers, _OPEN_DIR)
    kept = tuple(o for o in options if not o.startswith(("upperdir=", "workdir=", "volatile")))
    return _mounted([Mount("overlay", "overlay", ("ro", *kept))], os.path.dirname(_target_of(mounts)))


if __name__ == "__main__":
    failpoints.arm(os.environ.get(failpoints.ENV, ""))
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
