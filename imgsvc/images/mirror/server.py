"""The local store as a read-only registry, so that one node can be the mirror of others.

Manifests by tag and digest, blobs with ranges, referrers; no catalogue, no tag lists, nothing is ever written. Clients
name the registry they want an image of in one of two ways:

    ns=docker.io                        as containerd asks its mirrors: /v2/library/app/manifests/1?ns=docker.io
    /v2/docker.io/library/app/…         as a registries.conf of Podman and skopeo can be told to; host_5000 is host:5000

Access: an image that this node got without credentials is for every client that can connect, and so is one that
was imported. One that took credentials is not found (404) for every client, unless private_images = "certificate" and the
client showed a certificate. A blob is served only as part of an image that has the name it is asked under. Images that
may not be used here (verification) are not handed on either.

The price of simplicity: an index is served as it is, also when only this node's platform is stored. Clients of another
platform get a 404 for their manifest and go on to the next host of their configuration.

Source: OCI distribution-spec 1.1; containerd docs/hosts.md (ns).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from imgsvc.base.concurrency import Threads
from imgsvc.base.errors import ImgsvcError, InvalidArgument, NotFound, printable
from imgsvc.base.http1 import FileBody, Request, Response, StreamBody, parse_range
from imgsvc.base.oci import MAX_DOCUMENT, OCI_INDEX, Descriptor, Digest, Manifest, parse_document
from imgsvc.base.reference import DEFAULT_HOST, Reference
from imgsvc.content.interfaces import Provider
from imgsvc.images.mirror.cache import PullThrough
from imgsvc.images.provenance import Provenance
from imgsvc.images.records import Image, ImageStore
from imgsvc.registry.interfaces import PullFailed

log = logging.getLogger(__name__)

_ROUTE = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|referrers)/(?P<target>[^/]+)", re.ASCII)
_HOST_PORT = re.compile(r"(?P<host>[a-z0-9.-]+)_(?P<port>[0-9]{1,5})", re.ASCII)
_STATUS: Final = {
    "NOT_FOUND": 404,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 404,
    "INVALID_ARGUMENT": 400,
    "DATA_LOSS": 502,
    "UNAVAILABLE": 502,
    "DEADLINE_EXCEEDED": 504,
    "RESOURCE_EXHAUSTED": 503,
}
# What a registry behind this cache said. Its refusal of this node says nothing of the client.
_UPSTREAM: Final = {**_STATUS, "PERMISSION_DENIED": 404, "RESOURCE_EXHAUSTED": 429}
_CODES: Final = {429: "TOOMANYREQUESTS", 404: "MANIFEST_UNKNOWN", 403: "DENIED", 400: "NAME_INVALID", 416: "RANGE_INVALID"}
_VERSION: Final = ("Docker-Distribution-Api-Version", "registry/2.0")


class Mirror:
    """Answers the requests of an HttpServer.

    check: raises for an image that may not be used; private: whether clients with a certificate may have images that
    took credentials; through: fetches what is not stored; served: called for every answer with its size [bytes].
    """

    def __init__(
        self,
        images: ImageStore,
        content: Provider,
        threads: Threads,
        *,
        provenance: Provenance,
        check: Callable[[Image], Awaitable[None]],
        private: bool,
        through: PullThrough | None = None,
        served: Callable[[str, int], None] = lambda kind, size: None,
    ) -> None:
        self._images = images
        self._content = content
        self._threads = threads
        self._provenance = provenance
        self._check = check
        self._private = private
        self._through = through
        self._served = served

    def share(self, *, private: bool) -> None:
        """Change whether clients with a certificate may have images that took credentials."""
        self._private = private

    async def handle(self, request: Request) -> Response:
        """An http1.Handler."""
        if request.path in ("/v2", "/v2/"):
            return Response(200, [_VERSION, ("Content-Type", "application/json")], b"{}")
        route = _ROUTE.fullmatch(request.path)
        if route is None:
            return _problem(404, "nothing is offered here but manifests, blobs and referrers of single images")
        try:
            name = repository(route["name"], request.query.get("ns", [""])[0])
            response = await self._serve(name, route["kind"], route["target"], request)
        except ImgsvcError as error:
            status = (_UPSTREAM if isinstance(error, PullFailed) else _STATUS).get(error.code, 500)
            if status == 500:
                log.error("mirror: %s %s: %s", request.method, request.path, error)
            return _problem(status, str(error) if status != 500 else "the store cannot be read")
        if request.method == "GET":
            self._served(route["kind"], response.length)
        return response

    async def _serve(self, name: Reference, kind: str, target: str, request: Request) -> Response:
        if kind == "referrers":
            return await self._referrers(name, Digest(target), request)
        if kind == "blobs":
            return await self._blob_of(name, Digest(target), request)
        wanted = name.with_digest(Digest(target)) if ":" in target else Reference(name.host, name.repository, _tag(target))
        if self._through is not None and self._through.covers(name) and not wanted.digest:
            try:
                return _document(*await self._through.manifest(wanted, private=self._trusts(request)))
            except PullFailed as error:
                # The registry decides what a tag names; when it does not answer, a stored image is served.
                log.info("mirror: %s", error)
                with contextlib.suppress(NotFound):
                    return await self._here(wanted, request)
                raise
        try:
            return await self._here(wanted, request)
        except NotFound:
            if self._through is None or not self._through.covers(name) or not wanted.digest:
                raise
            return _document(*await self._through.manifest(wanted, private=self._trusts(request)))

    async def _here(self, wanted: Reference, request: Request) -> Response:
        digest = await self._manifest_here(wanted, request)
        return _document(digest, await self._threads.run(_read, self._content, digest))

    async def _manifest_here(self, wanted: Reference, request: Request) -> Digest:
        """The digest of a manifest of an image on this node. Raises: NotFound, PermissionDenied."""
        if wanted.digest:
            await self._check(self._owner(wanted, wanted.digest, request, blobs=False))
            return wanted.digest
        image = self._images.find(wanted.tagged)
        if image is None or not self._may_have(wanted, image.documents[0], request):
            raise NotFound(f"{wanted} is not on this node")
        await self._check(image)
        return image.documents[0]

    async def _blob_of(self, name: Reference, digest: Digest, request: Request) -> Response:
        try:
            await self._check(self._owner(name, digest, request, blobs=True))
            return await self._blob(digest, request)
        except NotFound:
            if self._through is None or not self._through.covers(name):
                raise
        blob = await self._through.blob(name, digest, private=self._trusts(request))
        if await self._threads.run(self._content.info, digest) is not None:
            return await self._blob(digest, request)
        status, headers, offset, count = _part(digest, blob.size, request)
        if status == 416 or request.method == "HEAD":
            return Response(status, headers, StreamBody(_nothing(), count))
        return Response(status, headers, await self._through.stream(name, blob, offset, count, private=self._trusts(request)))

    def _trusts(self, request: Request) -> bool:
        """Whether the client may have what takes credentials."""
        return self._private and request.client != ""

    def _owner(self, name: Reference, digest: Digest, request: Request, *, blobs: bool) -> Image:
        """An image of that name that consists of the digest and that the client may have."""
        for image in self._named(name):
            parts = {*image.documents, *(layer.descriptor.digest for layer in image.layers)} if blobs else set(image.documents)
            if digest in parts and self._may_have(name, digest, request):
                return image
        raise NotFound(f"{name.name} has no {digest} on this node")

    def _named(self, name: Reference) -> list[Image]:
        return self._images.of_repository(name.name)

    def _may_have(self, name: Reference, digest: Digest, request: Request) -> bool:
        return self._trusts(request) or self._provenance.may_hand_on(name.name, digest)

    async def _blob(self, digest: Digest, request: Request) -> Response:
        fd, size = await self._threads.run(_open, self._content, digest)
        status, headers, offset, count = _part(digest, size, request)
        return Response(status, headers, FileBody(fd, offset, count))

    async def _referrers(self, name: Reference, digest: Digest, request: Request) -> Response:
        """Images and artifacts of that name whose subject it is. None known is a 404: another registry may know more."""
        wanted = request.query.get("artifactType", [""])[0]
        found = []
        for image in self._named(name):
            if not self._may_have(name, image.manifest.digest, request):
                continue
            entry = await self._threads.run(_referrer, self._content, image, digest)
            if entry is not None and (not wanted or entry.artifact_type == wanted):
                found.append(entry.to_json())
        if not found:
            raise NotFound(f"no referrers of {digest} are on this node")
        headers = [_VERSION, ("Content-Type", OCI_INDEX)] + ([("OCI-Filters-Applied", "artifactType")] if wanted else [])
        return Response(200, headers, json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}).encode())


def repository(path: str, namespace: str) -> Reference:
    """Host and repository that a request means. Raises: InvalidArgument."""
    if namespace:
        return _plain(f"{namespace}/{path}")
    first, slash, rest = path.partition("/")
    port = _HOST_PORT.fullmatch(first)
    if slash and port and ("." in first or port["host"] == "localhost"):
        return _plain(f"{port['host']}:{port['port']}/{rest}")
    return _plain(path if slash and ("." in first or first == "localhost") else f"{DEFAULT_HOST}/{path}")


def _part(digest: Digest, size: int, request: Request) -> tuple[int, list[tuple[str, str]], int, int]:
    """Status, headers, offset and count of what a request wants of a blob."""
    headers = [
        _VERSION,
        ("Content-Type", "application/octet-stream"),
        ("Docker-Content-Digest", digest),
        ("ETag", f'"{digest}"'),
        ("Accept-Ranges", "bytes"),
    ]
    # A blob never changes, so that If-Range is true whenever it names this digest.
    wanted = request.headers.get("range", "") if request.headers.get("if-range", f'"{digest}"') == f'"{digest}"' else ""
    try:
        part = parse_range(wanted, size) if wanted else None
    except ValueError:
        return 416, [_VERSION, ("Content-Range", f"bytes */{size}")], 0, 0
    if part is None:
        return 200, headers, 0, size
    offset, count = part
    return 206, [*headers, ("Content-Range", f"bytes {offset}-{offset + count - 1}/{size}")], offset, count


def _document(digest: Digest, data: bytes) -> Response:
    kind = parse_document(data, "", str(digest)).media_type
    return Response(200, [_VERSION, ("Content-Type", kind), ("Docker-Content-Digest", digest), ("ETag", f'"{digest}"')], data)


async def _nothing() -> AsyncIterator[FileBody]:
    for part in list[FileBody]():
        yield part


def _plain(text: str) -> Reference:
    reference = Reference.parse(text)
    if reference.digest or reference.tagged != f"{reference.name}:latest" or text.endswith(":latest"):
        raise InvalidArgument(f'"{printable(text, 160)}" is not a repository')
    return reference


def _tag(text: str) -> str:
    return Reference.parse(f"x.y/z:{text}").tag


def _read(content: Provider, digest: Digest) -> bytes:
    with content.reader(digest) as reader:
        return reader.read_at(0, MAX_DOCUMENT)


def _open(content: Provider, digest: Digest) -> tuple[int, int]:
    with content.reader(digest) as reader:
        return os.dup(reader.fileno()), reader.size


def _referrer(content: Provider, image: Image, digest: Digest) -> Descriptor | None:
    document = parse_document(_read(content, image.manifest.digest), "", str(image.manifest.digest))
    if document.subject is None or document.subject.digest != digest:
        return None
    artifact = (document.artifact_type or document.config.media_type) if isinstance(document, Manifest) else ""
    return Descriptor(document.media_type, image.manifest.digest, image.manifest.size, dict(document.annotations), artifact_type=artifact)


def _problem(status: int, message: str) -> Response:
    body = {"errors": [{"code": _CODES.get(status, "UNKNOWN"), "message": message}]}
    return Response(status, [_VERSION, ("Content-Type", "application/json")], json.dumps(body).encode())
