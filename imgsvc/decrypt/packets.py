"""What an encrypted layer's descriptor says: media type, wrapped keys, options. Pure; hostile input welcome.

Source: ocicrypt docs and spec; the layer media types of OCI image-spec and Docker with `+encrypted` at the end.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from imgsvc.base.errors import ImgsvcError, InvalidArgument, printable
from imgsvc.base.oci import KIB, Descriptor, load_json_object

SUFFIX: Final = "+encrypted"
PREFIX: Final = "org.opencontainers.image.enc."
CIPHER: Final = "AES_256_CTR_HMAC_SHA256"  # the only one defined

MAX_ITEMS: Final = 256  # wrapped keys per layer; people have a handful, and each may cost a private key operation per key
MAX_OPTIONS: Final = 64 * KIB  # [bytes] of one options document; writers produce about 200

_KEYS: Final = PREFIX + "keys."
_SIZES: Final = {"symkey": 32, "nonce": 16, "hmac": 32}


def is_encrypted(media_type: str) -> bool:
    """Whether the type carries the suffix. Anything may be encrypted; what can be unpacked is the unpacker's to say."""
    return media_type.endswith(SUFFIX)


def plain_type(media_type: str) -> str:
    """The type of the decrypted bytes: the suffix stripped."""
    return media_type.removesuffix(SUFFIX)


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """One item of one keys annotation. scheme: the annotation's end; reason: why packet is None, e.g. "not base64"."""

    scheme: str
    packet: bytes | None
    reason: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class LayerOptions:
    """All the cipher needs: symmetric key (32 bytes), initial counter block (16), HMAC-SHA256 of the ciphertext (32)."""

    symkey: bytes
    nonce: bytes
    hmac: bytes


def wrapped_keys(descriptor: Descriptor) -> list[WrappedKey]:
    """Every item of every keys annotation, in the order of the document. A damaged item never hides its neighbours.

    Raises: InvalidArgument when there are more than MAX_ITEMS.
    """
    found: list[tuple[str, str]] = []
    for name, value in descriptor.annotations.items():
        if name.startswith(_KEYS):
            found += [(name.removeprefix(_KEYS), item) for item in value.split(",") if item.strip()]
    if len(found) > MAX_ITEMS:
        raise InvalidArgument(f"{len(found)} wrapped keys; at most {MAX_ITEMS} are accepted", where=f"encrypted layer {descriptor.digest}")
    return [_wrapped_key(scheme, item) for scheme, item in found]


def _wrapped_key(scheme: str, item: str) -> WrappedKey:
    try:
        return WrappedKey(printable(scheme, 80), _base64(item))
    except ValueError:
        return WrappedKey(printable(scheme, 80), None, "the annotation is not base64")


def public_options(descriptor: Descriptor) -> Mapping[str, Any]:
    """The public options, cipher checked. Raises: InvalidArgument."""
    where = f"encrypted layer {descriptor.digest}"
    text = descriptor.annotations.get(PREFIX + "pubopts")
    if text is None:
        raise InvalidArgument(f"the annotation {PREFIX}pubopts is missing", where=where, hint="encrypt the image again")
    try:
        options = _load(_base64(text), where)
    except ValueError as error:
        raise InvalidArgument(f"the annotation {PREFIX}pubopts is not base64", where=where) from error
    cipher = options.get("cipher")
    if cipher != CIPHER:
        raise InvalidArgument(f'unknown cipher "{printable(str(cipher), 60)}"; only {CIPHER} is defined', where=where)
    return options


def layer_options(private: bytes, public: Mapping[str, Any], where: str) -> LayerOptions:
    """Put unwrapped private options and public options together.

    The MAC covers neither the nonce nor any annotation, so a nonce the public options bring must not replace the wrapped
    one, and a missing one must not be invented. `digest` in the private options is that of the blob before the tool
    recompressed it and proves nothing.

    Raises: InvalidArgument; its text carries no value.
    """
    options = _load(private, where)
    nonces = {_sized(m, "nonce", where) for m in (_cipher_options(options, where), _cipher_options(public, where)) if "nonce" in m}
    if not nonces:
        raise InvalidArgument("the options carry no nonce", where=where)
    if len(nonces) > 1:
        raise InvalidArgument("public and wrapped options carry different nonces", where=where, hint="the manifest was tampered with")
    return LayerOptions(_sized(options, "symkey", where), nonces.pop(), _sized(public, "hmac", where))


def _cipher_options(options: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    value = options.get("cipheroptions") or {}
    if not isinstance(value, dict):
        raise InvalidArgument("cipheroptions is not an object", where=where)
    return _lowered(value, where)


def _sized(options: Mapping[str, Any], name: str, where: str) -> bytes:
    value = options.get(name)
    try:
        data = _base64(value) if isinstance(value, str) else None
    except ValueError as error:
        raise InvalidArgument(f"{name} is not base64", where=where) from error
    if data is None or len(data) != _SIZES[name]:
        state = "missing" if not data else f"{len(data)} bytes"
        raise InvalidArgument(f"{name} is {state}, expected {_SIZES[name]} bytes", where=where)
    return data


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        return _lowered(load_json_object(data, where, limit=MAX_OPTIONS), where)
    except ImgsvcError as error:
        # Whatever the parser quotes may be key material.
        raise InvalidArgument("the options are not a JSON object", where=where) from error.with_traceback(None)


def _lowered(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Go writers and readers match member names regardless of case; two spellings of one name are refused."""
    found = {name.lower(): item for name, item in value.items()}
    if len(found) != len(value):
        raise InvalidArgument("a member appears twice", where=where)
    return found


def _base64(text: str) -> bytes:
    """Standard base64 as Go reads it: padding required, line ends ignored. Raises: ValueError."""
    try:
        return base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
