"""The other half of a registry client: upload, tags, referrers, delete.

Source: distribution-spec 1.1 "Push", "Content discovery", "Content management".
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx

from imgsvc.base.errors import ImgsvcError, InvalidArgument, printable
from imgsvc.base.oci import MAX_DOCUMENT, MIB, Descriptor, Digest, Index, load_json_object, parse_document
from imgsvc.base.reference import Reference
from imgsvc.registry.documents import ACCEPT_HEADER, announced_digest, lied, media_type_of, read_document
from imgsvc.registry.endpoint import Ask, Endpoint
from imgsvc.registry.hosts.hosts import Capability
from imgsvc.registry.http.exchange import RequestFailed, header_of, url_of
from imgsvc.registry.interfaces import BlobReader, Credential, Repository
from imgsvc.registry.operation import Operations
from imgsvc.registry.redirects import target
from imgsvc.registry.retry import Failure

T = TypeVar("T")

_READ_SIZE: Final = MIB  # [bytes] of a blob in memory during an upload
_MAX_PAGES: Final = 1000  # of a listing; 1000 entries each
_PAGE: Final = "1000"
_NEXT = re.compile(r'<([^>]*)>\s*;(?:[^,]*;)?\s*rel="?next"?')
_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,19})", re.ASCII)


class RemoteRepository:
    """Implements Repository."""

    def __init__(self, operations: Operations, reference: Reference, credential: Credential | None) -> None:
        self._operations = operations
        self._reference = reference
        self._credential = credential

    async def has_blob(self, digest: Digest) -> bool:
        """As Repository.has_blob."""
        return await self._push(lambda endpoint: self._has_blob(endpoint, digest), f"{digest} not looked up")

    async def push_blob(self, descriptor: Descriptor, reader: BlobReader, *, mount_from: str = "", chunk_size: int = 0) -> bool:
        """As Repository.push_blob."""

        async def push(endpoint: Endpoint) -> bool:
            if await self._has_blob(endpoint, descriptor.digest):
                return False
            upload = await self._start(endpoint, descriptor.digest, mount_from)
            if not upload:
                return False
            if chunk_size:
                upload = await self._send_chunks(endpoint, upload, descriptor, reader, chunk_size)
                body: bytes | AsyncIterator[bytes] = b""
            else:
                body = _pieces(reader, 0, descriptor.size)
            await self._finish(endpoint, upload, descriptor, body)
            return True

        return await self._push(push, f"blob {descriptor.digest} not pushed")

    async def push_manifest(self, data: bytes, media_type: str, target: str) -> Descriptor:
        """As Repository.push_manifest."""
        digest = Digest.of(data, target.partition(":")[0] if ":" in target else "sha256")
        if ":" in target and target != digest:
            raise InvalidArgument(f"the manifest has digest {digest}, not {target}", where=self._reference.name)

        async def push(endpoint: Endpoint) -> Descriptor:
            ask = _ask(
                endpoint, "PUT", f"manifests/{target}", "pull,push", ok={200, 201, 202}, headers=(("Content-Type", media_type),), body=data
            )
            async with aclosing(await endpoint.ask(ask)) as response:
                if (announced := announced_digest(response)) and announced != digest and announced.algorithm == digest.algorithm:
                    raise lied(response, f"the registry stored {announced} instead of {digest}")
            return Descriptor(media_type, digest, len(data))

        return await self._push(push, f"manifest {digest} not pushed")

    async def tags(self) -> list[str]:
        """As Repository.tags."""

        async def collect(endpoint: Endpoint) -> list[str]:
            found: list[str] = []
            async for page in self._pages(endpoint, _ask(endpoint, "GET", "tags/list", "pull", query=(("n", _PAGE),))):
                names = page.get("tags") or []
                if isinstance(names, list):
                    found += [name for name in names if isinstance(name, str)]
            return found

        operation = await self._operations.operation(self._reference, self._credential)
        return await operation.run(Capability.RESOLVE, collect, f"tags of {self._reference.name} not listed")

    async def referrers(self, digest: Digest, artifact_type: str = "") -> list[Descriptor]:
        """As Repository.referrers."""

        async def collect(endpoint: Endpoint) -> list[Descriptor]:
            try:
                found = await self._from_api(endpoint, digest, artifact_type)
            except RequestFailed as error:
                if error.status != 404:
                    raise
                found = await self._from_tag(endpoint, digest)
            return [entry for entry in found if not artifact_type or entry.artifact_type == artifact_type]

        operation = await self._operations.operation(self._reference, self._credential)
        return await operation.run(Capability.REFERRERS, collect, f"referrers of {digest} not listed")

    async def delete(self, target: str) -> None:
        """As Repository.delete."""
        await self._delete(f"manifests/{target}", target)

    async def delete_blob(self, digest: Digest) -> None:
        """As Repository.delete_blob."""
        await self._delete(f"blobs/{digest}", digest)

    async def _push(self, action: Callable[[Endpoint], Awaitable[T]], what: str) -> T:
        """On the first host that takes pushes, and on no other: half an image on each of two hosts is useless."""
        operation = await self._operations.operation(self._reference, self._credential)
        return await operation.failover(operation.endpoints(Capability.PUSH)[:1]).run(action, what)

    async def _has_blob(self, endpoint: Endpoint, digest: Digest) -> bool:
        async with aclosing(await endpoint.ask(_ask(endpoint, "HEAD", f"blobs/{digest}", "pull,push", ok={200, 404}))) as response:
            return response.status_code == 200

    async def _start(self, endpoint: Endpoint, digest: Digest, mount_from: str) -> str:
        """Open an upload session, or mount. Returns its URL, "" when the blob is there now."""
        query: tuple[tuple[str, str], ...] = ()
        also: tuple[str, ...] = ()
        if source := endpoint.host.repository(mount_from) if mount_from else "":
            query, also = (("mount", digest), ("from", source)), (f"repository:{source}:pull",)
        ask = _ask(endpoint, "POST", "blobs/uploads/", "pull,push", ok={201, 202}, query=query, also=also)
        async with aclosing(await endpoint.ask(ask)) as response:
            return "" if response.status_code == 201 else self._location(endpoint, response)

    def _location(self, endpoint: Endpoint, response: httpx.Response) -> str:
        location = header_of(response, "location")
        if not location:
            raise lied(response, "an upload session without a Location", code="UNAVAILABLE")
        return target(url_of(response), location, "push")

    async def _send_chunks(self, endpoint: Endpoint, upload: str, descriptor: Descriptor, reader: BlobReader, chunk_size: int) -> str:
        """PATCH piece after piece; after a failure the registry is asked how far it got."""
        offset, failures = 0, 0
        while offset < descriptor.size:
            count = min(chunk_size, descriptor.size - offset)
            ask = _ask(
                endpoint,
                "PATCH",
                upload,
                "pull,push",
                ok={202, 204},
                headers=(("Content-Type", "application/octet-stream"), ("Content-Range", f"{offset}-{offset + count - 1}")),
            )
            try:
                async with aclosing(await endpoint.ask(replace(ask, body=_pieces(reader, offset, count), length=count))) as response:
                    upload = self._location(endpoint, response)
                offset, failures = offset + count, 0
            except RequestFailed as error:
                failures += 1
                if (error.failure is Failure.DEFINITE and error.status != 416) or failures > 2:
                    raise
                upload, offset = await self._progress(endpoint, upload)
        return upload

    async def _progress(self, endpoint: Endpoint, upload: str) -> tuple[str, int]:
        async with aclosing(await endpoint.ask(_ask(endpoint, "GET", upload, "pull,push", ok={204}))) as response:
            match = _RANGE.fullmatch(header_of(response, "range").strip())
            # "0-0" can mean nothing or one byte; nothing is the safe reading, the registry refuses an overlap.
            return self._location(endpoint, response), int(match[1]) + 1 if match and match[1] != "0" else 0

    async def _finish(self, endpoint: Endpoint, upload: str, descriptor: Descriptor, body: bytes | AsyncIterator[bytes]) -> None:
        parts = urlsplit(upload)
        url = parts._replace(query=urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("digest", descriptor.digest)])).geturl()
        ask = _ask(endpoint, "PUT", url, "pull,push", ok={201, 202, 204}, headers=(("Content-Type", "application/octet-stream"),))
        if not isinstance(body, bytes):
            ask = replace(ask, body=body, length=descriptor.size)
        async with aclosing(await endpoint.ask(ask)):
            pass

    async def _from_api(self, endpoint: Endpoint, digest: Digest, artifact_type: str) -> list[Descriptor]:
        query = (("artifactType", artifact_type),) if artifact_type else ()
        found: list[Descriptor] = []
        async for page in self._pages(endpoint, _ask(endpoint, "GET", f"referrers/{digest}", "pull", query=query)):
            manifests = page.get("manifests") or []
            if isinstance(manifests, list):
                found += [Descriptor.from_json(entry, f"referrers of {digest}") for entry in manifests]
        return found

    async def _from_tag(self, endpoint: Endpoint, digest: Digest) -> list[Descriptor]:
        """The fallback of the specification: an index under the tag `sha256-<hex>`."""
        ask = _ask(endpoint, "GET", f"manifests/{digest.replace(':', '-')}", "pull", ok={200, 404}, headers=(ACCEPT_HEADER,))
        async with aclosing(await endpoint.ask(ask)) as response:
            if response.status_code == 404:
                return []
            body = await read_document(response, MAX_DOCUMENT)
            document = _trusted(response, lambda: parse_document(body, media_type_of(response), f"referrers of {digest}"))
            return list(document.manifests) if isinstance(document, Index) else []

    async def _pages(self, endpoint: Endpoint, ask: Ask) -> AsyncIterator[dict[str, object]]:
        """The JSON objects of a listing, following its `Link: …; rel="next"` within the same registry."""
        for _ in range(_MAX_PAGES):
            async with aclosing(await endpoint.ask(ask)) as response:
                body = await read_document(response, MAX_DOCUMENT)
                page = _trusted(response, lambda: load_json_object(body, url_of(response), limit=MAX_DOCUMENT))  # noqa: B023  # called at once
                link = _NEXT.search(header_of(response, "link"))
                following = target(url_of(response), link[1], "fetch") if link else ""
                if following and urlsplit(following)[:2] != urlsplit(url_of(response))[:2]:
                    raise lied(
                        response, f"a listing that continues at {printable(urlsplit(following).netloc, 80)}", code="PERMISSION_DENIED"
                    )
            yield page
            if not following:
                return
            ask = replace(ask, path=following, query=())

    async def _delete(self, path: str, target: str) -> None:
        async def delete(endpoint: Endpoint) -> None:
            async with aclosing(await endpoint.ask(_ask(endpoint, "DELETE", path, "delete,push", ok={200, 202, 204}))):
                pass

        await self._push(delete, f"{target} not deleted")


def _ask(
    endpoint: Endpoint,
    method: str,
    path: str,
    actions: str,
    *,
    ok: set[int] | None = None,
    query: tuple[tuple[str, str], ...] = (),
    headers: tuple[tuple[str, str], ...] = (),
    body: bytes = b"",
    also: tuple[str, ...] = (),
) -> Ask:
    full = path if path.startswith("http") else endpoint.path(path)
    scopes = (endpoint.scope(actions), *also)
    phase = "push" if "push" in actions else "fetch"
    return Ask(method, full, phase, scopes, query, headers, frozenset(ok or {200}), body)


def _trusted(response: httpx.Response, parse: Callable[[], T]) -> T:
    """A parse of the answer; what it refuses is the registry's fault."""
    try:
        return parse()
    except RequestFailed:
        raise
    except ImgsvcError as error:
        raise lied(response, error.what, code=error.code, hint=error.hint) from error


async def _pieces(reader: BlobReader, offset: int, count: int) -> AsyncIterator[bytes]:
    end = offset + count
    while offset < end:
        data = await reader.read_at(offset, min(_READ_SIZE, end - offset))
        if not data:
            raise InvalidArgument("the blob ended early while it was pushed", where=f"offset {offset}")
        offset += len(data)
        yield data


def remote_repository(operations: Operations, reference: Reference, credential: Credential | None) -> Repository:
    """A repository behind its interface."""
    return RemoteRepository(operations, reference, credential)
