"""The daemon: builds every object, repairs what an unclean end left, serves the socket, stops cleanly.

The one place, with the CLI, that names concrete classes. `build` goes from the bottom up and leaves on a stack how each
thing is closed, so that whatever was opened is closed in reverse order whatever else fails.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio

from imgsvc import __version__
from imgsvc.api import admin_pb2_grpc, cri_pb2_grpc, imagetools_pb2_grpc
from imgsvc.base.concurrency import Threads, in_thread
from imgsvc.base.errors import FailedPrecondition, ImgsvcError, Unavailable
from imgsvc.base.fsutil import free_space, private_dir
from imgsvc.base.metadb.database import MetaDB
from imgsvc.base.places import socket_target
from imgsvc.config import Config, Loaded, to_json
from imgsvc.content.local import LocalStore
from imgsvc.daemon import logs
from imgsvc.daemon.image_side import Parts, Watch, open_verification, start_image_side
from imgsvc.daemon.ownership import PublicSocket, own_directories
from imgsvc.daemon.preflight import Standing
from imgsvc.daemon.reload import Commit, Live, Reloader
from imgsvc.daemon.rpc import ErrorInterceptor
from imgsvc.daemon.runtime_side import start_pods
from imgsvc.daemon.services.admin import AdminService
from imgsvc.daemon.services.cri_images import ImageService
from imgsvc.daemon.services.image_tools import ImageTools
from imgsvc.daemon.settings import decrypt
from imgsvc.daemon.settings import registry as registries
from imgsvc.daemon.systemd import Notifier
from imgsvc.decrypt.decryptor import LayerDecryptor
from imgsvc.images.leases import LeaseBook
from imgsvc.images.provenance import Provenance
from imgsvc.images.pull import Puller
from imgsvc.images.push import Pusher
from imgsvc.images.records import ImageStore, pin_patterns
from imgsvc.images.rootfs import ContainerRoots
from imgsvc.images.telemetry.observer import StoreSizes, store_gauges
from imgsvc.images.upkeep.collector import CollectionReport, Policy
from imgsvc.images.upkeep.fsck import recover
from imgsvc.images.upkeep.service import ContainerKeeper, StoreCare
from imgsvc.registry.http.bulk import BulkTransport
from imgsvc.runtime.streaming.server import StreamServer
from imgsvc.snapshot import detect, native, overlay
from imgsvc.snapshot.erofs import driver as erofs
from imgsvc.snapshot.erofs.build import OpenLayer
from imgsvc.snapshot.interfaces import CheckedSnapshotter, Limits
from imgsvc.snapshot.unpack.unpacker import WorkerUnpacker

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0  # how long running calls may go on after SIGTERM; systemd waits 90 s
_DESCRIPTORS = 1024  # open files; every soft limit is as high unless somebody lowered it
IO_THREADS = 8  # writes and hashes of chunks, metadata reads: two cores are busy with fewer, the rest waits on disk
TRANSFORM = "imgsvc.decrypt.aesctr:open_transform"  # what an unpack worker decrypts with


def run(load: Callable[[], Loaded]) -> int:
    """Serve until SIGTERM or SIGINT. `load` reads the configuration, now and at every SIGHUP. Returns the exit code."""
    _require_descriptors()
    loaded = load()
    if hasattr(asyncio, "PidfdChildWatcher"):
        # Python 3.11 would spend a thread per child; later versions use pidfds by themselves.
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    return asyncio.run(_serve(loaded, load))


def _require_descriptors() -> None:
    """Raise the limit of open files to what a node needs, not further: containers inherit it. Raises: FailedPrecondition."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < _DESCRIPTORS:
        raise FailedPrecondition(
            f"this process may open {hard} files, and needs {_DESCRIPTORS}",
            hint="raise the hard limit: LimitNOFILE= of the unit, ulimit -Hn",
        )
    if resource.RLIM_INFINITY != soft < _DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, hard))


