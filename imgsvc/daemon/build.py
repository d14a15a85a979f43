"""Builds every object of the daemon, from the bottom up, and repairs what an unclean end left.

One function per side: store, registries, images, runtime, upkeep, tools. Each leaves on a stack how what it opened is
closed, so that everything is closed in reverse order whatever else fails, and gives the reloader what can change while
it runs. Here, and in the CLI, concrete classes are named; the settings each takes are made in settings/.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc.aio

from imgsvc.api import admin_pb2_grpc, cri_pb2_grpc, imagetools_pb2_grpc
from imgsvc.base import kernel
from imgsvc.base.concurrency import Threads
from imgsvc.base.fsutil import free_space, private_dir
from imgsvc.base.http1 import server_tls
from imgsvc.base.metadb.database import MetaDB
from imgsvc.config import Loaded, to_json
from imgsvc.config.schema import Mirror as MirrorSettings
from imgsvc.content.local import LocalStore
from imgsvc.daemon import logs
from imgsvc.daemon.background import background
from imgsvc.daemon.listen import listen_http
from imgsvc.daemon.ownership import PublicSocket, own_directories
from imgsvc.daemon.preflight import Preflight
from imgsvc.daemon.reload import Commit, Live, Reloader
from imgsvc.daemon.services.admin import AdminService
from imgsvc.daemon.services.cri_images import ImageService
from imgsvc.daemon.services.image_tools import ImageTools
from imgsvc.daemon.services.runtime_off import RuntimeOff
from imgsvc.daemon.settings import decrypt, verify
from imgsvc.daemon.settings import registry as registries
from imgsvc.daemon.settings import snapshot as snapshots
from imgsvc.daemon.settings.runtime import runtime_settings, switched_off
from imgsvc.daemon.settings.upkeep import collector_policy
from imgsvc.decrypt.decryptor import LayerDecryptor
from imgsvc.images.archive.service import Archives
from imgsvc.images.leases import LeaseBook
from imgsvc.images.mirror.cache import PullThrough
from imgsvc.images.mirror.server import Mirror
from imgsvc.images.mounts import ImageMounts
from imgsvc.images.prepull.service import Prepull, PullPath
from imgsvc.images.provenance import Provenance
from imgsvc.images.pull import Puller
from imgsvc.images.push import Pusher
from imgsvc.images.records import ImageStore, pin_patterns
from imgsvc.images.rootfs import ContainerRootfs
from imgsvc.images.storage import Storage
from imgsvc.images.telemetry.events import EventBus
from imgsvc.images.telemetry.metrics import Gauge, Page
from imgsvc.images.telemetry.observer import Observer, StoreSizes, store_gauges
from imgsvc.images.upkeep.collector import CollectionReport
from imgsvc.images.upkeep.fsck import Finding, recover
from imgsvc.images.upkeep.service import ContainerKeeper, Upkeep
from imgsvc.images.verification.service import Verification
from imgsvc.registry.client import RegistryClient
from imgsvc.registry.http.bulk import BulkTransport
from imgsvc.runtime.interfaces import RootMount
from imgsvc.runtime.node import RuntimeNode
from imgsvc.runtime.service import RuntimeService
from imgsvc.runtime.settings import StreamSettings
from imgsvc.runtime.streaming.server import StreamServer
from imgsvc.snapshot.interfaces import Mount
from imgsvc.snapshot.mount import mount_all
from imgsvc.snapshot.unpack.tarstream import TarStream
from imgsvc.snapshot.unpack.unpacker import WorkerUnpacker

log = logging.getLogger(__name__)

IO_THREADS: Final = 8  # writes and hashes of chunks, metadata reads: two cores are busy with fewer, the rest waits on disk


@dataclass(frozen=True, slots=True)
class Services:
    """What the socket serves, and what a reload reaches.

    is_well: returns when the loop, a thread and the metadata do their work. streams: None without a runtime.
    """

    images: ImageService
    admin: AdminService
    runtime: cri_pb2_grpc.RuntimeServiceServicer
    tools: ImageTools
    streams: StreamServer | None
    is_well: Callable[[], Awaitable[object]]
    reloader: Reloader
    preflight: Preflight
    telemetry: Telemetry
    public: PublicSocket

    def add_to(self, server: grpc.aio.Server) -> None:
        """Have them served."""
        cri_pb2_grpc.add_ImageServiceServicer_to_server(self.images, server)
        cri_pb2_grpc.add_RuntimeServiceServicer_to_server(self.runtime, server)
        admin_pb2_grpc.add_AdminServicer_to_server(self.admin, server)
        imagetools_pb2_grpc.add_ImageToolsServicer_to_server(self.tools, server)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where what happens can be seen: the metrics page, the event bus, and the observer that fills both."""

    page: Page
    bus: EventBus
    observer: Observer

    @classmethod
    def create(cls, images: ImageStore) -> Telemetry:
        """An empty page, a bus without listeners, and the observer of both."""
        page, bus = Page(), EventBus()
        observer = Observer(page, bus)
        images.on_change(observer.image)
        return cls(page, bus, observer)


