"""Child process of pkcs11: loads one module, decrypts with one key, ends. Request on stdin, options on stdout.

A failure is one line on stderr and status 1; the PIN and what was decrypted never enter it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from collections.abc import Iterator
from typing import Any

import pkcs11
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.exceptions import PKCS11Error


class Failed(Exception):
    """What went wrong, for stderr."""


def main() -> int:
    """Serve one request."""
    request = json.load(sys.stdin)
    try:
        options = _unwrap(request)
    except PKCS11Error as error:
        text = f": {error}" if str(error) else ""
        print(f"PKCS#11 module {request['module']}: {type(error).__name__}{text}", file=sys.stderr)
        return 1
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(options)
    return 0


def _unwrap(request: dict[str, Any]) -> bytes:
    problem: Exception = Failed("no such token: " + (request["token"] or f"slot {request['slot']}"))
    for token in _tokens(request):
        try:
            with token.open(user_pin=request["pin"]) as session:
                key = _key(session, request)
                for blob, digest in request["wrapped"]:
                    plain = _decrypt(key, bytes.fromhex(blob), digest)
                    if plain is not None:
                        return plain
                problem = Failed("the token's key does not fit")
        except (PKCS11Error, Failed) as error:
            problem = error
    raise problem


def _tokens(request: dict[str, Any]) -> Iterator[Any]:
    """The token in a slot, or every token of that label."""
    for slot in pkcs11.lib(request["module"]).get_slots(token_present=True):
        token = slot.get_token()
        if slot.slot_id == request["slot"] or (request["slot"] < 0 and token.label == request["token"]):
            yield token


def _key(session: Any, request: dict[str, Any]) -> Any:
    wanted: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.KEY_TYPE: KeyType.RSA}
    if request["id"]:
        wanted[Attribute.ID] = bytes.fromhex(request["id"])
    if request["label"]:
        wanted[Attribute.LABEL] = request["label"]
    found = list(session.get_objects(wanted))
    if len(found) != 1:
        raise Failed(f"{len(found)} RSA private keys in the token have the id and object of the URI; expected one")
    return found[0]


def _decrypt(key: Any, blob: bytes, digest: str) -> bytes | None:
    """OAEP in the token; where the token cannot do the hash, raw RSA there and OAEP here. None: the key does not fit."""
    mechanism, mgf = {"sha1": (Mechanism.SHA_1, MGF.SHA1), "sha256": (Mechanism.SHA256, MGF.SHA256)}[digest]
    try:
        return bytes(key.decrypt(blob, mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=(mechanism, mgf, None)))
    except PKCS11Error:
        try:
            return _oaep(bytes(key.decrypt(blob, mechanism=Mechanism.RSA_X_509)).rjust(len(blob), b"\0"), digest)
        except PKCS11Error:
            return None


def _oaep(block: bytes, digest: str) -> bytes | None:
    """EME-OAEP decoding with an empty label. Source: RFC 8017 7.1.2."""
    size = hashlib.new(digest).digest_size
    masked_seed, masked_data = block[1 : 1 + size], block[1 + size :]
    seed = _xor(masked_seed, _mgf1(masked_data, size, digest))
    data = _xor(masked_data, _mgf1(seed, len(masked_data), digest))
    padding, _, message = data[size:].partition(b"\1")
    good = hmac.compare_digest(data[:size], hashlib.new(digest, b"").digest())
    return message if good and block[:1] == b"\0" and not padding.strip(b"\0") else None


def _mgf1(seed: bytes, length: int, digest: str) -> bytes:
    blocks = (hashlib.new(digest, seed + counter.to_bytes(4)).digest() for counter in range(length // 20 + 1))
    return b"".join(blocks)[:length]


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    sys.exit(main())
