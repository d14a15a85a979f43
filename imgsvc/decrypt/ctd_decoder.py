"""`ctd-decoder`: the built-in decryption as a program with containerd's stream processor contract.

stdin is ciphertext, stdout plaintext, descriptor 3 the payload; `--decryption-keys-path DIR` is the only argument; a
failure is text on stderr and status 1. The last chunk is held back until the MAC is right, so that a layer that was
tampered with never looks complete, and one of up to a chunk yields nothing at all.

Source: imgcrypt's program of that name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from imgsvc.base.errors import ImgsvcError, InvalidArgument, from_os_error
from imgsvc.decrypt import payload
from imgsvc.decrypt.aesctr import AesCtrHmac
from imgsvc.decrypt.decryptor import build_wrappers, key_hint
from imgsvc.decrypt.keydir import KeyDirectory
from imgsvc.decrypt.keys import KeyFileError, KeyRing, parse_key_file
from imgsvc.decrypt.packets import LayerOptions
from imgsvc.decrypt.unwrap import unwrap_layer

CHUNK: Final = 256 * 1024  # [bytes] per step; also what is held back
_HELPER_TIMEOUT_S: Final = 30.0
_LINGER_S: Final = "0.5"
_OWN_PARAMETERS: Final = frozenset(
    ["privkeys", "privkeys-passwords", "x509s", "gpg-privatekeys", "gpg-privatekeys-passwords", "pkcs11-yamls", "pkcs11-config"]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode one layer; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ctd-decoder", description="Decrypt an image layer for containerd.")
    parser.add_argument("--decryption-keys-path", metavar="DIR", type=Path, help="directory of private keys")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as every filter: end when the reader has gone
    try:
        options = _options(_read_payload(), chosen.decryption_keys_path, os.environ)
        _decode(options, sys.stdin.buffer, sys.stdout.buffer)
    except ImgsvcError as error:
        return _failed(error)
    except OSError as error:
        return _failed(from_os_error(error, "decode"))
    return 0


def _failed(error: ImgsvcError) -> int:
    """Say why, and let a helper hold stdout open a little longer than this process lives.

    containerd does not wait for the exit: when it meets the end of stdout first, it reports "wrong diff id" and drops
    this text. imgsvc does wait, and kills the helper with the rest of the process group.
    """
    print(error, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        subprocess.Popen(["sleep", _LINGER_S], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 1


def _read_payload() -> payload.Payload:
    try:
        with open(payload.FD, "rb") as stream:
            return payload.decode(stream.read(payload.MAX_PAYLOAD))
    except OSError as error:
        raise InvalidArgument(
            f"no payload on descriptor {payload.FD}: {error.strerror}",
            hint="containerd sends it for the processors io.containerd.ocicrypt.decoder.v1.tar and .tar.gzip, with local pull only",
        ) from error


def _options(given: payload.Payload, keys_path: Path | None, environment: Mapping[str, str]) -> LayerOptions:
    """The layer's options, from the directory's keys first, then from those in the payload."""
    if keys_path and not keys_path.exists():
        raise InvalidArgument("the directory of decryption keys does not exist", where=str(keys_path))
    directory, _ = KeyDirectory(keys_path).load()
    ring = KeyRing.join([directory, _sent_keys(given.parameters)], source=directory.source or "the payload")
    config = environment.get("OCICRYPT_KEYPROVIDER_CONFIG")
    wrappers, problem = build_wrappers(
        ring,
        keyprovider_config=Path(config) if config else None,
        ocicrypt_config=environment.get("OCICRYPT_CONFIG", ""),
        provider_parameters={name: values for name, values in given.parameters.items() if name not in _OWN_PARAMETERS},
        timeout_s=_HELPER_TIMEOUT_S,
    )
    return unwrap_layer(given.descriptor, wrappers, hint=key_hint(ring), provider_problem=problem).options


def _sent_keys(parameters: Mapping[str, tuple[bytes, ...]]) -> KeyRing:
    """Keys in the payload, each with the password of the same position."""
    rings, skipped = [], []
    for name in ("privkeys", "gpg-privatekeys", "pkcs11-yamls"):
        passwords = parameters.get(f"{name}-passwords", ())
        for position, key in enumerate(parameters.get(name, ())):
            password = passwords[position] if position < len(passwords) else b""
            source = f"{name}[{position}] of the payload"
            try:
                rings.append(parse_key_file(key, source, [password] if password else []))
            except KeyFileError as error:
                skipped.append(f"{source}: {error}")
    return KeyRing.join(rings, skipped=skipped)


def _decode(options: LayerOptions, source: BinaryIO, target: BinaryIO) -> None:
    """Pump everything through the cipher. Raises: DataLoss."""
    transform, held = AesCtrHmac(options), b""
    while chunk := source.read(CHUNK):
        plain = transform.update(chunk)
        target.write(held)
        held = plain
    transform.finalize()
    target.write(held)
    target.flush()


if __name__ == "__main__":
    sys.exit(main())
