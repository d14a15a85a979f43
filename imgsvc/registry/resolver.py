"""From a reference to a descriptor: HEAD, and GET where HEAD does not tell enough.

A tag is resolved only by hosts with the capability `resolve`; a digest may be looked up at any host that may be pulled
from. A host that may only resolve never gets a GET for content.

Source: distribution-spec "Pulling manifests".
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Final

import httpx

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.numerals import whole_number
from imgsvc.base.oci import MAX_DOCUMENT, Descriptor, Digest, parse_document
from imgsvc.base.reference import Reference
from imgsvc.registry.documents import ACCEPT_HEADER, MANIFESTS, announced_digest, check_is_manifest, lied, media_type_of, read_document
from imgsvc.registry.endpoint import Ask, Endpoint
from imgsvc.registry.failover import HealthBook
from imgsvc.registry.hosts.hosts import Capability
from imgsvc.registry.http.exchange import RequestFailed, header_of
from imgsvc.registry.interfaces import Resolved

# HEAD answers that make GET worth a try: 403 hides its reason, the others come from servers without HEAD.
_GET_INSTEAD: Final = frozenset({400, 403, 405, 501})


async def resolve_at(endpoint: Endpoint, reference: Reference, book: HealthBook) -> Resolved:
    """Ask one endpoint. Raises: RequestFailed."""
    try:
        resolved = await _head(endpoint, reference)
    except RequestFailed as error:
        if error.status not in _GET_INSTEAD or error.phase == "auth":
            raise
        if Capability.PULL not in endpoint.host.capabilities:
            raise
        resolved = None
    if resolved is None:
        resolved = await _get(endpoint, reference, book)
    return resolved


async def _head(endpoint: Endpoint, reference: Reference) -> Resolved | None:
    """None when the answer is fine but says too little."""
    async with aclosing(await endpoint.ask(_ask("HEAD", endpoint, reference))) as response:
        check_is_manifest(response)
        digest = announced_digest(response)
        kind, length = media_type_of(response), header_of(response, "content-length")
        _check_digest(response, digest, reference)
        size = whole_number(length, MAX_DOCUMENT) or 0
        if digest and kind in MANIFESTS and 0 < size <= MAX_DOCUMENT:
            return Resolved(Descriptor(kind, digest, size), endpoint.base)
        if size > MAX_DOCUMENT:
            raise lied(response, f"a manifest of {length[:20]} bytes; at most {MAX_DOCUMENT} are accepted", code="RESOURCE_EXHAUSTED")
        if Capability.PULL not in endpoint.host.capabilities:
            what = "HEAD does not tell digest, type and size, and this host may not be asked for content"
            raise lied(response, what, code="FAILED_PRECONDITION", hint='add "pull" to its capabilities')
    return None


async def _get(endpoint: Endpoint, reference: Reference, book: HealthBook) -> Resolved:
    async with aclosing(await endpoint.ask(_ask("GET", endpoint, reference))) as response:
        check_is_manifest(response)
        body = await read_document(response, MAX_DOCUMENT)
        algorithm = reference.digest.algorithm if reference.digest else "sha256"
        announced = announced_digest(response)
        digest = Digest.of(body, announced.algorithm if announced else algorithm)
        if announced and announced != digest:
            raise lied(response, f"bytes with digest {digest}, announced as {announced}")
        try:
            _check_digest(response, digest, reference)
        except RequestFailed:
            book.of(endpoint).quarantine(str(reference.digest))
            raise
        kind = media_type_of(response)
        try:
            document = parse_document(body, kind, str(reference))
        except ImgsvcError as error:
            raise lied(response, error.what, code=error.code, hint=error.hint) from error
    media_type = document.media_type
    return Resolved(Descriptor(media_type, digest, len(body)), endpoint.base, document=body)


def _check_digest(response: httpx.Response, digest: Digest | None, reference: Reference) -> None:
    if digest and reference.digest and digest.algorithm == reference.digest.algorithm and digest != reference.digest:
        raise lied(response, f"{digest} was answered for {reference.digest}")


def _ask(method: str, endpoint: Endpoint, reference: Reference) -> Ask:
    path = endpoint.path(f"manifests/{reference.target}")
    return Ask(method, path, "resolve", scopes=(endpoint.scope(),), headers=(ACCEPT_HEADER,))