async def _serve(loaded: Loaded, load: Callable[[], Loaded]) -> int:
    began = time.monotonic()
    reloads: list[asyncio.Future[None]] = []  # the loop itself keeps no task alive
    notify = Notifier()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        # What is built now stays. With 10 000 images, looking through it for garbage takes 0.5 s each time, on this loop.
        gc.disable()
        services = await build(loaded, stack)
        gc.freeze()
        gc.enable()
        server = await _listen(loaded.config, services)
        loop.add_signal_handler(signal.SIGHUP, lambda: reloads.append(asyncio.ensure_future(_reload(services, load))))
        log.info("ready: imgsvc %s on %s after %.2f s", __version__, loaded.config.address, time.monotonic() - began)
        notify("READY=1")
        alive = asyncio.ensure_future(notify.keep_alive(services.is_well))
        stack.push_async_callback(_ended, alive)
        await stop.wait()
        notify("STOPPING=1")
        log.info("stopping; containers keep running")
        services.watch.bus.close()
        services.public.withdraw()
        await server.stop(STOP_GRACE_S)
    log.info("stopped")
    return 0


@dataclass(frozen=True, slots=True)
class Services:
    """What the socket serves, and what a reload reaches."""

    images: ImageService
    admin: AdminService
    runtime: cri_pb2_grpc.RuntimeServiceServicer
    tools: ImageTools
    streams: StreamServer | None
    is_well: Callable[[], Awaitable[object]]  # returns when the loop, a thread and the metadata do their work
    reloader: Reloader
    standing: Standing
    watch: Watch
    public: PublicSocket


