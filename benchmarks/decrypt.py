"""Layer decryption: cipher throughput on one and two threads, key unwrapping, a large key directory.

Run: python -m benchmarks.decrypt [MIB]. Prints one line per measurement, best of a few rounds.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from imgsvc.base.oci import MIB
from imgsvc.decrypt.aesctr import AesCtrHmac
from imgsvc.decrypt.decryptor import LayerDecryptor, Settings
from imgsvc.decrypt.jwe import JweWrapper
from imgsvc.decrypt.keys import KeyRing, PrivateKey
from imgsvc.decrypt.packets import LayerOptions
from tests.decrypt.vectors import jwe, seal

ROUNDS = 5
CHUNK = MIB  # [bytes], what the unpack worker reads at once


def best(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Shortest time [seconds]."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def cipher(size: int) -> None:
    """AES-256-CTR + HMAC-SHA256 over `size` bytes per thread."""
    data = memoryview(os.urandom(size))

    def one(_: int = 0) -> None:
        transform = AesCtrHmac(LayerOptions(b"k" * 32, b"n" * 16, b"m" * 32))
        for offset in range(0, size, CHUNK):
            transform.update(data[offset : offset + CHUNK])

    with ThreadPoolExecutor(2) as pool:
        print(f"cipher, 1 thread     {size / best(one) / 1e6:8.0f} MB/s")
        print(f"cipher, 2 threads    {2 * size / best(lambda: list(pool.map(one, range(2)))) / 1e6:8.0f} MB/s")


def unwrapping() -> None:
    """One JWE packet per kind of key."""
    keys: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = {
        "RSA 2048": rsa.generate_private_key(65537, 2048),
        "RSA 4096": rsa.generate_private_key(65537, 4096),
        "P-256": ec.generate_private_key(ec.SECP256R1()),
        "P-521": ec.generate_private_key(ec.SECP521R1()),
    }
    for name, key in keys.items():
        wrapper = JweWrapper(KeyRing((PrivateKey("key", key),)))
        packet = jwe(seal(b"").options, [(key.public_key(), "RSA-OAEP" if name.startswith("RSA") else "ECDH-ES+A256KW")])
        print(f"unwrap, jwe {name:9}{best(partial(wrapper.unwrap, packet), 20) * 1e3:8.2f} ms")


def directory(count: int) -> None:
    """A directory of `count` keys, of which the last one fits: first unwrapping, and asking again."""
    with tempfile.TemporaryDirectory() as name:
        key = rsa.generate_private_key(65537, 2048)
        for number in range(count):
            one = key if number == count - 1 else ec.generate_private_key(ec.SECP256R1())
            pem = one.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            path = Path(name) / f"{number:06}.pem"
            path.write_bytes(pem)
            path.chmod(0o600)
        sealed = seal(b"")
        layer = sealed.descriptor(jwe=jwe(sealed.options, [(key.public_key(), "RSA-OAEP")]))
        decryptor = LayerDecryptor(Settings(Path(name), b"salt"))
        print(f"{count} keys, first    {best(lambda: asyncio.run(decryptor.unwrap(layer)), 1) * 1e3:8.2f} ms")
        print(f"{count} keys, again    {best(lambda: asyncio.run(decryptor.unwrap(layer))) * 1e3:8.2f} ms")


if __name__ == "__main__":
    cipher(int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 256 * MIB)
    unwrapping()
    directory(1000)