async def build(loaded: Loaded, stack: AsyncExitStack) -> Services:
    """Build everything from the bottom up and repair what an unclean end left.

    Raises: FailedPrecondition (another daemon, a newer store), DataLoss, … with what to do.
    """
    reloader = Reloader(loaded, [Live(("debug.level",), lambda new: partial(logs.set_level, new.config.debug.level))])
    store = await _open_store(reloader, stack)
    remote = await _open_registries(reloader, store, stack)
    images = await _open_images(reloader, store, remote)
    pods = await _start_runtime(reloader, store, remote, images, stack)
    upkeep = await _start_upkeep(reloader, store, images, pods, stack)
    tools = await _start_tools(reloader, store, remote, images, stack)
    background(stack, store.threads.run(remote.preflight.run, loaded))  # nothing waits for it
    default, on_removed = store.default, partial(upkeep.trigger, "image removed")
    handlers = {name: handler.snapshotter or default for name, handler in loaded.config.runtime.runtimes.items()}
    storage, puller = store.storage, images.puller
    return Services(
        images=ImageService(storage.images, puller, upkeep, snapshotter=default, handlers=handlers, on_removed=on_removed),
        admin=AdminService(
            storage.images,
            puller,
            Pusher(registry=remote.registry, storage=storage, bring_back=puller.bring_back),
            upkeep,
            snapshotter=default,
            loaded=lambda: reloader.loaded,
            on_removed=on_removed,
        ),
        runtime=pods.service,
        streams=pods.streams,
        tools=tools,
        is_well=lambda: store.threads.run(store.db.usage),
        reloader=reloader,
        preflight=remote.preflight,
        telemetry=store.telemetry,
        public=store.public,
    )


@dataclass(frozen=True, slots=True)
class _Store:
    """What is on this node. recovered: what an unclean end had left. described: of the snapshotters, for Status."""

    root: Path
    state: Path
    public: PublicSocket
    threads: Threads
    db: MetaDB
    recovered: Sequence[Finding]
    storage: Storage
    leases: LeaseBook
    unpacker: WorkerUnpacker
    described: dict[str, Any]
    telemetry: Telemetry

    @property
    def default(self) -> str:
        """The snapshotter used where none is named."""
        return next(iter(self.storage.snapshotters))

    def health(self) -> dict[str, Any]:
        """For Status(verbose), but for what the configuration says."""
        used, limit = self.db.usage()
        return {
            "lastEnd": self.db.last_end,
            "recovered": [str(finding) for finding in self.recovered],
            "metadataBytes": used,
            "metadataLimit": limit,
            "freeBytes": free_space(self.root),
            "images": len(self.storage.images.all()),
        }


async def _open_store(reloader: Reloader, stack: AsyncExitStack) -> _Store:
    settings = reloader.loaded.config
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
    telemetry = Telemetry.create(images)
    unpacker = snapshots.open_unpacker(settings, telemetry.observer.unpack_queued)
    stack.push_async_callback(unpacker.close)
    drivers = await snapshots.open_drivers(settings, private_dir(root / "snapshots"), db, threads, unpacker, stack)
    leases = LeaseBook(db)
    storage = Storage(content, images, leases, threads, drivers.by_name)

    def pins(new: Loaded) -> Commit:
        pin_patterns(new.config.images.pinned_images)
        return partial(images.pin, new.config.images.pinned_images)

    reloader.add(
        Live(("images.pinned_images",), pins),
        Live(snapshots.UNPACKER_KEYS, partial(snapshots.reconfigure, unpacker)),
    )
    return _Store(root, state, public, threads, db, recovered, storage, leases, unpacker, drivers.described, telemetry)


