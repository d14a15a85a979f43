"""Manifests and other small blobs: reading them from an answer without trusting it. Raises RequestFailed with Failure.LIED."""

from __future__ import annotations

import zlib
from typing import Final

import httpx
import zstandard

from imgsvc.base.errors import InvalidArgument, ResourceExhausted, printable
from imgsvc.base.oci import ACCEPT, INDEX_TYPES, MANIFEST_TYPES, MIB, Descriptor, Digest
from imgsvc.registry.http.exchange import RequestFailed, header_of, phase_of, read_body, url_of
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.retry import Failure

MANIFESTS: Final = INDEX_TYPES | MANIFEST_TYPES
_ZSTD_WINDOW: Final = 8 * MIB  # [bytes] of memory; RFC 8878 asks decoders for no more
ACCEPT_HEADER: Final = ("Accept", ", ".join((*ACCEPT, "*/*;q=0.1")))


def lied(response: httpx.Response, what: str, *, code: str = "DATA_LOSS", hint: str = "") -> RequestFailed:
    """The error for an answer that cannot be true."""
    return RequestFailed(
        what,
        code=code,
        failure=Failure.LIED,
        phase=phase_of(response),
        status=response.status_code,
        where=shown_url(url_of(response)),
        hint=hint,
    )


def media_type_of(response: httpx.Response) -> str:
    """Content-Type without parameters, lower case."""
    return header_of(response, "content-type").partition(";")[0].strip().lower()


def check_is_manifest(response: httpx.Response) -> None:
    """A web page where a manifest should be is nearly always a wrong path in hosts.toml."""
    kind = media_type_of(response)
    if kind in ("text/html", "text/plain", "application/xhtml+xml"):
        what = f"{kind} instead of a manifest from {shown_url(url_of(response))}"
        raise lied(response, what, code="FAILED_PRECONDITION", hint="is the path in hosts.toml right (override_path)?")


def announced_digest(response: httpx.Response) -> Digest | None:
    """Docker-Content-Digest, checked; None when absent. Raises: RequestFailed."""
    text = header_of(response, "docker-content-digest")
    if not text:
        return None
    try:
        return Digest(text)
    except InvalidArgument as error:
        raise lied(response, f'invalid Docker-Content-Digest "{printable(text, 100)}"', code="INVALID_ARGUMENT") from error


async def read_document(response: httpx.Response, limit: int) -> bytes:
    """The body, decoded where the server compressed it although we asked it not to; never more than `limit` bytes."""
    try:
        body = await read_body(response, limit)
        encoding = header_of(response, "content-encoding").strip().lower()
        return body if encoding in ("", "identity") else _decoded(body, encoding, limit, response)
    except ResourceExhausted as error:
        raise lied(response, f"a document of more than {limit} bytes", code="RESOURCE_EXHAUSTED") from error


def _decoded(body: bytes, encoding: str, limit: int, response: httpx.Response) -> bytes:
    try:
        if encoding == "zstd":
            with zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(body) as reader:
                data, is_whole = reader.read(limit + 1), True
        elif encoding in ("gzip", "x-gzip", "deflate"):
            decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by its header
            data, is_whole = decoder.decompress(body, limit + 1), decoder.eof
        else:
            raise lied(response, f'Content-Encoding "{printable(encoding, 40)}" was not asked for')
    except (zlib.error, zstandard.ZstdError) as error:
        raise lied(response, f"Content-Encoding {encoding} cannot be decoded") from error
    if len(data) > limit:
        raise ResourceExhausted(f"more than {limit} bytes when decoded")
    if not is_whole:
        raise lied(response, f"Content-Encoding {encoding}: the body is cut short")
    return data


def verify(response: httpx.Response, body: bytes, descriptor: Descriptor) -> None:
    """Size, digest, and what the server calls it. Raises: RequestFailed."""
    if len(body) != descriptor.size:
        raise lied(response, f"{len(body)} bytes, the descriptor says {descriptor.size}")
    found = Digest.of(body, descriptor.digest.algorithm)
    if found != descriptor.digest:
        raise lied(response, f"bytes with digest {found} instead of {descriptor.digest}")
    kind = media_type_of(response)
    if descriptor.media_type in MANIFESTS and kind in MANIFESTS and kind != descriptor.media_type:
        raise lied(response, f"the answer is called {kind}, its descriptor says {descriptor.media_type}", code="INVALID_ARGUMENT")
