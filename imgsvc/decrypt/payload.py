"""What a stream processor for an encrypted type reads on fd 3: a protobuf Any around JSON.

Source: containerd's stream processor contract; imgcrypt's Payload (type URL and JSON member names).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from imgsvc.base.errors import InvalidArgument, printable
from imgsvc.base.oci import MAX_DOCUMENT, Descriptor, load_json_object

TYPE_URL: Final = "io.containerd.ocicrypt.v1.Payload"
FD: Final = 3
MAX_PAYLOAD: Final = 2 * MAX_DOCUMENT  # [bytes]; a descriptor comes out of a document of at most MAX_DOCUMENT


@dataclass(frozen=True, slots=True, repr=False)
class Payload:
    """The layer, and decryption parameters by name ("privkeys", …) as the sender's user gave them; each a list of values."""

    descriptor: Descriptor
    parameters: Mapping[str, tuple[bytes, ...]]


def encode(descriptor: Descriptor) -> bytes:
    """The payload of the node key model: keys are the processor's own business, so no parameters go along."""
    value = {"DecryptConfig": {"Parameters": None}, "Descriptor": descriptor.to_json()}
    return Any(type_url=TYPE_URL, value=json.dumps(value).encode()).SerializeToString()


def decode(data: bytes) -> Payload:
    """Raises: InvalidArgument."""
    where = f"payload on descriptor {FD}"
    if not data:
        raise InvalidArgument(
            "nothing came", where=where, hint="let the caller send the image layer's descriptor there (containerd: key_model, local pull)"
        )
    try:
        message = Any.FromString(data)
    except DecodeError as error:
        raise InvalidArgument("not a protobuf Any", where=where) from error
    if message.type_url.rpartition("/")[2] != TYPE_URL:
        raise InvalidArgument(f'unknown type "{printable(message.type_url, 80)}", expected {TYPE_URL}', where=where)
    value = load_json_object(message.value, where, limit=MAX_PAYLOAD)
    config = value.get("DecryptConfig") or {}
    parameters = (config.get("Parameters") if isinstance(config, dict) else None) or {}
    try:
        decoded = {name: tuple(base64.b64decode(item or "", validate=True) for item in items or ()) for name, items in parameters.items()}
    except (AttributeError, TypeError, binascii.Error) as error:
        raise InvalidArgument("DecryptConfig.Parameters is not an object of lists of base64", where=where) from error.with_traceback(None)
    return Payload(Descriptor.from_json(value.get("Descriptor"), where), decoded)
