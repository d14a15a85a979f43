"""The image side of the daemon beyond CRI: from configuration to verification, archives, mirror, metrics, pre-pull, events."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from imgsvc.base import kernel
from imgsvc.base.concurrency import Threads
from imgsvc.base.http1 import Handler, HttpServer, server_tls
from imgsvc.base.metadb.database import MetaDB
from imgsvc.config import Config, Loaded
from imgsvc.content.interfaces import Store
from imgsvc.daemon.reload import Commit, Live
from imgsvc.daemon.services.image_tools import ImageTools
from imgsvc.images.archive.service import Archives
from imgsvc.images.leases import LeaseManager
from imgsvc.images.mirror.cache import PullThrough
from imgsvc.images.mirror.server import Mirror
from imgsvc.images.mounts import ImageMounts
from imgsvc.images.prepull.service import Prepull
from imgsvc.images.provenance import Provenance
from imgsvc.images.pull import Puller
from imgsvc.images.records import ImageStore
from imgsvc.images.rootfs import ContainerRoots
from imgsvc.images.telemetry.events import EventBus
from imgsvc.images.telemetry.metrics import Gauge, Page
from imgsvc.images.telemetry.observer import Observer
from imgsvc.images.verification.policy import Policy, load_policy
from imgsvc.images.verification.programs import Programs
from imgsvc.images.verification.service import Verification
from imgsvc.images.verification.signatures import Signatures
from imgsvc.registry.interfaces import Registry
from imgsvc.runtime.interfaces import RootMount
from imgsvc.snapshot.interfaces import Mount
from imgsvc.snapshot.mount import mount_all
from imgsvc.snapshot.unpack.tarstream import TarStream

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
    policy, programs = _judges(settings, threads)
    return Verification(
        policy=policy,
        programs=programs,
        signatures=Signatures(registry),
        db=db,
        threads=threads,
        fail_closed=settings.verify.fail_closed,
    )


def _judges(settings: Config, threads: Threads) -> tuple[Callable[[], Policy] | None, Programs]:
    verify = settings.verify
    programs = Programs(Path(verify.bin_dir), verify.max_verifiers, verify.per_verifier_timeout, threads)
    if not verify.policy:
        return None, programs
    policy = Path(verify.policy)
    load_policy(policy)
    return partial(load_policy, policy), programs


@dataclass(frozen=True, slots=True)
class Parts:
    """What the image side is built on."""

    root: Path
    registry: Registry
    content: Store
    images: ImageStore
    puller: Puller
    provenance: Provenance
    leases: LeaseManager
    db: MetaDB
    threads: Threads
    verification: Verification
    roots: ContainerRoots
    snapshotter: str


async def start_image_side(settings: Config, parts: Parts, watch: Watch, stack: AsyncExitStack) -> tuple[ImageTools, list[Live]]:
    """Start what is configured; `stack` gets what ends it. Returns what can change while it runs, too.

    Raises: Unavailable (an address is taken), InvalidArgument.
    """
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
    lives = await _start_mirror(settings, parts, watch, stack)
    life = asyncio.ensure_future(prepull.run())
    stack.push_async_callback(_stopped, life)
    mounts = ImageMounts(
        parts.images, parts.roots, parts.leases, parts.threads, parts.snapshotter, _mount_all, partial(kernel.umount, in_use=False)
    )

    def verify(loaded: Loaded) -> Commit:
        policy, programs = _judges(loaded.config, parts.threads)
        return partial(parts.verification.go_by, policy, programs, fail_closed=loaded.config.verify.fail_closed)

    lives += [
        Live(("verify",), verify),
        Live(("prepull",), lambda loaded: partial(prepull.watch, Path(loaded.config.prepull.directory))),
    ]
    return ImageTools(archives, prepull, watch.bus, mounts, snapshotter=parts.snapshotter), lives


def _mount_all(mounts: Sequence[RootMount], target: str) -> None:
    mount_all([Mount(mount.type, mount.source, mount.options) for mount in mounts], target)


async def _start_mirror(settings: Config, parts: Parts, watch: Watch, stack: AsyncExitStack) -> list[Live]:
    mirror = settings.mirror
    if not mirror.address:
        return []
    through = PullThrough(
        namespaces=mirror.pull_through,
        keep=timedelta(seconds=mirror.keep),
        registry=parts.registry,
        blobs=parts.puller.blobs,
        documents=parts.puller.documents,
        provenance=parts.provenance,
        content=parts.content,
        leases=parts.leases,
        threads=parts.threads,
        verifier=parts.verification,
        db=parts.db,
    )
    await through.tidy()
    service = Mirror(
        parts.images,
        parts.content,
        parts.threads,
        provenance=parts.provenance,
        check=parts.verification.check,
        private=mirror.private_images == "certificate",
        through=through,
        served=watch.observer.served,
    )
    tls = server_tls(mirror.tls_cert_file, mirror.tls_key_file, mirror.client_ca_file) if mirror.tls_cert_file else None
    await _listen("mirror", mirror.address, service.handle, stack, tls)

    def share(loaded: Loaded) -> Commit:
        new = loaded.config.mirror
        if tls is not None:
            server_tls(mirror.tls_cert_file, mirror.tls_key_file, mirror.client_ca_file)  # to see whether the files are good

        def commit() -> None:
            service.share(private=new.private_images == "certificate")
            through.fetch_for(new.pull_through, timedelta(seconds=new.keep))
            if tls is not None:
                tls.load_cert_chain(mirror.tls_cert_file, mirror.tls_key_file)  # OpenSSL takes what is loaded last

        return commit

    return [Live(("mirror.private_images", "mirror.pull_through", "mirror.keep"), share)]


async def _listen(name: str, address: str, handler: Handler, stack: AsyncExitStack, tls: ssl.SSLContext | None = None) -> None:
    if not address:
        return
    server = HttpServer(handler, name)
    await server.start(address, tls)
    stack.push_async_callback(server.close)
    log.info("%s: listening on %s://%s, port %d", name, "https" if tls else "http", address, server.port)


async def _stopped(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
