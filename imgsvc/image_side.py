"""The image side of the daemon beyond CRI: from configuration to verification, archives, mirror, metrics, pre-pull, events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from imgsvc.archive.service import Archives
from imgsvc.concurrency import Threads
from imgsvc.config import Config
from imgsvc.content.interfaces import Store
from imgsvc.events import EventBus
from imgsvc.http1 import Handler, HttpServer, is_loopback, server_tls
from imgsvc.image_tools import ImageTools
from imgsvc.images import ImageStore
from imgsvc.leases import LeaseManager
from imgsvc.metadb import MetaDB
from imgsvc.metrics import Gauge, Page
from imgsvc.mirror import Mirror
from imgsvc.mounts import ImageMounts
from imgsvc.observe import Observer
from imgsvc.prepull.service import Prepull
from imgsvc.pull import Puller
from imgsvc.pullthrough import PullThrough
from imgsvc.registry.interfaces import Registry
from imgsvc.roots import ContainerRoots
from imgsvc.runtime.interfaces import RootMount
from imgsvc.snapshot import kernel
from imgsvc.snapshot.interfaces import Mount
from imgsvc.snapshot.mount import mount_all
from imgsvc.snapshot.tarstream import TarStream
from imgsvc.verification.policy import load_policy
from imgsvc.verification.programs import Programs
from imgsvc.verification.service import Verification
from imgsvc.verification.signatures import Signatures

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told what happens."""

    page: Page
    bus: EventBus
    observer: Observer

    @classmethod
    def create(cls, images: ImageStore) -> Watch:
        """One page, one bus, and who fills them."""
        page, bus = Page(), EventBus()
        observer = Observer(page, bus)
        images.watch(observer.image)
        return cls(page, bus, observer)


def open_verification(settings: Config, registry: Registry, db: MetaDB, threads: Threads) -> Verification:
    """[verify]. Raises: InvalidArgument, NotFound for a policy that cannot be used: a daemon without it would trust everybody."""
    verify = settings.verify
    policy = Path(verify.policy) if verify.policy else None
    if policy is not None:
        load_policy(policy)
    return Verification(
        policy=(lambda: load_policy(policy)) if policy is not None else None,
        programs=Programs(Path(verify.bin_dir), verify.max_verifiers, verify.per_verifier_timeout, threads),
        signatures=Signatures(registry),
        db=db,
        threads=threads,
        fail_closed=verify.fail_closed,
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """What the image side is built on."""

    root: Path
    registry: Registry
    content: Store
    images: ImageStore
    puller: Puller
    leases: LeaseManager
    db: MetaDB
    threads: Threads
    verification: Verification
    roots: ContainerRoots
    snapshotter: str


async def start_image_side(settings: Config, parts: Parts, watch: Watch, stack: AsyncExitStack) -> ImageTools:
    """Start what is configured; `stack` gets what ends it. Raises: Unavailable (an address is taken), InvalidArgument."""
    archives = Archives(
        content=parts.content,
        images=parts.images,
        puller=parts.puller,
        leases=parts.leases,
        threads=parts.threads,
        open_tar=TarStream,
    )
    prepull = Prepull(
        Path(settings.prepull.directory),
        root=parts.root,
        pull=parts.puller.pull,
        registry=parts.registry,
        images=parts.images,
        db=parts.db,
        threads=parts.threads,
        snapshotter=parts.snapshotter,
    )
    watch.page.add(Gauge("imgsvc_prepull_images", "Images of pre-pull files by state.", ("state",), prepull.counts))
    await _listen("metrics", settings.metrics.address, watch.page.handle, stack)
    await _start_mirror(settings, parts, watch, stack)
    life = asyncio.ensure_future(prepull.run())
    stack.push_async_callback(_stopped, life)
    mounts = ImageMounts(parts.images, parts.roots, parts.leases, parts.threads, parts.snapshotter, _mount_all, kernel.umount)
    return ImageTools(archives, prepull, watch.bus, mounts, snapshotter=parts.snapshotter)


def _mount_all(mounts: Sequence[RootMount], target: str) -> None:
    mount_all([Mount(mount.type, mount.source, mount.options) for mount in mounts], target)


async def _start_mirror(settings: Config, parts: Parts, watch: Watch, stack: AsyncExitStack) -> None:
    mirror = settings.mirror
    if not mirror.address:
        return
    if not mirror.tls_cert_file and not is_loopback(mirror.address):
        log.warning("mirror.address %s is reachable from outside and speaks plain HTTP; set mirror.tls_cert_file", mirror.address)
    through = PullThrough(
        namespaces=mirror.pull_through,
        keep=timedelta(seconds=mirror.keep),
        registry=parts.registry,
        blobs=parts.puller.blobs,
        content=parts.content,
        leases=parts.leases,
        threads=parts.threads,
        verifier=parts.verification,
    )
    service = Mirror(
        parts.images,
        parts.content,
        parts.threads,
        check=parts.verification.check,
        private=mirror.private_images == "certificate",
        through=through,
        served=watch.observer.served,
    )
    await _listen("mirror", mirror.address, service.handle, stack, mirror.tls_cert_file, mirror.tls_key_file, mirror.client_ca_file)


async def _listen(name: str, address: str, handler: Handler, stack: AsyncExitStack, cert: str = "", key: str = "", ca: str = "") -> None:
    if not address:
        return
    server = HttpServer(handler, name)
    await server.start(address, server_tls(cert, key, ca) if cert else None)
    stack.push_async_callback(server.close)
    log.info("%s: listening on %s://%s, port %d", name, "https" if cert else "http", address, server.port)


async def _stopped(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