@dataclass(frozen=True, slots=True)
class _Remote:
    """What reaches registries, and what judges and opens what comes from there."""

    registry: RegistryClient
    decryptor: LayerDecryptor
    verification: Verification
    preflight: Preflight


async def _open_registries(reloader: Reloader, store: _Store, stack: AsyncExitStack) -> _Remote:
    loaded = reloader.loaded
    bulk = BulkTransport()
    stack.push_async_callback(bulk.aclose)
    registry = registries.open_registries(loaded, store.telemetry.observer, bulk).client
    stack.push_async_callback(registry.close)
    preflight = Preflight(lambda warnings: registry.directories.tell(warnings))  # noqa: PLW0108  # a reload replaces them
    for directory in registry.directories.missing_roots():
        log.info("registry.config_path: %s is not there", directory)
    decryptor = LayerDecryptor(await store.threads.run(decrypt.settings, loaded.config, store.root))
    stack.push_async_callback(decryptor.close)
    for companion in (bulk, store.unpacker):
        background(stack, companion.warm())  # beside everything else, so that the first layer need not wait
    verification = verify.open_verification(loaded.config, registry, store.db, store.threads)
    reloader.add(
        Live(registries.KEYS, partial(registries.prepare, registry)),
        Live(("verify",), partial(verify.prepare, verification, store.threads)),
    )
    return _Remote(registry, decryptor, verification, preflight)


@dataclass(frozen=True, slots=True)
class _Images:
    """The use cases others build on."""

    puller: Puller
    provenance: Provenance
    roots: ContainerRootfs


async def _open_images(reloader: Reloader, store: _Store, remote: _Remote) -> _Images:
    storage = store.storage
    provenance = Provenance(store.db)
    await provenance.adopt(storage.images.all())
    await provenance.tidy(storage.images.all(), storage.content, store.threads)
    puller = Puller(
        registry=remote.registry,
        storage=storage,
        unpacker=store.unpacker,
        decryptor=remote.decryptor,
        provenance=provenance,
        verifier=remote.verification,
        observer=store.telemetry.observer,
        durable=reloader.loaded.config.images.sync == "full",
    )
    roots = ContainerRootfs(
        storage.images,
        storage.snapshotters,
        remote.decryptor,
        store.threads,
        default=store.default,
        check=remote.verification.check,
        described=store.described,
    )
    return _Images(puller, provenance, roots)


@dataclass(frozen=True, slots=True)
class _Pods:
    """service: what the socket serves. container_ids: all that have a root file system. streams: None without a runtime."""

    service: cri_pb2_grpc.RuntimeServiceServicer
    container_ids: Callable[[], Iterable[str]]
    streams: StreamServer | None


async def _start_runtime(reloader: Reloader, store: _Store, remote: _Remote, images: _Images, stack: AsyncExitStack) -> _Pods:
    """Start the runtime and recover its pods. Without root or when switched off: images only."""
    settings = reloader.loaded.config
    if reason := switched_off(settings):
        log.warning("the runtime service is off: %s", reason)
        return _Pods(RuntimeOff(reason), lambda: (), None)  # type: ignore[abstract]  # what is missing answers UNIMPLEMENTED

    def diagnosis() -> dict[str, Any]:
        now = reloader.loaded
        health = {**store.health(), "minFreeBytes": now.config.gc.min_free}
        return {"configuration": to_json(now.config, now.origins), "warnings": remote.preflight.notes(), "store": health}

    streams = StreamServer(StreamSettings(**asdict(settings.stream)))
    await streams.start()
    stack.push_async_callback(streams.close)
    node = await RuntimeNode.start(runtime_settings(settings, store.state, store.root), store.db, images.roots)
    stack.push_async_callback(node.close)
    return _Pods(RuntimeService(node, streams, remote.preflight.notes, diagnosis), node.root_keys, streams)