async def build(loaded: Loaded, stack: AsyncExitStack) -> Services:
    """Build everything from the bottom up and repair what an unclean end left.

    Raises: FailedPrecondition (another daemon, a newer store), DataLoss, … with what to do.
    """
    settings = loaded.config
    root, state = stack.enter_context(own_directories(settings))
    public = PublicSocket(Path(settings.address.removeprefix("unix://")))
    sync = settings.images.sync == "full"
    threads = Threads(IO_THREADS, "io")
    stack.callback(threads.close)
    db = MetaDB(root / "metadata", sync=sync)
    stack.callback(db.close)
    content = LocalStore(root, db, sync=sync)
    recovered = await threads.run(recover, content, db.last_end)
    for finding in recovered:
        log.warning("%s after an unclean end: %s", "repaired" if finding.repaired else "found", finding)
    images = ImageStore(db, settings.images.pinned_images)
    leases = LeaseBook(db)
    watch = Watch.create(images)
    unpacker = _unpacker(settings, watch.observer.unpack_queued)
    stack.push_async_callback(unpacker.close)
    snapshotters, described = await _snapshotters(settings, private_dir(root / "snapshots"), db, threads, unpacker, stack)
    default = next(iter(snapshotters))
    bulk = BulkTransport()
    stack.push_async_callback(bulk.close)
    opened = registries.open_registries(loaded, watch.observer, bulk)
    registry = opened.client
    standing = Standing(lambda warnings: registry.directories.tell(warnings))  # noqa: PLW0108  # a reload replaces them
    stack.push_async_callback(registry.close)
    for directory in registry.directories.missing_roots():
        log.info("registry.config_path: %s is not there", directory)
    decryptor = LayerDecryptor(await threads.run(decrypt.settings, settings, root))
    stack.push_async_callback(decryptor.close)
    for companion in (bulk, unpacker):
        warming = asyncio.ensure_future(companion.warm())  # beside everything else, so that the first layer need not wait
        stack.push_async_callback(_ended, warming)
    verification = open_verification(settings, registry, db, threads)
    provenance = Provenance(db)
    await provenance.adopt(images.all())
    await provenance.tidy(images.all(), content, threads)
    puller = Puller(
        registry=registry,
        content=content,
        snapshotters=snapshotters,
        unpacker=unpacker,
        decryptor=decryptor,
        images=images,
        leases=leases,
        threads=threads,
        provenance=provenance,
        verifier=verification,
        observer=watch.observer,
        durable=sync,
    )
    pusher = Pusher(registry=registry, content=content, images=images, leases=leases, threads=threads, bring_back=puller.bring_back)
    handlers = {name: handler.snapshotter or default for name, handler in settings.runtime.runtimes.items()}
    roots = ContainerRoots(images, snapshotters, decryptor, threads, default=default, check=verification.check, described=described)

    def diagnosis() -> dict[str, Any]:
        now = reloader.loaded
        return {"configuration": to_json(now.config, now.origins), "warnings": standing.notes(), "store": health()}

    def health() -> dict[str, Any]:
        used, limit = db.usage()
        return {
            "lastEnd": db.last_end,
            "recovered": [str(finding) for finding in recovered],
            "metadataBytes": used,
            "metadataLimit": limit,
            "freeBytes": free_space(root),
            "minFreeBytes": reloader.loaded.config.gc.min_free,
            "images": len(images.all()),
        }

    pods = await start_pods(settings, state, root, db, roots, standing.notes, diagnosis, stack)
    keeper = ContainerKeeper(pods.container_ids, snapshotters)
    tidying: set[asyncio.Future[None]] = set()

    def collected(report: CollectionReport | None) -> None:
        watch.observer.collected(report)
        task = asyncio.ensure_future(provenance.tidy(images.all(), content, threads))
        tidying.add(task)
        task.add_done_callback(tidying.discard)

    care = StoreCare(
        images,
        content,
        snapshotters,
        db,
        puller.unpack_aside,
        leases,
        threads,
        root,
        _policy(settings),
        [keeper],
        collected,
    )
    await care.start(stack)
    expiry = asyncio.ensure_future(leases.expire_forever(lambda: care.trigger("lease expired")))
    stack.push_async_callback(_ended, expiry)

    def on_removed() -> None:
        care.trigger("image removed")

    watch.page.add(*store_gauges(images, db, StoreSizes(care.sizes, watch.page)))
    parts = Parts(root, registry, content, images, puller, provenance, leases, db, threads, verification, roots, default)
    tools, lives = await start_image_side(settings, parts, watch, stack)

    def pins(new: Loaded) -> Commit:
        pin_patterns(new.config.images.pinned_images)
        return partial(images.pin, new.config.images.pinned_images)

    lives += [
        Live(("debug.level",), lambda new: partial(logs.set_level, new.config.debug.level)),
        Live(("images.pinned_images",), pins),
        Live(registries.KEYS, partial(registries.prepare, registry)),
        Live(
            ("images.max_concurrent_unpacks", "images.limits"),
            lambda new: partial(unpacker.configure, new.config.images.max_concurrent_unpacks, _limits(new.config)),
        ),
        Live(("gc", "images.discard_unpacked_layers"), lambda new: partial(care.go_by, _policy(new.config))),
    ]
    reloader = Reloader(loaded, lives)
    looking = asyncio.ensure_future(threads.run(standing.look, loaded))  # nobody need wait for it
    stack.push_async_callback(_ended, looking)
    return Services(
        images=ImageService(images, puller, care, snapshotter=default, handlers=handlers, on_removed=on_removed),
        admin=AdminService(
            images,
            puller,
            pusher,
            care,
            snapshotter=default,
            loaded=lambda: reloader.loaded,
            on_removed=on_removed,
        ),
        runtime=pods.service,
        streams=pods.streams,
        tools=tools,
        is_well=lambda: threads.run(db.usage),
        reloader=reloader,
        standing=standing,
        watch=watch,
        public=public,
    )


async def _ended(task: asyncio.Future[None]) -> None:
    """Stop a task of the daemon's own; what it failed with was no reason to stop serving."""
    task.cancel()
    for error in await asyncio.gather(task, return_exceptions=True):
        if isinstance(error, Exception):
            log.warning("a background task failed: %s", error)


def _policy(settings: Config) -> Policy:
    budget = 0 if settings.images.discard_unpacked_layers else settings.gc.blob_cache
    return Policy(settings.gc.startup_delay, settings.gc.schedule_delay, budget, settings.gc.min_free)


def _limits(settings: Config) -> Limits:
    limits = settings.images.limits
    return Limits(limits.unpacked_bytes, limits.entries, limits.ratio)


