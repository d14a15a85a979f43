"""The administrative service beside CRI: pulls and pushes with progress, inspection, tags, store care.

Source: imgsvc/api/admin.proto.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc.aio

from imgsvc import config
from imgsvc.api import admin_pb2, admin_pb2_grpc
from imgsvc.base.concurrency import stop_tasks
from imgsvc.base.errors import InvalidArgument, NotFound, printable
from imgsvc.base.oci import Digest, Platform
from imgsvc.base.reference import Reference
from imgsvc.config import Loaded
from imgsvc.daemon.services.cri_images import describe
from imgsvc.images.pull import Puller, PullRequest
from imgsvc.images.push import Pusher, PushRequest
from imgsvc.images.records import ImageStore
from imgsvc.registry.interfaces import Credential

Context = grpc.aio.ServicerContext[Any, Any]

_PROGRESS_INTERVAL = 0.1  # [s] between two progress events of one layer; a terminal shows no more


class Care(Protocol):
    """Store care; each call returns what its command prints as JSON."""

    async def disk_usage(self) -> dict[str, Any]:
        """`imgsvc df`."""

    async def collect(self, explain: bool, migrate: bool) -> dict[str, Any]:
        """`imgsvc gc`; with `explain`, why each thing stays or goes, and nothing is removed; with `migrate`, images move first."""

    async def check(self, deep: bool, repair: bool) -> dict[str, Any]:
        """`imgsvc fsck`."""


class AdminService(admin_pb2_grpc.AdminServicer):
    """What the CLI asks that CRI has no call for."""

    def __init__(
        self,
        images: ImageStore,
        puller: Puller,
        pusher: Pusher,
        care: Care,
        *,
        snapshotter: str,
        loaded: Callable[[], Loaded],
        on_removed: Callable[[], None],
    ) -> None:
        self._images = images
        self._puller = puller
        self._pusher = pusher
        self._care = care
        self._snapshotter = snapshotter
        self._loaded = loaded
        self._on_removed = on_removed

    async def Pull(self, request: admin_pb2.PullRequest, context: Context) -> AsyncIterator[admin_pb2.PullEvent]:
        """Pull with progress; the last event carries the image ID. Leaving the stream cancels the pull."""
        reporter = _Reporter()
        wanted = PullRequest(
            reference=Reference.parse(request.reference),
            credential=_credential(request.username, request.password),
            platform=Platform.parse(request.platform) if request.platform else Platform.host(),
            snapshotter=request.snapshotter or self._snapshotter,
            reporter=reporter,
        )
        async for event in _events(task := asyncio.ensure_future(self._puller.pull(wanted)), reporter):
            yield event
        pulled = task.result()
        done = admin_pb2.PullDone(image_id=pulled.image.image_id, timings_json=json.dumps(pulled.timings))
        yield admin_pb2.PullEvent(done=done)

    async def Push(self, request: admin_pb2.PushRequest, context: Context) -> AsyncIterator[admin_pb2.PushEvent]:
        """Push with progress; the last event says what was pushed. Leaving the stream cancels the push."""
        reporter = _Reporter()
        wanted = PushRequest(Reference.parse(request.reference), _credential(request.username, request.password), reporter)
        async for event in _events(task := asyncio.ensure_future(self._pusher.push(wanted)), reporter):
            yield admin_pb2.PushEvent(blob=event.layer)
        pushed = task.result()
        yield admin_pb2.PushEvent(done=admin_pb2.PushDone(digest=pushed.target.digest, sent=pushed.sent, left_out=pushed.left_out))

    async def Inspect(self, request: admin_pb2.InspectRequest, context: Context) -> admin_pb2.JsonReply:
        """Everything known of one image."""
        image = self._images.find(request.image)
        if image is None:
            raise NotFound(f"{_full_name(request.image)} is not on this node", hint="see `imgsvc images`, or pull it")
        return _json({**describe(image), "pinned": self._images.pinned(image)})

    async def Tag(self, request: admin_pb2.TagRequest, context: Context) -> admin_pb2.TagReply:
        """One more name for an image."""
        image = await self._images.tag(request.source, Reference.parse(request.target))
        return admin_pb2.TagReply(image_id=image.image_id)

    async def Untag(self, request: admin_pb2.UntagRequest, context: Context) -> admin_pb2.UntagReply:
        """Remove one name; by ID, the image with all its names."""
        image = self._images.find(request.image)
        if image is None:
            return admin_pb2.UntagReply(found=False)
        by_id = request.image.removeprefix("sha256:") in image.image_id
        await (self._images.remove(image.image_id) if by_id else self._images.untag(request.image))
        self._on_removed()
        return admin_pb2.UntagReply(found=True)

    async def Config(self, request: admin_pb2.ConfigRequest, context: Context) -> admin_pb2.ConfigReply:
        """The configuration this daemon runs with."""
        loaded = self._loaded()
        toml, values = config.to_toml(loaded.config, loaded.origins), config.to_json(loaded.config, loaded.origins)
        return admin_pb2.ConfigReply(toml=toml, json=json.dumps(values))

    async def DiskUsage(self, request: admin_pb2.DiskUsageRequest, context: Context) -> admin_pb2.JsonReply:
        """`imgsvc df`."""
        return _json(await self._care.disk_usage())

    async def Collect(self, request: admin_pb2.CollectRequest, context: Context) -> admin_pb2.JsonReply:
        """`imgsvc gc`."""
        return _json(await self._care.collect(request.explain, request.migrate))

    async def Check(self, request: admin_pb2.CheckRequest, context: Context) -> admin_pb2.JsonReply:
        """`imgsvc fsck`."""
        return _json(await self._care.check(request.deep, request.repair))


class _Reporter:
    """A PullReporter that keeps only the newest state of each layer, so a slow reader costs no memory."""

    def __init__(self) -> None:
        self._events: dict[str, admin_pb2.PullEvent] = {}
        self._layers: dict[str, admin_pb2.LayerProgress] = {}
        self._unpacked: dict[str, int] = {}
        self._news = asyncio.Event()
        self._ended = False

    def resolved(self, digest: Digest, endpoint: str) -> None:
        """As PullReporter."""
        self._put("", admin_pb2.PullEvent(resolved=admin_pb2.PullResolved(digest=digest, endpoint=endpoint)))

    def layer(self, digest: Digest, size: int, downloaded: int, state: str) -> None:
        """As PullReporter."""
        done = size if state in ("done", "exists") else self._unpacked.get(digest, 0)
        progress = admin_pb2.LayerProgress(digest=digest, size=size, downloaded=downloaded, state=state, unpacked=done)
        self._layers[digest] = progress
        # Waiting layers are reported before later ones, so that a client knows the total.
        self._put(f"{digest} waiting" if state == "waiting" else digest, admin_pb2.PullEvent(layer=progress))

    def unpacked(self, digest: Digest, count: int) -> None:
        """As PullReporter."""
        self._unpacked[digest] = count
        if (last := self._layers.get(digest)) is not None:
            self.layer(digest, last.size, last.downloaded, last.state)

    def end(self) -> None:
        """Nothing more will be reported."""
        self._ended = True
        self._news.set()

    def _put(self, key: str, event: admin_pb2.PullEvent) -> None:
        self._events[key] = event
        self._news.set()

    async def next(self) -> admin_pb2.PullEvent | None:
        """The next event, None after the last."""
        if not self._events and not self._ended:
            await self._news.wait()
            if not self._ended:
                await asyncio.sleep(_PROGRESS_INTERVAL if "" not in self._events else 0)
        self._news.clear()
        if self._events:
            return self._events.pop(next(iter(self._events)))
        return None


async def _events(task: asyncio.Future[Any], reporter: _Reporter) -> AsyncIterator[admin_pb2.PullEvent]:
    """The reporter's messages while the task runs; at the end the task is done. Raises: what the task raises."""
    task.add_done_callback(lambda _: reporter.end())
    try:
        while (event := await reporter.next()) is not None:
            yield event
        await task
    finally:
        await stop_tasks(task)


def _credential(username: str, password: str) -> Credential | None:
    return Credential("command line", username, password) if username else None


def _full_name(text: str) -> str:
    """As it was looked for: the normalised name, or the ID as it was given."""
    try:
        return f"image {Reference.parse(text)}"
    except InvalidArgument:
        return f'image "{printable(text, 200)}"'


def _json(value: dict[str, Any]) -> admin_pb2.JsonReply:
    return admin_pb2.JsonReply(json=json.dumps(value))
