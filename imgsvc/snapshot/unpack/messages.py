"""What the daemon and an unpack worker say to each other. Pure.

The daemon sends a request, the worker answers with a verdict; each is one JSON object. JSON, because what comes from a
process that reads strangers' layers is data and nothing else. worker.py says which descriptors travel with a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.errorwire import error_from_plain, error_to_plain
from imgsvc.snapshot.interfaces import Limits, Mount


@dataclass(frozen=True, slots=True, repr=False)
class LayerBytes:
    """How a worker reads a layer. size [bytes] of the stored blob. secret: for the transform; None for a layer in the clear."""

    media_type: str
    diff_id: str
    size: int
    secret: bytes | None
    limits: Limits


@dataclass(frozen=True, slots=True)
class Unpack:
    """Unpack a layer. rebase: without its parents, so that a Settle follows. wipe: empty the target first."""

    layer: LayerBytes
    mounts: tuple[Mount, ...]
    rebase: bool
    wipe: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """Write a layer's tar stream and its index to files."""

    layer: LayerBytes


@dataclass(frozen=True, slots=True)
class Settle:
    """Complete a layer on its parents, which the mounts show."""

    mounts: tuple[Mount, ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """Make an image of this many layers."""

    layers: int


Request = Unpack | Record | Settle | Merge


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A layer was unpacked or recorded.

    unpacked [bytes of tar]. size [bytes], inodes: on disk. warnings: what was left out, by reason [count].
    timings [seconds]: "waited" for bytes, "unpacked". peak_memory [bytes, resident].
    """

    diff_id: str
    unpacked: int
    entries: int
    size: int
    inodes: int
    warnings: Mapping[str, int]
    timings: Mapping[str, float]
    peak_memory: int


@dataclass(frozen=True, slots=True)
class Settled:
    """A layer was completed. size [bytes], inodes: added on disk."""

    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Merged:
    """An image was made. warnings: what was left out, by reason [count]."""

    size: int
    inodes: int
    warnings: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed. needs_parents: the layer can only be unpacked on its mounted parents."""

    error: ImgsvcError
    needs_parents: bool = False


Verdict = Unpacked | Settled | Merged | Failed

_REQUESTS: Final[Mapping[str, type[Request]]] = {"unpack": Unpack, "record": Record, "settle": Settle, "merge": Merge}
_VERDICTS: Final[Mapping[str, type[Unpacked | Settled | Merged]]] = {"unpacked": Unpacked, "settled": Settled, "merged": Merged}


def pack_request(request: Request) -> bytes:
    """For unpack_request."""
    plain = asdict(request)
    if isinstance(request, Unpack | Record) and request.layer.secret is not None:
        plain["layer"]["secret"] = request.layer.secret.hex()
    return _packed(_REQUESTS, type(request), plain)


def unpack_request(message: bytes) -> Request:
    """What pack_request packed."""
    kind, plain = json.loads(message)
    if "mounts" in plain:
        plain["mounts"] = tuple(Mount(m["type"], m["source"], tuple(m["options"])) for m in plain["mounts"])
    if "layer" in plain:
        layer = plain["layer"]
        secret = None if layer["secret"] is None else bytes.fromhex(layer["secret"])
        plain["layer"] = LayerBytes(**{**layer, "secret": secret, "limits": Limits(**layer["limits"])})
    return _REQUESTS[kind](**plain)


def pack_verdict(verdict: Verdict) -> bytes:
    """For unpack_verdict."""
    if isinstance(verdict, Failed):
        return json.dumps(["failed", {"error": error_to_plain(verdict.error), "needs_parents": verdict.needs_parents}]).encode()
    return _packed(_VERDICTS, type(verdict), asdict(verdict))


def unpack_verdict(message: bytes) -> Verdict:
    """What pack_verdict packed. Raises: KeyError, TypeError, ValueError for anything else."""
    kind, plain = json.loads(message)
    if kind == "failed":
        return Failed(error_from_plain(plain["error"]), plain["needs_parents"])
    return _VERDICTS[kind](**plain)


def _packed(kinds: Mapping[str, type[Any]], kind: type[Any], plain: dict[str, Any]) -> bytes:
    name = next(name for name, known in kinds.items() if known is kind)
    return json.dumps([name, plain]).encode()
