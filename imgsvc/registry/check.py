"""`hosts check`: really ask every endpoint of a reference, one by one, and report what was found."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.oci import MAX_DOCUMENT, MIB, Descriptor, Index, Platform, parse_document
from imgsvc.base.reference import Reference
from imgsvc.registry.documents import ACCEPT_HEADER, check_is_manifest, read_document
from imgsvc.registry.endpoint import Ask, Endpoint
from imgsvc.registry.hosts.hosts import Capability
from imgsvc.registry.http.exchange import header_of
from imgsvc.registry.interfaces import Credential
from imgsvc.registry.operation import Operations

_SAMPLE: Final = 16 * MIB  # [bytes] read at most to measure the speed
_SAMPLE_S: Final = 5.0
_SKEW_NOTED_S: Final = 60.0  # tokens and certificates start to fail about there


@dataclass(frozen=True, slots=True)
class Checked:
    """One endpoint. latency [seconds] of the first answer; tls: "" where none was seen; speed [bytes/s], 0 = not measured; clock_skew: server minus us [s].

    token: whom it was made out to and until when, "" where none was sent that says so.
    """

    endpoint: str
    origin: str
    ok: bool
    status: int
    credential: str
    tls: str
    latency: float
    speed: float
    clock_skew: float | None
    error: str = ""
    token: str = ""

    def to_json(self) -> dict[str, Any]:
        """Stable keys for --json."""
        return asdict(self)


async def check(operations: Operations, reference: Reference, credential: Credential | None = None) -> list[Checked]:
    """Ask all endpoints, in their order. When a pull would fail before its first request, that failure is the only result."""
    try:
        operation = await operations.operation(reference, credential)
    except ImgsvcError as error:
        return [_misconfigured(reference.host, error)]
    return [await _check(Endpoint(host, operation.session), reference) for host in operation.config.hosts]


async def check_namespace(operations: Operations, namespace: str, prefix: str = "") -> list[Checked]:
    """Ask all endpoints of a registry whether they are there and let us in, without naming an image. Else as check.

    prefix: the endpoints of the file for repositories below it.
    """
    try:
        operation = await operations.operation(Reference(namespace, prefix, ""), None)
    except ImgsvcError as error:
        return [_misconfigured(f"{namespace}/{prefix}".rstrip("/"), error)]
    return [await _check(Endpoint(host, operation.session), None) for host in operation.config.hosts]


def render(results: list[Checked]) -> Iterator[str]:
    """Lines for people."""
    for result in results:
        yield f"{result.endpoint}: {'ok' if result.ok else 'FAILED'} (status {result.status or 'none'}, from {result.origin})"
        if result.error:
            yield f"  {result.error}"
        if result.latency:
            tls = f"TLS {result.tls}; " if result.tls else ""
            yield f"  {tls}credential {result.credential}; {'answer' if result.status else 'gave up'} after {result.latency * 1000:.0f} ms"
        if result.token:
            yield f"  token {result.token}"
        if result.speed:
            yield f"  speed {result.speed / MIB:.1f} MiB/s"
        if result.clock_skew is not None and abs(result.clock_skew) > _SKEW_NOTED_S:
            yield f"  its clock differs from ours by {result.clock_skew:+.0f} s"


def _misconfigured(namespace: str, error: ImgsvcError) -> Checked:
    return Checked(namespace, error.where, False, 0, "none", "", 0.0, 0.0, None, str(error))


def _question(endpoint: Endpoint, reference: Reference | None) -> Ask:
    if reference is None:
        return Ask("GET", "/", "resolve", ())
    may_resolve = Capability.RESOLVE in endpoint.host.capabilities
    path = endpoint.path(f"manifests/{reference.target}")
    return Ask("HEAD" if may_resolve else "GET", path, "resolve", (endpoint.scope(),), headers=(ACCEPT_HEADER,))


async def _check(endpoint: Endpoint, reference: Reference | None) -> Checked:
    ask = _question(endpoint, reference)
    started = time.monotonic()
    status, tls, skew, speed, error = 0, "", None, 0.0, ""
    latency = 0.0
    try:
        async with aclosing(await endpoint.ask(ask)) as response:
            latency = time.monotonic() - started
            status, tls, skew = response.status_code, _tls(response), _skew(response)
            if reference is not None:
                check_is_manifest(response)
        if reference is not None and Capability.PULL in endpoint.host.capabilities:
            speed = await _speed(endpoint, reference)
    except ImgsvcError as failure:
        latency = latency or time.monotonic() - started
        error, status = str(await endpoint.reason() or failure), getattr(failure, "status", 0)
    token, used = str(endpoint.claims or ""), str(endpoint.credential_use)
    return Checked(endpoint.base, endpoint.host.origin, not error, status, used, tls, latency, speed, skew, error, token)


async def _speed(endpoint: Endpoint, reference: Reference) -> float:
    """Read the start of the largest layer."""
    layer = await _largest_layer(endpoint, reference)
    if layer is None:
        return 0.0
    ask = Ask("GET", endpoint.path(f"blobs/{layer.digest}"), "fetch", (endpoint.scope(),))
    received, started = 0, time.monotonic()
    async with aclosing(await endpoint.ask(ask)) as response:
        async for chunk in response.aiter_raw():
            received += len(chunk)
            if received >= _SAMPLE or time.monotonic() - started > _SAMPLE_S:
                break
    return received / max(time.monotonic() - started, 1e-6)


async def _largest_layer(endpoint: Endpoint, reference: Reference) -> Descriptor | None:
    target = reference.target
    for _ in range(2):  # an index, then a manifest
        ask = Ask("GET", endpoint.path(f"manifests/{target}"), "fetch", (endpoint.scope(),), headers=(ACCEPT_HEADER,))
        async with aclosing(await endpoint.ask(ask)) as response:
            document = parse_document(await read_document(response, MAX_DOCUMENT), "", str(reference))
        if not isinstance(document, Index):
            return max(document.layers, key=lambda layer: layer.size, default=None)
        candidates = document.candidates(Platform.host())
        if not candidates:
            return None
        target = candidates[0].digest
    return None


def _tls(response: httpx.Response) -> str:
    stream = response.extensions.get("network_stream")
    found = stream.get_extra_info("ssl_object") if stream else None
    if not isinstance(found, ssl.SSLObject):
        return "off"
    cipher = found.cipher()
    words = [
        str(found.version()),
        cipher[0] if cipher else "",
        "verified" if found.context.verify_mode == ssl.CERT_REQUIRED else "NOT verified",
    ]
    if until := (found.getpeercert() or {}).get("notAfter"):
        words.append(f"certificate until {until}")
    return ", ".join(word for word in words if word)


def _skew(response: httpx.Response) -> float | None:
    try:
        at = parsedate_to_datetime(header_of(response, "date"))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return (at - datetime.now(UTC)).total_seconds() if at.tzinfo else None
