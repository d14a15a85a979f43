"""Contracts of layer decryption: unwrapping a key and running the bulk cipher are two seams.

Source: ocicrypt; containerd's stream processor contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from imgsvc.base.errors import PermissionDenied
from imgsvc.base.oci import Descriptor, Digest

_SHOWN: Final = 8  # recipients of a packet, and packets of a layer, named in an error


@dataclass(frozen=True, slots=True, repr=False)
class LayerKey:
    """Authorisation to decrypt one layer.

    secret: what the worker's cipher stage needs (aesctr.open_transform), opaque to all other code; None when a configured
        stream processor decrypts this layer: run Decryptor.open_chain and unpack what comes out of it.
    fingerprint: safe to store and to compare with an earlier one of this node. Equal: the same layer key was unwrapped
        again (built-in), or nothing the processor depends on has changed. Different: decrypt the layer again.
    scheme: which wrapping opened it, e.g. "jwe".  media_type: of the decrypted bytes.
    """

    secret: bytes | None
    fingerprint: str
    scheme: str
    media_type: str

    def __repr__(self) -> str:
        return f"LayerKey(scheme={self.scheme!r}, media_type={self.media_type!r})"


@dataclass(frozen=True, slots=True)
class Recipient:
    """A recipient of a layer key, as far as the packet names it. scheme: "jwe", "provider.NAME", …; name: fit for a terminal."""

    scheme: str
    name: str


class StreamTransform(Protocol):
    """Ciphertext in, plaintext out; nothing that came out may be trusted before finalize returned."""

    def update(self, data: bytes | memoryview) -> bytes:
        """Transform a chunk. Runs in a worker process."""

    def finalize(self) -> bytes:
        """The rest. Raises: DataLoss when the MAC does not match."""


class NotOpened(Exception):
    """This packet does not open here. The text says why, without key material; another packet or scheme may still open.

    `lasting`: the same keys will not open it later either. False for helpers that may answer next time.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


class KeyWrapper(Protocol):
    """One wrapping scheme with the keys at hand."""

    @property
    def scheme(self) -> str:
        """The end of the annotation that carries its packets: org.opencontainers.image.enc.keys.SCHEME."""

    def unwrap(self, packet: bytes) -> bytes:
        """The private options JSON. Blocking. Raises: NotOpened, and nothing else whatever the packet is."""

    def recipients(self, packet: bytes) -> list[str]:
        """The recipients that the packet names, fit for a terminal; empty when it is damaged. Needs no key."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One packet that was tried, for errors. recipients: those it names."""

    scheme: str
    recipients: tuple[str, ...]
    reason: str


class KeyMissing(PermissionDenied):
    """No key of this node opens the layer. Fields: digest of the encrypted layer, one Trial per packet.

    `lasting`: the answer stays the same until key files or configuration change.
    """

    def __init__(self, digest: Digest, trials: tuple[Trial, ...], *, hint: str, lasting: bool) -> None:
        shown = [f"{t.scheme} for {_listed(t.recipients) or 'unnamed recipients'}: {t.reason}" for t in trials]
        what = f"no key of this node opens it (tried {_listed(shown, '; ')})" if shown else "it carries no wrapped key"
        super().__init__(what, where=f"encrypted layer {digest}", hint=hint)
        self.digest = digest
        self.trials = trials
        self.lasting = lasting


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    """A few of many, for one line of text."""
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


class ChainRun(Protocol):
    """A running chain of stream processors for one layer."""

    @property
    def output(self) -> int:
        """Pipe with what the last processor prints. The run owns it: hand it to the worker, let wait or kill close it."""

    @property
    def media_type(self) -> str:
        """Of the bytes in `output`."""

    async def wait(self) -> None:
        """After the output ended, or the unpacker failed: the verdict of the processors.

        Ask before believing an unpacker's "wrong diff ID" or "broken stream": the cause is usually here.
        Raises: ProcessorFailed with the stderr of the first one that failed; DeadlineExceeded when one stays.
        """

    async def kill(self) -> None:
        """End every process and close the output. Idempotent; call it in every case, also after wait."""


class Decryptor(Protocol):
    """What the use cases see."""

    def encrypted(self, descriptor: Descriptor) -> bool:
        """Whether the layer's media type says it is encrypted: the bit that keeps it apart from plain layers in caches."""

    def processed(self, descriptor: Descriptor) -> bool:
        """Whether a configured stream processor takes this layer, encrypted or not: unpack what open_chain prints."""

    async def unwrap(self, descriptor: Descriptor) -> LayerKey:
        """Find the key of an encrypted layer. Cheap when repeated with unchanged keys: ask before a present image is used.

        Raises: KeyMissing; InvalidArgument (unusable options); Unimplemented (decryption is switched off).
        """

    async def open_chain(self, descriptor: Descriptor, source: int) -> ChainRun:
        """Start the processors for a layer that `processed`.

        Args:    source: the complete blob, open at offset 0, or a pipe; it stays the caller's and may be closed on return.
        Raises:  FailedPrecondition (a program is missing).
        """

    def recipients(self, descriptor: Descriptor) -> list[Recipient]:
        """Schemes and recipients, without any key; empty for a plain layer. Raises: nothing for damaged packets."""

    async def close(self) -> None:
        """Stop helpers that still run."""