async def _start_upkeep(reloader: Reloader, store: _Store, images: _Images, pods: _Pods, stack: AsyncExitStack) -> Upkeep:
    storage, telemetry = store.storage, store.telemetry
    tidying: set[asyncio.Future[None]] = set()  # the loop itself keeps no task alive

    def collected(report: CollectionReport | None) -> None:
        telemetry.observer.collected(report)
        task = asyncio.ensure_future(images.provenance.tidy(storage.images.all(), storage.content, store.threads))
        tidying.add(task)
        task.add_done_callback(tidying.discard)

    upkeep = Upkeep(
        storage,
        store.db,
        images.puller.unpack_aside,
        images.puller.move,
        store.root,
        collector_policy(reloader.loaded.config),
        [store.default, *(handler.snapshotter for handler in reloader.loaded.config.runtime.runtimes.values() if handler.snapshotter)],
        [ContainerKeeper(pods.container_ids, storage.snapshotters)],
        collected,
    )
    await upkeep.start(stack)
    background(stack, store.leases.expire_forever(lambda: upkeep.trigger("lease expired")))
    telemetry.page.add(*store_gauges(storage.images, store.db, StoreSizes(upkeep.sizes, telemetry.page)))
    reloader.add(Live(("gc", "images.discard_unpacked_layers"), lambda new: partial(upkeep.go_by, collector_policy(new.config))))
    return upkeep


async def _start_tools(reloader: Reloader, store: _Store, remote: _Remote, images: _Images, stack: AsyncExitStack) -> ImageTools:
    """Archives, mounts, pre-pulls, the metrics page and the mirror. Raises: Unavailable (an address is taken), InvalidArgument."""
    settings, storage, telemetry, default = reloader.loaded.config, store.storage, store.telemetry, store.default
    archives = Archives(storage=storage, puller=images.puller, open_tar=TarStream)
    prepull = Prepull(
        Path(settings.prepull.directory),
        root=store.root,
        path=PullPath(images.puller.pull, remote.registry, default),
        images=storage.images,
        db=store.db,
        threads=store.threads,
    )
    telemetry.page.add(Gauge("imgsvc_prepull_images", "Images of pre-pull files by state.", ("state",), prepull.counts))
    await listen_http("metrics", settings.metrics.address, telemetry.page.handle, stack)
    await _start_mirror(reloader, store, remote, images, stack)
    background(stack, prepull.run())
    reloader.add(Live(("prepull",), lambda new: partial(prepull.watch, Path(new.config.prepull.directory))))
    unmount = partial(kernel.umount, in_use=False)
    mounts = ImageMounts(storage.images, images.roots, storage.leases, store.threads, _mount_all, unmount)
    return ImageTools(archives, prepull, telemetry.bus, mounts, snapshotter=default)


async def _start_mirror(reloader: Reloader, store: _Store, remote: _Remote, images: _Images, stack: AsyncExitStack) -> None:
    mirror = reloader.loaded.config.mirror
    if not mirror.address:
        return
    through = PullThrough(
        namespaces=mirror.pull_through,
        keep=timedelta(seconds=mirror.keep),
        registry=remote.registry,
        blobs=images.puller.blobs,
        documents=images.puller.documents,
        provenance=images.provenance,
        storage=store.storage,
        verifier=remote.verification,
        db=store.db,
    )
    await through.tidy()
    server = Mirror(
        store.storage.images,
        store.storage.content,
        store.threads,
        provenance=images.provenance,
        check=remote.verification.check,
        private=mirror.private_images == "certificate",
        through=through,
        served=store.telemetry.observer.served,
    )
    tls = server_tls(mirror.tls_cert_file, mirror.tls_key_file, mirror.client_ca_file) if mirror.tls_cert_file else None
    await listen_http("mirror", mirror.address, server.handle, stack, tls)
    reloader.add(Live(("mirror.private_images", "mirror.pull_through", "mirror.keep"), partial(_share, mirror, server, through, tls)))


def _share(started: MirrorSettings, server: Mirror, through: PullThrough, tls: ssl.SSLContext | None, new: Loaded) -> Commit:
    """What puts other settings of the mirror in force, and its certificate as it is now. started: the settings it listens by."""
    wanted = new.config.mirror
    if tls is not None:
        server_tls(started.tls_cert_file, started.tls_key_file, started.client_ca_file)  # to see whether the files are good

    def commit() -> None:
        server.share(private=wanted.private_images == "certificate")
        through.fetch_for(wanted.pull_through, timedelta(seconds=wanted.keep))
        if tls is not None:
            tls.load_cert_chain(started.tls_cert_file, started.tls_key_file)  # OpenSSL takes what is loaded last

    return commit


def _mount_all(mounts: Sequence[RootMount], target: str) -> None:
    mount_all([Mount(mount.type, mount.source, mount.options) for mount in mounts], target)
