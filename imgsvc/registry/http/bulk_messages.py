"""What the daemon and the process that fetches large bodies say to each other. Pure.

A request has a socket (SOCK_SEQPACKET) and some memory of its own, which the daemon makes and hands over with the order:

* the daemon: b"order", a JSON object, on the process's control socket, with [the request's socket, its memory (a memfd), then the
  files that the order's TLS settings name, open for reading: the process may not open them itself].
* the process: a head or a failure, a JSON object. After a head the body, in lots of at most LOT bytes, which lie in the slots
  of the memory in turn: COUNT bytes, big-endian, say how many. At the end another JSON object: a failure, or an empty one.
* the daemon: one byte for every lot it is done with, so that its slot can be filled again. Its end of the socket closed: no
  more of this.

JSON, because what comes from a process that talks to strangers is data and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass
from typing import Any, Final

import httpx

from imgsvc.base.errors import ImgsvcError
from imgsvc.base.errorwire import error_from_plain, error_to_plain
from imgsvc.base.oci import KIB, MIB
from imgsvc.registry.hosts.hosts import Tls
from imgsvc.registry.http.exchange import RequestFailed, Route, Timeouts, header_pairs, phase_of, request_for, route_of, timeouts_of, url_of
from imgsvc.registry.http.netguard import Reach
from imgsvc.registry.retry import Failure

LOT: Final = MIB  # [bytes]; what is done for each, on both sides and in a thread that stores it, takes about 0.4 ms of processors
SLOTS: Final = 2  # one is filled while the other is stored
MEMORY: Final = SLOTS * LOT
COUNT: Final = 4  # [bytes] of the message that a lot is there; no JSON of ours is that short but {}
MAX_MESSAGE: Final = 192 * KIB  # [bytes] that the kernel takes in one piece
MAX_FILES: Final = 200  # of TLS with one order; the kernel passes 253 descriptors at a time
MAX_END: Final = 64 * KIB  # [bytes] of a message after the head


@dataclass(frozen=True, slots=True)
class Order:
    """One request without a body."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    route: Route
    phase: str
    timeouts: Timeouts

    @classmethod
    def of(cls, request: httpx.Request) -> Order:
        """A request in the daemon."""
        route, timeouts = route_of(request), timeouts_of(request)
        return cls(request.method, url_of(request), header_pairs(request), route, phase_of(request), timeouts)

    def request(self) -> httpx.Request:
        """The same in the process. Raises: RequestFailed."""
        return request_for(self.method, self.url, self.headers, route=self.route, phase=self.phase, timeouts=self.timeouts)


@dataclass(frozen=True, slots=True)
class Head:
    """The start of an answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    reach: Reach


def pack_order(order: Order) -> bytes:
    """For unpack_order."""
    route = order.route
    return _packed(
        {
            "method": order.method,
            "url": order.url,
            "headers": order.headers,
            "tls": asdict(route.tls),
            "proxy": route.proxy,
            "connect_timeout": route.connect_timeout,
            "reachable": [reach.value for reach in route.reachable],
            "phase": order.phase,
            "timeouts": astuple(order.timeouts),
        }
    )


def unpack_order(message: bytes) -> Order:
    """What pack_order packed."""
    plain = json.loads(message)
    tls = plain["tls"]
    return Order(
        method=plain["method"],
        url=plain["url"],
        headers=_pairs(plain["headers"]),
        route=Route(
            tls=Tls(tuple(tls["ca"]), _pairs(tls["client"]), tls["skip_verify"]),
            proxy=plain["proxy"],
            connect_timeout=plain["connect_timeout"],
            reachable=frozenset(map(Reach, plain["reachable"])),
        ),
        phase=plain["phase"],
        timeouts=Timeouts(*plain["timeouts"]),
    )


def pack_head(head: Head) -> bytes:
    """For unpack_head."""
    return _packed({"status": head.status, "headers": head.headers, "reach": head.reach.value})


def pack_end(error: ImgsvcError | None = None) -> bytes:
    """The last message: what went wrong, if anything."""
    if error is None:
        return b"{}"
    told: dict[str, Any] = {**error_to_plain(error)}
    if isinstance(error, RequestFailed):
        told |= {name: getattr(error, name) for name in ("phase", "status", "wait", "is_plain_http", "is_silent")}
        told |= {"failure": error.failure.value}
        return _packed({"failed": told})
    return _packed({"error": told})


def unpack_head(message: bytes) -> Head:
    """Raises: the error, when the message is the end already."""
    plain = json.loads(message)
    _check(plain)
    return Head(plain["status"], _pairs(plain["headers"]), Reach(plain["reach"]))


def unpack_end(message: bytes) -> None:
    """Raises: what pack_end was given."""
    _check(json.loads(message))


def _check(plain: dict[str, Any]) -> None:
    if told := plain.get("failed"):
        raise RequestFailed(**{**told, "failure": Failure(told["failure"])})
    if told := plain.get("error"):
        raise error_from_plain(told)


def _pairs(plain: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((first, second) for first, second in plain)


def _packed(plain: dict[str, Any]) -> bytes:
    return json.dumps(plain).encode()
