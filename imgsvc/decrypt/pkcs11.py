"""Keys in a PKCS#11 token: which token, which module, and which process loads it.

The module is foreign code that wants environment variables and may hang or crash, so it is loaded by a child process
(pkcs11_child) and never by the daemon, and by one at a time: two at once may disturb each other, and SoftHSM's tokens are
not there now and then while another process opens them. The PIN travels on the child's stdin.

Needs the optional package of `imgsvc[pkcs11]`. Decision: without a configuration only modules in the usual directories
may be loaded, because write access to a key file (a Secret, say) must not decide what code runs as root.

Source: RFC 7512 for the URI; ocicrypt docs/pkcs11.md for the key file, the configuration and the packet.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import sysconfig
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, unquote_to_bytes

from imgsvc.base import yamlfile
from imgsvc.base.concurrency import CancelToken
from imgsvc.base.errors import Cancelled, ImgsvcError, InvalidArgument, PermissionDenied, printable
from imgsvc.base.oci import MIB, load_json_object
from imgsvc.base.programs import POLL_S, run_blocking
from imgsvc.decrypt.interfaces import KeyWrapper, NotOpened
from imgsvc.decrypt.keydir import read_bounded
from imgsvc.decrypt.keys import KeyFileError, KeyRing, TokenFile
from imgsvc.decrypt.packets import MAX_OPTIONS

INTERNAL: Final = "internal"  # the configuration's name for the built-in directories
MAX_RECIPIENTS: Final = 64  # per packet; each is an operation of a token, which may be slow

_DIRECTORIES: Final = (
    "/usr/lib64/pkcs11/",
    "/usr/lib/pkcs11/",
    "/usr/local/lib/pkcs11/",
    "/usr/lib/softhsm/",
    f"/usr/lib/{sysconfig.get_config_var('MULTIARCH') or 'x86_64-linux-gnu'}/",
)


@dataclass(frozen=True, slots=True)
class ModulePolicy:
    """Where modules are looked for by name, and which may be loaded: exact files, or `DIR/` for files directly inside."""

    directories: tuple[str, ...] = _DIRECTORIES
    allowed: tuple[str, ...] = _DIRECTORIES

    def allows(self, path: str) -> bool:
        """Whether the module may be loaded."""
        return path in self.allowed or os.path.dirname(path) + "/" in self.allowed


@dataclass(frozen=True, slots=True)
class TokenKey:
    """One private key in a token, from a key file. slot -1: by token label; empty id or label: any."""

    source: str
    module: str
    token: str = ""
    slot: int = -1
    key_id: bytes = b""
    label: str = ""
    pin: str = field(default="", repr=False)
    env: Mapping[str, str] = field(default_factory=dict)


def load_policy(config: str) -> ModulePolicy:
    """The policy in an ocicrypt configuration file; the built-in one for "" and "internal". Raises: InvalidArgument."""
    if config in ("", INTERNAL):
        return ModulePolicy()
    try:
        section = _yaml(read_bounded(config)).get("pkcs11") or {}
        lists = [section.get(name) or [] for name in ("module-directories", "allowed-module-paths")]
    except (KeyFileError, ImgsvcError, AttributeError) as error:
        raise InvalidArgument(f"not an ocicrypt configuration: {error}", where=config) from error
    if not all(isinstance(entries, list) and all(isinstance(e, str) for e in entries) for entries in lists):
        raise InvalidArgument("module-directories and allowed-module-paths are lists of strings", where=config)
    return ModulePolicy(tuple(lists[0]), tuple(lists[1]))


def parse_token_file(file: TokenFile, policy: ModulePolicy) -> TokenKey:
    """What a key file says. Reads the PIN's file. Raises: KeyFileError, ImgsvcError."""
    document = _yaml(file.text)
    section, module = document.get("pkcs11"), document.get("module") or {}
    uri = section.get("uri") if isinstance(section, dict) else None
    env = (module.get("env") if isinstance(module, dict) else None) or {}
    if not isinstance(uri, str) or not uri.startswith("pkcs11:") or not isinstance(env, dict):
        raise KeyFileError("no pkcs11 URI in it")
    path_part, _, query_part = uri.removeprefix("pkcs11:").partition("?")
    path, query = _attributes(path_part, ";"), _attributes(query_part, "&")
    if not ("id" in path or "object" in path):
        raise KeyFileError("the pkcs11 URI names neither id nor object")
    if not ("slot-id" in path or "token" in path):
        raise KeyFileError("the pkcs11 URI names neither slot-id nor token")
    slot = unquote(path["slot-id"]) if "slot-id" in path else "-1"
    if not slot.removeprefix("-").isdecimal() or int(slot) >= 2**32:
        raise KeyFileError("slot-id is not a number of 32 bits")
    return TokenKey(
        source=file.source,
        module=_module(query, policy),
        token=unquote(path.get("token", "")),
        slot=int(slot),
        key_id=unquote_to_bytes(path.get("id", "")),
        label=unquote(path.get("object", "")),
        pin=_pin(query),
        env={str(name): str(value) for name, value in env.items()},
    )


def _attributes(text: str, separator: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(separator) if part)
    return {name: value for name, _, value in pairs}


def _pin(query: Mapping[str, str]) -> str:
    if "pin-value" in query:
        return unquote(query["pin-value"])
    source = unquote(query.get("pin-source", "")).removeprefix("file://").removeprefix("file:")
    if not source.startswith("/"):
        raise KeyFileError("the pkcs11 URI names neither pin-value nor an absolute pin-source")
    try:
        return read_bounded(source, MAX_OPTIONS).decode()  # as it is, line end and all
    except UnicodeDecodeError as error:
        raise KeyFileError("the PIN in pin-source is not UTF-8") from error.with_traceback(None)


