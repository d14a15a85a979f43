"""CRI ImageService v1: protobuf in, use cases, protobuf out. No logic of its own beyond that translation.

Source: CRI v1 api.proto; the kubelet and critest for the fields they compare.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

import grpc.aio

from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.base.oci import Platform
from imgsvc.base.reference import Reference
from imgsvc.decrypt.decryptor import recipients
from imgsvc.images.pull import Puller, PullRequest
from imgsvc.images.records import Image, ImageStore
from imgsvc.registry.auth.dockerconfig import credential_from_cri
from imgsvc.registry.interfaces import Credential
from imgsvc.runtime.spec.users import announced_user

Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)


class Usage(Protocol):
    """Where images live, how much they use, and whether they are whole."""

    async def is_whole(self, image: Image) -> bool:
        """Whether everything that using the image takes is on disk."""

    def image_fs(self) -> tuple[str, int, int]:
        """(directory, bytes, inodes) of blobs and image layers."""

    def container_fs(self) -> tuple[str, int, int]:
        """(directory, bytes, inodes) of containers' writable layers."""


class ImageService(cri_pb2_grpc.ImageServiceServicer):
    """The kubelet's view of images."""

    def __init__(
        self,
        images: ImageStore,
        puller: Puller,
        usage: Usage,
        *,
        snapshotter: str,
        handlers: dict[str, str],
        on_removed: Callable[[], None],
    ) -> None:
        """snapshotter: the default; handlers: RuntimeClass handler → its snapshotter; on_removed: wakes the collector."""
        self._images = images
        self._puller = puller
        self._usage = usage
        self._snapshotter = snapshotter
        self._handlers = handlers
        self._on_removed = on_removed

    async def PullImage(self, request: cri_pb2.PullImageRequest, context: Context) -> cri_pb2.PullImageResponse:
        """Pull and unpack; the answer is the image ID, the same that every listing shows (strict since Kubernetes 1.36)."""
        reference = Reference.parse(request.image.image)
        wanted = PullRequest(
            reference=reference,
            credential=_credential(request.auth) if request.HasField("auth") else None,
            platform=Platform.host(),
            snapshotter=self._snapshotter_of(request.image.runtime_handler),
        )
        pulled = await self._puller.pull(wanted)
        return cri_pb2.PullImageResponse(image_ref=pulled.image.image_id)

    async def ListImages(self, request: cri_pb2.ListImagesRequest, context: Context) -> cri_pb2.ListImagesResponse:
        """One entry per image ID with all its names."""
        return cri_pb2.ListImagesResponse(images=self._shown(self._select(request.filter)))

    async def StreamImages(self, request: cri_pb2.StreamImagesRequest, context: Context) -> AsyncIterator[cri_pb2.StreamImagesResponse]:
        """As ListImages, each image once, then the end."""
        for shown in self._shown(self._select(request.filter)):
            yield cri_pb2.StreamImagesResponse(images=[shown])

    async def ImageStatus(self, request: cri_pb2.ImageStatusRequest, context: Context) -> cri_pb2.ImageStatusResponse:
        """An absent image is OK with no image."""
        if not request.image.image:
            raise InvalidArgument("ImageStatus without an image", hint="name an image or an ID")
        image = self._images.find(request.image.image)
        if image is None or not await self._usage.is_whole(image):
            return cri_pb2.ImageStatusResponse()  # the kubelet pulls an image that has lost a part, and so heals it
        info = {"info": json.dumps(describe(image), sort_keys=True)} if request.verbose else {}
        return cri_pb2.ImageStatusResponse(image=self._image(image), info=info)

    async def RemoveImage(self, request: cri_pb2.RemoveImageRequest, context: Context) -> cri_pb2.RemoveImageResponse:
        """Forget the image with all its names; removing what is gone succeeds."""
        if not request.image.image:
            raise InvalidArgument("RemoveImage without an image", hint="name an image or an ID")
        image = self._images.find(request.image.image)
        if image is not None:
            await self._images.remove(image.image_id)
            self._on_removed()
        return cri_pb2.RemoveImageResponse()

    async def ImageFsInfo(self, request: cri_pb2.ImageFsInfoRequest, context: Context) -> cri_pb2.ImageFsInfoResponse:
        """Running totals, so that the kubelet's garbage collection decides on true numbers without a walk."""
        return cri_pb2.ImageFsInfoResponse(
            image_filesystems=[_filesystem(*self._usage.image_fs())],
            container_filesystems=[_filesystem(*self._usage.container_fs())],
        )

    def _select(self, wanted: cri_pb2.ImageFilter) -> list[Image]:
        if not wanted.image.image:
            return self._images.all()
        image = self._images.find(wanted.image.image)
        return [image] if image else []

    def _shown(self, images: list[Image]) -> Iterator[cri_pb2.Image]:
        """The images as CRI has them. What cannot be shown is left out: the kubelet needs the list more than one entry of it."""
        for image in images:
            try:
                yield self._image(image)
            except (ValueError, TypeError):
                log.exception("image %s is left out of a listing; remove it by its ID and pull it again", image.image_id)

    def _image(self, image: Image) -> cri_pb2.Image:
        out = cri_pb2.Image(
            id=image.image_id,
            repo_tags=image.repo_tags,
            repo_digests=image.repo_digests,
            size=max(image.size, 1),
            pinned=self._images.pinned(image),
            spec=cri_pb2.ImageSpec(image=image.image_id),
        )
        uid, username = announced_user(image.config.user)
        if uid is not None:
            out.uid.value = uid
        else:
            out.username = username
        return out

    def _snapshotter_of(self, handler: str) -> str:
        if not handler:
            return self._snapshotter
        if handler not in self._handlers:
            raise InvalidArgument(f'unknown runtime handler "{printable(handler, 80)}"', hint=f"this node has {', '.join(self._handlers)}")
        return self._handlers[handler]


def _credential(auth: cri_pb2.AuthConfig) -> Credential | None:
    """CRI's AuthConfig with all its fields; None when it is empty. Raises: InvalidArgument without showing the secret."""
    return credential_from_cri(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )


def describe(image: Image) -> dict[str, Any]:
    """Everything known about an image, for verbose status and `imgsvc inspect`. recipients: those a layer's key is wrapped for."""
    return {
        "id": image.image_id,
        "repoTags": list(image.repo_tags),
        "repoDigests": list(image.repo_digests),
        "manifest": image.manifest.to_json(),
        "size": image.size,
        "pulledAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(image.created_at)),
        "artifact": image.artifact,
        "chainID": image.config.chain_ids()[-1] if image.config.diff_ids else "",
        "layers": [
            {
                **layer.descriptor.to_json(),
                "diffID": layer.diff_id,
                "snapshot": layer.snapshot,
                "encrypted": layer.encrypted,
                "recipients": [{"scheme": r.scheme, "name": r.name} for r in recipients(layer.descriptor)],
                "from": image.provenance.get("blobs", {}).get(layer.descriptor.digest, {}),
            }
            for layer in image.layers
        ],
        "resolvedBy": image.provenance.get("resolved_by", ""),
        "credentials": list(image.provenance.get("credentials", ())),  # names of their sources
        "imageSpec": dict(image.config.raw),
    }


def _filesystem(path: str, size: int, inodes: int) -> cri_pb2.FilesystemUsage:
    return cri_pb2.FilesystemUsage(
        timestamp=time.time_ns(),
        fs_id=cri_pb2.FilesystemIdentifier(mountpoint=path),
        used_bytes=cri_pb2.UInt64Value(value=size),
        inodes_used=cri_pb2.UInt64Value(value=inodes),
    )
