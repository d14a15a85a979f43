"""The streaming server: HTTP/1.1 upgrades on loopback, one session per connection.

An address is good for one session; it is used up by a successful negotiation only, so that a client whose first proposal
is refused may try another one. A session that ends badly is logged, never retried.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from imgsvc.base.concurrency import in_thread, stop_tasks, time_limit
from imgsvc.base.errors import ImgsvcError, InvalidArgument, Unavailable
from imgsvc.runtime.settings import StreamSettings
from imgsvc.runtime.streaming.command import CommandSession, CommandWire, SpdyCommand, WebSocketCommand
from imgsvc.runtime.streaming.flow import until_first
from imgsvc.runtime.streaming.forward import SpdyForward
from imgsvc.runtime.streaming.forward_websocket import MAX_PORTS, WebSocketForward, WebSocketTunnel
from imgsvc.runtime.streaming.http import MAX_HEAD, HttpRefusal, Request, Upgrade, negotiate, parse_head, refuse
from imgsvc.runtime.streaming.interfaces import CommandTarget, PortTarget, StreamWants
from imgsvc.runtime.streaming.peer import Peer, PeerGone
from imgsvc.runtime.streaming.portforward import PROTOCOL, TUNNEL_PROTOCOL, WEBSOCKET_PROTOCOLS
from imgsvc.runtime.streaming.remotecommand import SPDY_VERSIONS, WEBSOCKET_VERSIONS
from imgsvc.runtime.streaming.tls import Certificate
from imgsvc.runtime.streaming.tokens import Tokens

HEAD_TIMEOUT_S: Final = 10.0  # a client writes its request at once
STREAM_CREATION_TIMEOUT_S: Final = 30.0  # for a client to open the streams it needs
MAX_HANDSHAKES: Final = 256  # connections that have not shown a token yet

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _CommandSession:
    target: CommandTarget
    wants: StreamWants


@dataclass(frozen=True, slots=True)
class _ForwardSession:
    target: PortTarget
    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: str  # the first part of the path
    session: _CommandSession | _ForwardSession


class StreamServer:
    """Serves what exec_url(), attach_url() and port_forward_url() hand out. Lives on one event loop."""

    def __init__(self, config: StreamSettings, *, stream_creation_timeout_s: float = STREAM_CREATION_TIMEOUT_S) -> None:
        self._config = config
        self._stream_creation_timeout_s = stream_creation_timeout_s
        self._tokens: Tokens[_Entry] = Tokens()
        self._sessions: set[asyncio.Task[None]] = set()
        self._handshakes: dict[asyncio.Task[None], str] = {}  # those under way with the address of each, the oldest first
        self._server: asyncio.Server | None = None
        self._certificate = Certificate(config.tls_cert_file, config.tls_key_file) if config.tls_cert_file else None
        self._watch_certificate: asyncio.Task[None] | None = None
        self._base_url = ""

    async def start(self) -> None:
        """Listen. Raises: InvalidArgument (address, certificate), Unavailable (port taken)."""
        self._check_address()
        context = await in_thread(self._certificate.load) if self._certificate else None
        try:
            waits = {"ssl_handshake_timeout": HEAD_TIMEOUT_S} if context else {}
            self._server = await asyncio.start_server(
                self._accept, self._config.address, self._config.port, limit=MAX_HEAD, ssl=context, **waits
            )
        except OSError as error:
            raise Unavailable(
                f"cannot listen: {error.strerror or error}",
                where=f"{self._config.address}:{self._config.port}",
                hint="correct stream.address or stream.port",
            ) from error
        if self._certificate:
            self._watch_certificate = asyncio.create_task(self._certificate.follow())
        host, port = self._server.sockets[0].getsockname()[:2]
        self._base_url = f"{'https' if context else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    async def close(self) -> None:
        """Stop listening and end every session; their targets have given back everything on return. Idempotent."""
        if self._server:
            self._server.close()
        await stop_tasks(*self._sessions, *([self._watch_certificate] if self._watch_certificate else []))
        if self._server:
            await self._server.wait_closed()
            self._server = None

    async def reload_certificate(self) -> None:
        """Take a replaced certificate for new connections. Raises: InvalidArgument, the old one stays in use."""
        if self._certificate:
            await in_thread(self._certificate.reload)

    def exec_url(self, target: CommandTarget, wants: StreamWants) -> str:
        """A one-time address for an exec session. Raises: InvalidArgument, ResourceExhausted."""
        return self._issue("exec", _command_session(target, wants))

    def attach_url(self, target: CommandTarget, wants: StreamWants) -> str:
        """A one-time address for an attach session. Raises: InvalidArgument, ResourceExhausted."""
        return self._issue("attach", _command_session(target, wants))

    def port_forward_url(self, target: PortTarget, ports: Sequence[int]) -> str:
        """A one-time address for a port-forward session. ports are needed by old WebSocket clients only.

        Raises: InvalidArgument, ResourceExhausted.
        """
        if len(ports) > MAX_PORTS or not all(0 < port < 1 << 16 for port in ports):
            raise InvalidArgument(f"ports must be at most {MAX_PORTS} numbers from 1 to 65535")
        return self._issue("portforward", _ForwardSession(target, tuple(ports)))

    def _issue(self, kind: str, session: _CommandSession | _ForwardSession) -> str:
        return f"{self._base_url}/{kind}/{self._tokens.issue(_Entry(kind, session))}"

    def _check_address(self) -> None:
        try:
            loopback = ipaddress.ip_address(self._config.address).is_loopback
        except ValueError as error:
            raise InvalidArgument(f'"{self._config.address}" is not an IP address', where="stream.address") from error
        if not loopback and not self._certificate:
            raise InvalidArgument(
                f"{self._config.address} is not a loopback address, and there is no TLS",
                where="stream.address",
                hint="set stream.tls_cert_file and stream.tls_key_file, or listen on 127.0.0.1",
            )

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._sessions.add(task)
        try:
            await self._serve(reader, writer)
        except PeerGone:
            pass
        except ImgsvcError as error:
            _log.info("streaming session ended: %s", error)
        except asyncio.CancelledError:
            pass  # close(); asyncio.streams would log it
        finally:
            self._sessions.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            entry, upgrade = await self._handshake(reader, str((writer.get_extra_info("peername") or ("",))[0]))
        except HttpRefusal as refusal:
            peer = Peer(reader, writer, HEAD_TIMEOUT_S)
            await peer.send(refuse(refusal))
            await peer.flush()
            await peer.linger()
            return
        peer = Peer(reader, writer, self._config.idle_timeout)
        await peer.send(upgrade.response)
        await self._serve_session(peer, upgrade, entry.session)
        await peer.linger()

    async def _handshake(self, reader: asyncio.StreamReader, address: str) -> tuple[_Entry, Upgrade]:
        if len(self._handshakes) >= MAX_HANDSHAKES:
            self._drop_one()
        task = asyncio.current_task()
        assert task
        self._handshakes[task] = address
        try:
            async with time_limit(HEAD_TIMEOUT_S):
                request = parse_head(await _read_head(reader))
        except TimeoutError as error:
            raise HttpRefusal(HTTPStatus.REQUEST_TIMEOUT, "no complete request in time") from error
        finally:
            self._handshakes.pop(task, None)
        return self._route(request)

    def _drop_one(self) -> None:
        """Close the oldest handshake of the address that has most: a client with a session to start needs only a moment.

        Refusing new ones instead would let any local process block the server by sending nothing.
        """
        most = Counter(self._handshakes.values()).most_common(1)[0][0]
        oldest = next(task for task, address in self._handshakes.items() if address == most)
        del self._handshakes[oldest]
        oldest.cancel()

    def _route(self, request: Request) -> tuple[_Entry, Upgrade]:
        """Find the session of a path and use its token up. No await: a token cannot be used twice."""
        if request.method not in ("GET", "POST"):
            raise HttpRefusal(HTTPStatus.METHOD_NOT_ALLOWED, "use GET or POST", {"Allow": "GET, POST"})
        _, kind, token, *rest = [*request.path.split("/"), "", ""]
        entry = self._tokens.peek(token)
        if entry is None or entry.kind != kind or any(rest):
            raise HttpRefusal(HTTPStatus.NOT_FOUND, "no such session; an address is valid for one minute and one use")
        if isinstance(entry.session, _CommandSession):
            upgrade = negotiate(request, spdy=SPDY_VERSIONS, websocket=WEBSOCKET_VERSIONS)
        else:
            upgrade = negotiate(request, spdy=(PROTOCOL,), websocket=(TUNNEL_PROTOCOL, *WEBSOCKET_PROTOCOLS, ""))
        self._tokens.use(token)
        return entry, upgrade

    async def _serve_session(self, peer: Peer, upgrade: Upgrade, session: _CommandSession | _ForwardSession) -> None:
        if isinstance(session, _CommandSession):
            versions = WEBSOCKET_VERSIONS if upgrade.websocket else SPDY_VERSIONS
            version = versions[upgrade.protocol]
            make: Callable[..., CommandWire] = WebSocketCommand if upgrade.websocket else SpdyCommand
            command = CommandSession(make(peer, version, session.wants), version, session.wants, session.target)
            await command.serve(peer, self._stream_creation_timeout_s)
            return
        if not upgrade.websocket:
            work = SpdyForward(peer, session.target, pair_timeout_s=self._stream_creation_timeout_s).serve()
        elif upgrade.protocol == TUNNEL_PROTOCOL:
            work = SpdyForward(WebSocketTunnel(peer), session.target, pair_timeout_s=self._stream_creation_timeout_s).serve()
        else:
            work = WebSocketForward(peer, WEBSOCKET_VERSIONS[upgrade.protocol], session.ports, session.target).serve()
        await until_first(work, peer.watch())
        with contextlib.suppress(PeerGone):
            await peer.flush()


def _command_session(target: CommandTarget, wants: StreamWants) -> _CommandSession:
    wants.check()
    return _CommandSession(target, wants)


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise HttpRefusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"request head of more than {MAX_HEAD} bytes") from error
    except (asyncio.IncompleteReadError, OSError) as error:
        raise PeerGone("the client left during the request") from error