def _module(query: Mapping[str, str], policy: ModulePolicy) -> str:
    """The module file the URI means. Raises: KeyFileError, PermissionDenied."""
    name = unquote(query.get("module-name", ""))
    if "module-path" in query:
        path = unquote(query["module-path"])
        found = _named_module((path,), name) if os.path.isdir(path) else path
    else:
        found = _named_module(policy.directories, name)
    if not found:
        raise KeyFileError(f'no PKCS#11 module "{printable(name, 60)}" found')
    # Judged after links and dots are resolved, and loaded under that very name.
    real = os.path.realpath(found)
    if not (policy.allows(found) or policy.allows(real)) or ".." in found.split("/"):
        raise PermissionDenied(
            f"the PKCS#11 module {printable(found, 200)} is not allowed", hint="name it in allowed-module-paths of OCICRYPT_CONFIG"
        )
    return real


def _named_module(directories: Sequence[str], name: str) -> str:
    """The first file whose name contains `name` at its end or before a dot, regardless of case."""
    wanted = name.lower()
    for directory in directories if name else ():
        for entry in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            _, matched, after = entry.lower().partition(wanted)
            if matched and (not after or after.startswith(".")):
                return os.path.join(directory, entry)
    return ""


def _yaml(text: bytes) -> dict[str, Any]:
    try:
        value = yamlfile.loads(text, "")
    except InvalidArgument:
        raise KeyFileError("not YAML") from None  # the text may hold a PIN
    if not isinstance(value, dict):
        raise KeyFileError("not a YAML mapping")
    return value


class Pkcs11Wrapper:
    """Asks every token for every recipient, one child process per token."""

    scheme: Final = "pkcs11"

    def __init__(self, ring: KeyRing, config: str, timeout_s: float, cancel: CancelToken | None) -> None:
        self._tokens = ring.tokens
        self._config = config
        self._timeout_s = timeout_s
        self._cancel = cancel

    def unwrap(self, packet: bytes) -> bytes:
        """See KeyWrapper."""
        try:
            wrapped = _parse(packet)
        except (ImgsvcError, ValueError) as error:
            raise NotOpened("not the JSON of PKCS#11 recipients") from error
        if not self._tokens:
            raise NotOpened("no key file names a PKCS#11 token")
        try:
            policy = load_policy(self._config)
        except InvalidArgument as error:
            raise NotOpened(str(error), lasting=False) from error
        reasons = []
        for file in self._tokens:
            try:
                return _ask(parse_token_file(file, policy), wrapped, self._timeout_s, self._cancel)
            except Cancelled:
                raise
            except (KeyFileError, ImgsvcError) as error:
                reasons.append(f"{file.source}: {error}")
        raise NotOpened("; ".join(reasons), lasting=False)

    def recipients(self, packet: bytes) -> list[str]:
        """See KeyWrapper."""
        try:
            return [f"RSA {len(blob) * 8} bit, OAEP {digest}" for blob, digest in _parse(packet)]
        except (ImgsvcError, ValueError):
            return []


def wrapper(ring: KeyRing, config: str, timeout_s: float, cancel: CancelToken | None) -> KeyWrapper:
    """The wrapper, as its protocol. config: as load_policy."""
    return Pkcs11Wrapper(ring, config, timeout_s, cancel)


def _parse(packet: bytes) -> list[tuple[bytes, str]]:
    """(RSA ciphertext, OAEP hash) of every recipient. Raises: ValueError, ImgsvcError."""
    value = load_json_object(packet, "PKCS#11 packet", limit=MIB)
    entries = value.get("recipients")
    if value.get("version", 0) != 0 or not isinstance(entries, list) or len(entries) > MAX_RECIPIENTS:
        raise ValueError("version or recipients")
    found = []
    for entry in entries:
        digest = (entry.get("hash") or "sha1") if isinstance(entry, dict) else ""
        if digest not in ("sha1", "sha256") or entry.get("version", 0) != 0 or not isinstance(entry.get("blob"), str):
            raise ValueError("recipient")
        found.append((base64.b64decode(entry["blob"], validate=True), digest))
    return found


def _ask(key: TokenKey, wrapped: Sequence[tuple[bytes, str]], timeout_s: float, cancel: CancelToken | None) -> bytes:
    """Run the child for one token. Raises: KeyFileError, ImgsvcError."""
    if find_spec("pkcs11") is None:
        raise KeyFileError("PKCS#11 support is not installed (imgsvc[pkcs11])")
    request = {
        "module": key.module,
        "token": key.token,
        "slot": key.slot,
        "id": key.key_id.hex(),
        "label": key.label,
        "pin": key.pin,
        "wrapped": [[blob.hex(), digest] for blob, digest in wrapped],
    }
    root = str(Path(__file__).parents[2])
    env = {**os.environ, **key.env, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    argv = (sys.executable, "-m", "imgsvc.decrypt.pkcs11_child")
    with _turn(key.module, cancel):
        done = run_blocking(argv, json.dumps(request).encode(), timeout_s=timeout_s, limit=MAX_OPTIONS, env=env, cancel=cancel)
    if done.status:
        raise KeyFileError(printable(done.said.rpartition("\n")[2]) or f"the PKCS#11 module ended with status {done.status}")
    return done.stdout


_turns: Final[defaultdict[str, threading.Lock]] = defaultdict(threading.Lock)  # by module


@contextlib.contextmanager
def _turn(module: str, cancel: CancelToken | None) -> Iterator[None]:
    """Be the only one with the module for a `with` block. Raises: Cancelled."""
    lock = _turns[module]
    while not lock.acquire(timeout=POLL_S):
        if cancel is not None:
            cancel.check()
    try:
        yield
    finally:
        lock.release()
