"""Every wrapped key of a layer against every key at hand; the first that opens wins, and a bad one never hides a good one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from imgsvc.base.errors import DeadlineExceeded, InvalidArgument
from imgsvc.base.oci import Descriptor
from imgsvc.decrypt.interfaces import KeyMissing, KeyWrapper, NotOpened, Recipient, Trial
from imgsvc.decrypt.packets import LayerOptions, WrappedKey, layer_options, public_options, wrapped_keys

TIME_LIMIT_S: Final = 120.0  # for all trials of one layer, looked at between packets; bounds hostile manifests and many helpers


@dataclass(frozen=True, slots=True, repr=False)
class Unwrapped:
    """What came of it. scheme: which wrapping opened it."""

    options: LayerOptions
    scheme: str


def unwrap_layer(descriptor: Descriptor, wrappers: Sequence[KeyWrapper], *, hint: str, provider_problem: str = "") -> Unwrapped:
    """Find the options of a layer. Blocking.

    Args:
        descriptor: of the encrypted layer.
        wrappers: asked in their order, so the cheap ones come first.
        hint: where keys are expected, for the error.
        provider_problem: why key providers could not be set up, if so.
    Raises:
        KeyMissing: nothing opened.
        InvalidArgument: damaged public options, or something opened and is of no use.
        DeadlineExceeded, Cancelled.
    """
    public = public_options(descriptor)
    items = wrapped_keys(descriptor)
    trials, useless, lasting = _unknown(items, wrappers, provider_problem), "", True
    deadline = time.monotonic() + TIME_LIMIT_S
    for wrapper in wrappers:
        for packet in (i.packet for i in items if i.scheme == wrapper.scheme and i.packet is not None):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"unwrapping took more than {TIME_LIMIT_S:g} s", where=f"encrypted layer {descriptor.digest}")
            try:
                private = wrapper.unwrap(packet)
                return Unwrapped(layer_options(private, public, f"encrypted layer {descriptor.digest}"), wrapper.scheme)
            except NotOpened as error:
                trials.append(Trial(wrapper.scheme, tuple(wrapper.recipients(packet)), str(error)))
                lasting &= error.lasting
            except InvalidArgument as error:
                useless = f"{wrapper.scheme}: {error.what}"
    if useless:
        raise InvalidArgument(
            f"its key opens but cannot be used: {useless}", where=f"encrypted layer {descriptor.digest}", hint="encrypt the image again"
        )
    raise KeyMissing(descriptor.digest, tuple(trials), hint=hint, lasting=lasting)


def _unknown(items: Sequence[WrappedKey], wrappers: Sequence[KeyWrapper], provider_problem: str) -> list[Trial]:
    """Items that are not tried: damaged ones, and those of schemes that are not installed."""
    known = {w.scheme for w in wrappers}
    trials = [Trial(i.scheme, (), i.reason) for i in items if i.packet is None]
    missing = dict.fromkeys(i.scheme for i in items if i.scheme not in known and i.packet is not None)
    for scheme in missing:
        is_provider = scheme.startswith("provider.")
        trials.append(Trial(scheme, (), (provider_problem or "this key provider is not configured") if is_provider else "unknown scheme"))
    return trials


def layer_recipients(descriptor: Descriptor, wrappers: Sequence[KeyWrapper]) -> list[Recipient]:
    """All recipients of the layer's key, as far as its packets name them."""
    by_scheme = {w.scheme: w for w in wrappers}
    found = []
    try:
        items = wrapped_keys(descriptor)
    except InvalidArgument as error:
        return [Recipient("", error.what)]  # only a stream processor may have taken such a layer
    for item in items:
        wrapper = by_scheme.get(item.scheme)
        names = wrapper.recipients(item.packet) if wrapper and item.packet is not None else []
        fallback = f"key provider {item.scheme.removeprefix('provider.')}" if item.scheme.startswith("provider.") else "unreadable packet"
        found += [Recipient(item.scheme, name) for name in names or [fallback]]
    return found
