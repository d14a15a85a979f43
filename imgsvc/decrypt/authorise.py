"""Who may use a layer that is already unpacked: fingerprints that can be stored, and verdicts that are remembered.

A layer may be used only while this node can still unwrap the key of the very descriptor at hand, and the key is the one
the unpacked files came from (CVE-2022-24778, and images that squat on a diff ID). Asking again costs a private key
operation or a call to a key provider, so an answer is kept until key files or configuration change; answers that depend
on something outside this node, for a minute.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from imgsvc.base.errors import from_os_error
from imgsvc.base.fsutil import write_atomic
from imgsvc.base.oci import Descriptor
from imgsvc.decrypt.interfaces import KeyMissing, LayerKey
from imgsvc.decrypt.packets import PREFIX, LayerOptions

OUTSIDE_TTL_S: Final = 60.0  # how long a token or key provider that withdraws a key may go unnoticed
MAX_VERDICTS: Final = 4096  # layers; about 1 KiB each

_SALT_SIZE: Final = 32


def load_salt(path: Path) -> bytes:
    """This node's salt, made on first use. Without it a stored fingerprint would confirm a guessed key. Blocking."""
    try:
        if not path.exists():
            write_atomic(path, os.urandom(_SALT_SIZE))
        salt = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, "cannot read or make the salt of layer fingerprints", where=str(path)) from error
    if len(salt) != _SALT_SIZE:
        # A cut-short salt makes stored fingerprints differ: layers are decrypted again, nothing is let through.
        salt = os.urandom(_SALT_SIZE)
        write_atomic(path, salt)
    return salt


def key_fingerprint(salt: bytes, options: LayerOptions) -> str:
    """Of an unwrapped key: equal for equal key and nonce."""
    return _fingerprint(salt, b"layer key", options.symkey + options.nonce)


def chain_fingerprint(salt: bytes, state: str) -> str:
    """Of all a stream processor's answer depends on, as far as this node can see."""
    return _fingerprint(salt, b"stream processors", state.encode("utf-8", "surrogateescape"))


def _fingerprint(salt: bytes, kind: bytes, data: bytes) -> str:
    return hmac.digest(salt, kind + b"\0" + data, hashlib.sha256).hex()


def question(descriptor: Descriptor) -> str:
    """What identifies the question "may this layer be used?": the blob, its type and every annotation that takes part."""
    parts = [descriptor.digest, descriptor.media_type]
    parts += [f"{name}={value}" for name, value in sorted(descriptor.annotations.items()) if name.startswith(PREFIX)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


class Verdicts:
    """Answers by question, for one generation of keys and configuration each. Thread-safe, in memory only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[object, float, LayerKey | KeyMissing]] = OrderedDict()

    def get(self, asked: str, generation: object) -> LayerKey | KeyMissing | None:
        """The answer, if it still holds."""
        with self._lock:
            known = self._known.get(asked)
            if known is None or known[0] != generation or known[1] < self._clock():
                self._known.pop(asked, None)
                return None
            self._known.move_to_end(asked)
            return known[2]

    def put(self, asked: str, generation: object, verdict: LayerKey | KeyMissing, *, lasting: bool) -> None:
        """Remember an answer; "no" from outside this node is never remembered."""
        if isinstance(verdict, KeyMissing) and not lasting:
            return
        with self._lock:
            self._known[asked] = (generation, float("inf") if lasting else self._clock() + OUTSIDE_TTL_S, verdict)
            while len(self._known) > MAX_VERDICTS:
                self._known.popitem(last=False)
