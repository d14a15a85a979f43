"""Keys wrapped as PKCS#7 EnvelopedData, the way the Go writers of images make it.

Their documents are not valid CMS, so strict readers refuse them: the GCM parameters are a SEQUENCE whose tag lacks the
constructed bit around another SEQUENCE with a context-tagged nonce, and one writer wraps the content in an extra OCTET
STRING. This reader walks DER leniently: it looks for what it needs and authenticates the result.

Source: RFC 5652 6, RFC 5084; the two writers' output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, padding
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP, AsymmetricPadding, PKCS1v15
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from imgsvc.base.errors import printable
from imgsvc.decrypt.interfaces import KeyWrapper, NotOpened
from imgsvc.decrypt.keys import KeyRing, PrivateKey

MAX_RECIPIENTS: Final = 256  # per packet; each costs a private key operation per key

_SEQUENCE, _SET, _OCTETS, _INTEGER, _OID = 0x30, 0x31, 0x04, 0x02, 0x06
_ENVELOPED_DATA: Final = bytes.fromhex("2a864886f70d010703")
_RSA: Final = bytes.fromhex("2a864886f70d010101")
_RSA_OAEP: Final = bytes.fromhex("2a864886f70d010107")
_AES: Final = bytes.fromhex("6086480165030401")  # + 2, 22, 42 for CBC and 6, 26, 46 for GCM with 128, 192, 256 bits
_CBC_KEYS: Final = {2: 16, 22: 24, 42: 32}
_GCM_KEYS: Final = {6: 16, 26: 24, 46: 32}
_HASHES: Final[dict[bytes, hashes.HashAlgorithm]] = {
    bytes.fromhex("2b0e03021a"): hashes.SHA1(),  # noqa: S303 - OAEP's default, not used for collision resistance
    bytes.fromhex("608648016503040201"): hashes.SHA256(),
    bytes.fromhex("608648016503040202"): hashes.SHA384(),
    bytes.fromhex("608648016503040203"): hashes.SHA512(),
}
_NAMES: Final = {3: "CN", 6: "C", 7: "L", 8: "ST", 10: "O", 11: "OU"}  # last number of 2.5.4.n


class Malformed(ValueError):
    """Not the document expected."""


@dataclass(frozen=True, slots=True)
class _Node:
    """One DER element."""

    tag: int
    value: bytes

    def children(self) -> list[_Node]:
        """The elements inside. Raises: Malformed."""
        return list(_elements(self.value))


@dataclass(frozen=True, slots=True)
class _Recipient:
    issuer: _Node
    serial: int
    padding: AsymmetricPadding
    encrypted_key: bytes


@dataclass(frozen=True, slots=True)
class _Envelope:
    recipients: tuple[_Recipient, ...]
    cipher: int  # last number of the AES algorithm identifier
    nonce: bytes
    content: bytes


class Pkcs7Wrapper:
    """Tries every RSA key on every recipient; certificates are not needed, they serve error texts in the packet only."""

    scheme: Final = "pkcs7"

    def __init__(self, ring: KeyRing) -> None:
        self._keys = ring.private

    def unwrap(self, packet: bytes) -> bytes:
        """See KeyWrapper."""
        try:
            envelope = _parse(packet)
        except Malformed as error:
            raise NotOpened("not PKCS#7 enveloped data for RSA recipients") from error
        for content_key in _content_keys(envelope.recipients, self._keys):
            plain = _decrypt(envelope, content_key)
            if plain is not None:
                return plain
        raise NotOpened(f"none of {len(self._keys)} private keys fits")

    def recipients(self, packet: bytes) -> list[str]:
        """See KeyWrapper."""
        try:
            return [f"issuer {_name(r.issuer)} serial {r.serial:x}" for r in _parse(packet).recipients]
        except ValueError:
            return []


def wrapper(ring: KeyRing) -> KeyWrapper:
    """The wrapper, as its protocol."""
    return Pkcs7Wrapper(ring)


def _elements(data: bytes) -> Iterator[_Node]:
    offset = 0
    while offset < len(data):
        header = data[offset : offset + 2]
        if len(header) < 2 or header[0] & 0x1F == 0x1F:
            raise Malformed("cut short, or a long tag")
        length, offset = header[1], offset + 2
        if length & 0x80:
            count = length & 0x7F
            if not 1 <= count <= 4:
                raise Malformed("not DER: indefinite or huge length")
            length, offset = int.from_bytes(data[offset : offset + count]), offset + count
        if offset + length > len(data):
            raise Malformed("cut short")
        yield _Node(header[0], data[offset : offset + length])
        offset += length


def _parse(data: bytes) -> _Envelope:
    """ContentInfo > EnvelopedData > (version, recipients, (type, cipher, content)). Raises: Malformed."""
    try:
        (info,) = _elements(data)
        kind, wrapped = info.children()
        if kind.value != _ENVELOPED_DATA:
            raise Malformed("not enveloped data")
        parts = wrapped.children()[0].children()
        recipient_set = next(p for p in parts if p.tag == _SET)
        content_info = parts[parts.index(recipient_set) + 1]
        _type, algorithm, *content = content_info.children()
        cipher, parameters = algorithm.children()
        entries = recipient_set.children()
        recipients = tuple(r for r in map(_recipient, entries) if r)
    except (ValueError, IndexError, StopIteration) as error:
        raise Malformed("not enveloped data") from error
    if not cipher.value.startswith(_AES) or len(cipher.value) != len(_AES) + 1 or len(entries) > MAX_RECIPIENTS:
        raise Malformed("another cipher than AES")
    nonce = next(_leaves(parameters, (_OCTETS, 0x84)), b"")
    return _Envelope(recipients, cipher.value[-1], nonce, b"".join(leaf for node in content for leaf in _leaves(node, (_OCTETS, 0x80))))


def _recipient(node: _Node) -> _Recipient | None:
    """A key transport recipient named by issuer and serial; None for other kinds, which must not hide this one."""
    try:
        _version, identifier, algorithm, encrypted_key = node.children()
        issuer, serial = identifier.children()
        oid, *parameters = algorithm.children()
    except ValueError:
        return None
    if oid.value == _RSA:
        scheme: AsymmetricPadding = PKCS1v15()
    elif oid.value == _RSA_OAEP:
        digest = next((_HASHES[leaf] for p in parameters for leaf in _leaves(p, (_OID,)) if leaf in _HASHES), hashes.SHA1())  # noqa: S303
        scheme = OAEP(MGF1(digest), digest, None)
    else:
        return None
    return _Recipient(issuer, int.from_bytes(serial.value), scheme, encrypted_key.value)


def _leaves(node: _Node, tags: tuple[int, ...], depth: int = 0) -> Iterator[bytes]:
    """Values of the given tags inside, through constructed elements and the SEQUENCE that claims to be primitive."""
    if node.tag in tags:
        yield node.value
    elif depth < 8 and (node.tag & 0x20 or node.tag == 0x10):
        for child in node.children():
            yield from _leaves(child, tags, depth + 1)


def _content_keys(recipients: Sequence[_Recipient], keys: Sequence[PrivateKey]) -> Iterator[bytes]:
    for recipient in recipients:
        for key in keys:
            if isinstance(key.key, rsa.RSAPrivateKey) and len(recipient.encrypted_key) == (key.key.key_size + 7) // 8:
                try:
                    yield key.key.decrypt(recipient.encrypted_key, recipient.padding)
                except ValueError:
                    continue


def _decrypt(envelope: _Envelope, key: bytes) -> bytes | None:
    """A wrong key of the right length is usual here: RSA with PKCS#1 v1.5 yields random bytes instead of an error."""
    try:
        if _GCM_KEYS.get(envelope.cipher) == len(key) and len(envelope.nonce) == 12:
            return AESGCM(key).decrypt(envelope.nonce, envelope.content, None)
        if _CBC_KEYS.get(envelope.cipher) != len(key):
            return None
        decryptor = Cipher(algorithms.AES(key), modes.CBC(envelope.nonce)).decryptor()
        unpadder = padding.PKCS7(128).unpadder()
        plain = unpadder.update(decryptor.update(envelope.content) + decryptor.finalize()) + unpadder.finalize()
    except (InvalidTag, ValueError):
        return None
    # CBC authenticates nothing; the content is a JSON object, garbage is not.
    return plain if plain[:1] == b"{" else None


def _name(issuer: _Node) -> str:
    """RFC 4514 in spirit: CN=…,O=…; attributes without a short name are left out."""
    words = []
    for attribute in issuer.children():
        for pair in attribute.children():
            kind, value = pair.children()
            if kind.value[:2] == b"\x55\x04" and kind.value[-1] in _NAMES:
                words.append(f"{_NAMES[kind.value[-1]]}={printable(value.value.decode('utf-8', 'replace'), 64)}")
    return ",".join(words) or "without a name"
