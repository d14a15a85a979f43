"""The ImageTools service: protobuf in, use cases, protobuf out. Source: imgsvc/api/imagetools.proto."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from imgsvc.api import imagetools_pb2, imagetools_pb2_grpc
from imgsvc.base.errors import InvalidArgument
from imgsvc.base.oci import Platform
from imgsvc.images.archive.service import Archives, Target
from imgsvc.images.mounts import ImageMounts
from imgsvc.images.prepull.service import Prepull
from imgsvc.images.telemetry.events import EventBus

Context = grpc.aio.ServicerContext[Any, Any]


class ImageTools(imagetools_pb2_grpc.ImageToolsServicer):
    """Archives, pre-pull, events, mounts."""

    def __init__(self, archives: Archives, prepull: Prepull, bus: EventBus, mounts: ImageMounts, *, snapshotter: str) -> None:
        self._mounts = mounts
        self._archives = archives
        self._prepull = prepull
        self._bus = bus
        self._snapshotter = snapshotter

    async def Export(self, request: imagetools_pb2.ExportRequest, context: Context) -> AsyncIterator[imagetools_pb2.Chunk]:
        """`imgsvc export`."""
        async for chunk in self._archives.save(request.images):
            yield imagetools_pb2.Chunk(data=chunk)

    async def Import(self, requests: AsyncIterator[imagetools_pb2.ImportRequest], context: Context) -> imagetools_pb2.ImportReply:
        """`imgsvc import`."""
        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("options"):
            raise InvalidArgument("an import begins with its options")
        options = first.options
        platform = Platform.parse(options.platform) if options.platform else Platform.host()
        target = Target(options.repository, platform, options.snapshotter or self._snapshotter)
        loaded = await self._archives.load(_data(first.data, requests), options.name or "archive", target)
        images = [imagetools_pb2.ImportedImage(reference=str(reference), image_id=image.image_id) for reference, image in loaded]
        return imagetools_pb2.ImportReply(images=images)

    async def Prepull(self, request: imagetools_pb2.PrepullRequest, context: Context) -> imagetools_pb2.PrepullReply:
        """`imgsvc prepull --status` and `--now`."""
        if request.now:
            self._prepull.now()
        return imagetools_pb2.PrepullReply(json=json.dumps(self._prepull.status()))

    async def Events(self, request: imagetools_pb2.EventsRequest, context: Context) -> AsyncIterator[imagetools_pb2.Event]:
        """`imgsvc events`."""
        async for event in self._bus.listen():
            yield imagetools_pb2.Event(json=json.dumps(event.to_json()))

    async def Mount(self, request: imagetools_pb2.MountRequest, context: Context) -> imagetools_pb2.MountReply:
        """`imgsvc mount`."""
        return imagetools_pb2.MountReply(image_id=await self._mounts.mount(request.image, request.directory))

    async def Unmount(self, request: imagetools_pb2.UnmountRequest, context: Context) -> imagetools_pb2.UnmountReply:
        """`imgsvc unmount`."""
        await self._mounts.unmount(request.directory)
        return imagetools_pb2.UnmountReply()


async def _data(first: bytes, requests: AsyncIterator[imagetools_pb2.ImportRequest]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for request in requests:
        yield request.data
