"""containerd's `[stream_processors]`: which programs a layer runs through before it is unpacked. Pure.

Source: containerd docs/stream_processors.md. Beyond containerd: chains are judged when the configuration is read, so a
processor that returns what it accepts, two that accept one type, and a chain that ends nowhere are refused there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.decrypt.packets import is_encrypted

PLAIN_TAR: Final = "application/vnd.oci.image.layer.v1.tar"

# What the unpacker takes as it is.
UNPACKABLE: Final = frozenset(
    [f"application/vnd.oci.image.layer.{kind}v1.tar{pack}" for kind in ("", "nondistributable.") for pack in ("", "+gzip", "+zstd")]
    + [f"application/vnd.docker.image.rootfs.{kind}.tar{pack}" for kind in ("diff", "foreign.diff") for pack in ("", ".gzip", ".zstd")]
)


class BadProcessor(InvalidArgument):
    """An entry that cannot work. Field: processor, its ID."""

    def __init__(self, processor: Processor, what: str, *, hint: str = "") -> None:
        super().__init__(what, where=f'stream_processors."{_short(processor.id)}"', hint=hint)
        self.processor = processor.id


@dataclass(frozen=True, slots=True)
class Processor:
    """One entry of the table; keys mean what they mean in containerd. env: "NAME=VALUE", added to the daemon's."""

    id: str
    accepts: tuple[str, ...]
    returns: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One processor in a chain and the type it is given. payload: it gets the layer's descriptor on fd 3."""

    processor: Processor
    media_type: str

    @property
    def payload(self) -> bool:
        """Every encrypted type comes with a payload, whatever the processor is called."""
        return is_encrypted(self.media_type)


@dataclass(frozen=True, slots=True)
class Chain:
    """The programs for one media type, in order, and the type that comes out. No steps: the built-in stages serve."""

    steps: tuple[Step, ...]
    result: str


def plan_chain(processors: Sequence[Processor], media_type: str) -> Chain:
    """Follow accepts and returns until plain tar, or until no processor accepts the type. Exact match, as in containerd.

    Raises: BadProcessor for a loop, or an end that cannot be unpacked.
    """
    by_type = {accepted: p for p in processors for accepted in p.accepts}
    steps: list[Step] = []
    current, seen = media_type, {media_type}
    while current != PLAIN_TAR and current in by_type:
        steps.append(Step(by_type[current], current))
        current = by_type[current].returns
        if current in seen:
            raise BadProcessor(
                steps[-1].processor, f'the chain for "{_short(media_type)}" never ends: it comes back to "{_short(current)}"'
            )
        seen.add(current)
    if steps and current not in UNPACKABLE:
        raise BadProcessor(
            steps[-1].processor,
            f'the chain for "{_short(media_type)}" ends with "{_short(current)}", which cannot be unpacked',
            hint=f'let it return "{PLAIN_TAR}", or add a processor that accepts what it returns',
        )
    return Chain(tuple(steps), current)


def check_processors(processors: Sequence[Processor]) -> None:
    """Judge a whole table when the configuration is read. Raises: BadProcessor naming the entry."""
    owners: dict[str, Processor] = {}
    for processor in processors:
        for name, value in (("path", processor.path), ("returns", processor.returns), ("accepts", processor.accepts)):
            if not value:
                raise BadProcessor(processor, f"{name} is missing")
        for entry in processor.env:
            if "=" not in entry[1:] or "\0" in entry:
                raise BadProcessor(processor, f'env "{_short(entry.partition("=")[0])}" is not NAME=VALUE')
        for accepted in processor.accepts:
            other = owners.setdefault(accepted, processor)
            if other is not processor:
                raise BadProcessor(processor, f'"{_short(accepted)}" is already accepted by stream_processors."{_short(other.id)}"')
    for accepted in owners:
        plan_chain(processors, accepted)


def child_environment(step: Step, base: Mapping[str, str]) -> dict[str, str]:
    """The daemon's environment, the entry's, and the type; later ones win."""
    own = dict(entry.split("=", 1) for entry in step.processor.env)
    return {**base, **own, "STREAM_PROCESSOR_MEDIATYPE": step.media_type}


def _short(text: str) -> str:
    return printable(text, 120)