async def _snapshotters(
    settings: Config, root: Path, db: MetaDB, threads: Threads, unpacker: WorkerUnpacker, stack: AsyncExitStack
) -> tuple[dict[str, CheckedSnapshotter], dict[str, Any]]:
    """The drivers this node can use, the default one first, and what to say of them in Status. Raises: FailedPrecondition when the configured one cannot work."""
    detected = await threads.run(detect.detect, root / overlay.NAME)
    wanted = detected.driver if settings.images.snapshotter == "auto" else settings.images.snapshotter
    if wanted == overlay.NAME and detected.options is None:
        raise FailedPrecondition(detected.reason, where="images.snapshotter", hint='use "native", or another file system for root')
    if wanted == erofs.NAME and detected.without_erofs:
        raise FailedPrecondition(f"this kernel cannot do it: {detected.without_erofs}", where="images.snapshotter", hint='use "overlayfs"')
    log.info("snapshotter %s: %s", wanted, detected.reason)
    drivers: dict[str, CheckedSnapshotter] = {}
    described: dict[str, Any] = {"snapshotter": wanted, "detected": detected.reason, native.NAME: {"idmapped": detected.idmapped}}
    if detected.options is not None:
        options = replace(detected.options, **asdict(settings.images.overlayfs))
        drivers[overlay.NAME] = overlay.OverlaySnapshotter(root / overlay.NAME, db, options)
        described[overlay.NAME] = asdict(options)
        if not detected.without_erofs:
            drivers[erofs.NAME] = erofs.ErofsSnapshotter(root / erofs.NAME, db, options, build=_build_by(unpacker))
        described[erofs.NAME] = detected.without_erofs or "usable"
    drivers[native.NAME] = native.NativeSnapshotter(root / native.NAME, db, idmapped=detected.idmapped)
    for driver in drivers.values():
        stack.callback(driver.close)
        if count := await threads.run(driver.cleanup):
            log.warning("snapshotter %s: %d unfinished snapshots cleaned up", driver.name, count)
    return {wanted: drivers.pop(wanted), **drivers}, described


def _build_by(unpacker: WorkerUnpacker) -> erofs.Build:
    """Images are made by workers, as layers are; the drivers that ask for them run on threads."""
    loop = asyncio.get_running_loop()

    def build(layers: Sequence[OpenLayer], output: int) -> None:
        pairs = [(layer.tar, layer.index) for layer in layers]
        asyncio.run_coroutine_threadsafe(unpacker.merge(pairs, output), loop).result()

    return build


def _unpacker(settings: Config, queued: Callable[[float], None]) -> WorkerUnpacker:
    return WorkerUnpacker(
        max_concurrent=settings.images.max_concurrent_unpacks,
        limits=_limits(settings),
        transform=TRANSFORM,
        queued=queued,
    )


async def _listen(settings: Config, services: Services) -> grpc.aio.Server:
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(services.watch.observer.rpc)],
        options=[
            ("grpc.max_receive_message_length", settings.grpc.max_recv_message_size),
            ("grpc.max_send_message_length", settings.grpc.max_send_message_size),
            ("grpc.so_reuseport", 0),
        ],
    )
    cri_pb2_grpc.add_ImageServiceServicer_to_server(services.images, server)
    cri_pb2_grpc.add_RuntimeServiceServicer_to_server(services.runtime, server)
    admin_pb2_grpc.add_AdminServicer_to_server(services.admin, server)
    imagetools_pb2_grpc.add_ImageToolsServicer_to_server(services.tools, server)
    private = os.umask(0o177 if not settings.grpc.gid else 0o117)
    try:
        server.add_insecure_port(socket_target(str(services.public.private)))
        await server.start()
        services.public.publish(settings.grpc.uid, settings.grpc.gid)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"cannot listen: {error}", where=settings.address) from error
    finally:
        os.umask(private)
    return server


async def _reload(services: Services, load: Callable[[], Loaded]) -> None:
    """SIGHUP. A bad file changes nothing; hosts.toml, policy, key and pre-pull files are read as they are needed anyway."""
    try:
        new = await in_thread(load)
        if services.streams is not None:
            await services.streams.reload_certificate()
        services.reloader.reload(new)
        await in_thread(services.standing.look, services.reloader.loaded)
    except ImgsvcError as error:
        log.error("configuration not reloaded: %s", error)
