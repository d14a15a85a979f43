"""Which addresses a server may send us to. Pure.

A challenge's realm and a redirect are URLs chosen by the server. They must not steer a daemon with access to the
node's own network at loopback, link-local (cloud metadata) and the like, unless the registry itself lives there.
The check is made on the very address that is connected to, so that DNS cannot change its mind in between.

Source: RFC 6890; RFC 4291 2.5.5.2 (mapped), RFC 6052 (NAT64), RFC 3056 (6to4).
"""

from __future__ import annotations

import ipaddress
from enum import Enum
from typing import Final

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


class Reach(Enum):
    """How far an address is: what answers there."""

    PUBLIC = "public"
    PRIVATE = "private"
    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    SPECIAL = "special"


def reach_of(address: str) -> Reach:
    """Class of an IP address; a zone (`%eth0`) is ignored, an IPv4 address inside an IPv6 one is looked through."""
    try:
        ip = _unwrap(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return Reach.SPECIAL
    if ip.is_loopback:
        return Reach.LOOPBACK
    if ip.is_link_local:
        return Reach.LINK_LOCAL
    if ip.is_multicast or ip.is_unspecified or ip.is_reserved:
        return Reach.SPECIAL
    return Reach.PUBLIC if ip.is_global else Reach.PRIVATE


def is_host_name(text: str) -> bool:
    """Whether a name can be looked up at all: no empty label, none longer than 63 characters."""
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return True


def allowed_from(origin: Reach) -> frozenset[Reach]:
    """Where a server at `origin` may send us: anywhere ordinary, and to its own class."""
    return frozenset({Reach.PUBLIC, Reach.PRIVATE, origin})


ANYWHERE: Final = frozenset(Reach)


def _unwrap(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        return ip.ipv4_mapped or ip.sixtofour or ip
    return ip
