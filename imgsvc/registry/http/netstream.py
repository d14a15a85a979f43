"""The network below httpcore: sockets that are checked before they connect, and reads large enough for big blobs.

httpcore's own backend reads 64 KiB per wake-up through a transport; that costs more CPU per byte than hashing does. Here
a wake-up takes what the kernel has, up to READ_SIZE, in one call and one copy. A read never keeps the loop longer than that.

Source: RFC 8305 (happy eyeballs) for the order and the 300 ms between attempts.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import httpcore

from imgsvc.base.concurrency import time_limit
from imgsvc.registry.http.netguard import Reach, reach_of
from imgsvc.registry.http.tls import reason_of

READ_SIZE: Final = 512 * 1024  # [bytes] at most per read: each costs as much for what comes after it as copying that does
_RECORD: Final = 16 * 1024  # [bytes] at most in one TLS record, which is what one call decrypts
_NEXT_ADDRESS_AFTER_S: Final = 0.3

SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


class ConnectFailed(httpcore.ConnectError):
    """No TCP connection."""


class AddressRefused(httpcore.ConnectError):
    """The name resolves to an address that a server may not redirect to."""


class TlsFailed(httpcore.ConnectError):
    """No TLS session. plain: the peer evidently speaks no TLS. no_protocol: it has none of those that we offered."""

    def __init__(self, text: str, *, plain: bool, no_protocol: bool = False) -> None:
        super().__init__(text)
        self.plain = plain
        self.no_protocol = no_protocol


class Backend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses of the allowed classes."""

    def __init__(self, allowed: frozenset[Reach]) -> None:
        self._allowed = allowed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """As httpcore's; local_address and socket_options are not used by us and refused."""
        if local_address or socket_options:
            raise ConnectFailed("local address and socket options are not supported")
        try:
            async with time_limit(timeout):
                return SocketStream(await self._connect(host, port))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"no connection within {timeout:g} s") from error

    async def _connect(self, host: str, port: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConnectFailed(f"name not resolved: {error.strerror or error}") from error
        except ValueError as error:  # of the codec for names, and for a NUL
            raise ConnectFailed("this cannot be a host's name") from error
        permitted = [entry for entry in found if reach_of(str(entry[4][0])) in self._allowed]
        if not permitted:
            kinds = ", ".join(sorted({reach_of(str(entry[4][0])).value for entry in found}))
            raise AddressRefused(f"{host} has only {kinds} addresses, which this registry may not redirect to")
        return await _first_connected(_interleave(permitted))


def _interleave(found: list[Any]) -> list[Any]:
    """Families in turn, the resolver's first choice first."""
    first = [entry for entry in found if entry[0] == found[0][0]]
    other = [entry for entry in found if entry[0] != found[0][0]]
    return [entry for pair in itertools.zip_longest(first, other) for entry in pair if entry is not None]


async def _first_connected(addresses: list[Any]) -> socket.socket:
    """Start an attempt every 300 ms or as soon as one failed; the first success wins, the others are closed."""
    errors: list[OSError] = []
    waiting = list(addresses)
    running: set[asyncio.Task[socket.socket]] = set()
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.ensure_future(_connect_one(waiting.pop(0))))
            done, running = await asyncio.wait(
                running, timeout=_NEXT_ADDRESS_AFTER_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            winners = []
            for task in done:
                error = task.exception()
                if error is None:
                    winners.append(task.result())
                elif isinstance(error, OSError):
                    errors.append(error)
                else:
                    raise error
            for extra in winners[1:]:
                extra.close()
            if winners:
                return winners[0]
    finally:
        for task in running:
            task.cancel()
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()
    reasons = "; ".join(dict.fromkeys(map(_connect_reason, errors)))
    raise ConnectFailed(reasons or "no address") from (errors[0] if errors else None)


def _connect_reason(error: OSError) -> str:
    """Asyncio's text says `Connect call failed (…)` and leaves out why."""
    _, _, address = (error.strerror or "").partition("failed ")
    return f"{os.strerror(error.errno)} {address}".strip() if error.errno else str(error)


async def _connect_one(entry: Any) -> socket.socket:
    family, kind, protocol, _, address = entry
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


class SocketStream(httpcore.AsyncNetworkStream):
    """A connected TCP socket. One reader and one writer at a time, as httpcore uses it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._peer = sock.getpeername()  # now: a reset would make it unknown
        self._loop = asyncio.get_running_loop()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Up to READ_SIZE bytes: httpcore asks for 64 KiB but takes what it gets. b"" at the end."""
        return await self.read_up_to(READ_SIZE, timeout)

    async def read_up_to(self, size: int, timeout: float | None) -> bytes:
        """What is there, at least one byte unless the peer closed."""
        try:
            # Let others run first: a fast peer would otherwise keep us reading without ever waiting.
            await asyncio.sleep(0)
            data = self._take(size)
            if data is None:
                async with time_limit(timeout):
                    while data is None:
                        await self._readable()
                        data = self._take(size)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(f"no data for {timeout:g} s") from error
        except OSError as error:
            raise httpcore.ReadError(error.strerror or str(error)) from error
        return data

    def _take(self, size: int) -> bytes | None:
        """What the kernel holds, up to `size`; None when it holds nothing."""
        try:
            return self._sock.recv(size)
        except (BlockingIOError, InterruptedError):
            return None

    async def _readable(self) -> None:
        future = self._loop.create_future()
        fd = self._sock.fileno()
        if fd < 0:
            raise OSError("connection closed")
        self._loop.add_reader(fd, _wake, future)
        try:
            await future
        finally:
            self._loop.remove_reader(fd)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        try:
            async with time_limit(timeout):
                await self._loop.sock_sendall(self._sock, buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout(f"the peer took no data for {timeout:g} s") from error
        except OSError as error:
            raise httpcore.WriteError(error.strerror or str(error)) from error

    async def aclose(self) -> None:
        """Close without waiting. Idempotent."""
        self._sock.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """The same connection, encrypted."""
        return await _start_tls(self, ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        """`server_addr`, `socket`, `is_readable` (httpcore: the idle connection was closed by the peer)."""
        if info == "is_readable":
            return _is_readable(self._sock)
        if info == "server_addr":
            return self._peer
        return self._sock if info == "socket" else None


class TlsStream(httpcore.AsyncNetworkStream):
    """TLS over another stream, in memory, so that it works over a proxy's TLS too."""

    def __init__(self, inner: SocketStream | TlsStream, context: ssl.SSLContext, server_hostname: str | None) -> None:
        self._inner = inner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)

    async def handshake(self, timeout: float | None) -> None:
        """Raises: TlsFailed."""
        try:
            async with time_limit(timeout):
                await self._handshake()
        except TimeoutError as error:
            raise TlsFailed(f"no TLS session within {timeout:g} s", plain=False) from error
        except ssl.SSLError as error:
            reason = _tls_reason(error)
            raise TlsFailed(reason, plain=_is_plain(error), no_protocol="no application protocol" in reason) from error
        except (httpcore.ReadError, httpcore.WriteError) as error:
            raise TlsFailed(f"connection lost during the TLS handshake: {error}", plain=False) from error

    async def _handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush(None)
                data = await self._inner.read_up_to(READ_SIZE, None)
                if not data:
                    raise httpcore.ReadError("closed by the peer") from None
                self._incoming.write(data)
            except ssl.SSLError:
                await self._flush(None)  # the alert tells the peer why
                raise
            else:
                return await self._flush(None)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Decrypted bytes, b"" at the end."""
        return await self.read_up_to(READ_SIZE, timeout)

    async def read_up_to(self, size: int, timeout: float | None) -> bytes:
        """What can be decrypted now, waiting for at least one byte."""
        try:
            while True:
                data = self._decrypt(size)
                if data is not None:
                    await self._flush(timeout)  # a key update may have asked for an answer
                    return data
                raw = await self._inner.read_up_to(READ_SIZE, timeout)
                if raw:
                    self._incoming.write(raw)
                else:
                    self._incoming.write_eof()
        except ssl.SSLError as error:
            raise httpcore.ReadError(_tls_reason(error)) from error

    def _decrypt(self, size: int) -> bytes | None:
        """What can be decrypted without reading, up to `size` and some; None when nothing can."""
        parts: list[bytes] = []
        have = 0
        while have < size:
            try:
                data = self._tls.read(_RECORD)
            except ssl.SSLWantReadError:
                return b"".join(parts) if parts else None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            if not data:
                break
            parts.append(data)
            have += len(data)
        return b"".join(parts)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Encrypt and send all of it."""
        try:
            view = memoryview(buffer)
            while view:
                view = view[self._tls.write(view) :]
                await self._flush(timeout)
        except ssl.SSLError as error:
            raise httpcore.WriteError(_tls_reason(error)) from error

    async def _flush(self, timeout: float | None) -> None:
        if data := self._outgoing.read():
            await self._inner.write(data, timeout)

    async def aclose(self) -> None:
        """Close the connection; no closing handshake, HTTP knows where a body ends."""
        await self._inner.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """TLS inside TLS, as behind an https:// proxy."""
        return await _start_tls(self, ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        """`ssl_object`, else what the inner stream knows."""
        return self._tls if info == "ssl_object" else self._inner.get_extra_info(info)


async def _start_tls(
    inner: SocketStream | TlsStream, context: ssl.SSLContext, server_hostname: str | None, timeout: float | None
) -> TlsStream:
    async with _closing_on_error(inner):
        try:
            stream = TlsStream(inner, context, server_hostname)
        except ValueError as error:  # behind a proxy the name was not resolved here
            raise TlsFailed("this cannot be a host's name", plain=False) from error
        await stream.handshake(timeout)
    return stream


@asynccontextmanager
async def _closing_on_error(stream: SocketStream | TlsStream) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await stream.aclose()
        raise


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_readable(sock: socket.socket) -> bool:
    if sock.fileno() < 0:
        return True
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_plain(error: ssl.SSLError) -> bool:
    return error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not trusted: {reason_of(error)}"
    if _is_plain(error):
        return "the server answered plain HTTP on a TLS port"
    return reason_of(error)
