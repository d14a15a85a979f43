"""The process that fetches large bodies: a Transport, and memory shared with the daemon that bodies are put into.

Reading from sockets, decrypting TLS and taking HTTP apart would otherwise keep the daemon's event loop, and the interpreter
lock, from answering calls. It ends when the daemon does; it may be killed at any time, and what it was fetching is asked for again.
It runs as a user of its own who owns nothing, under a filter of system calls (confinement.py): certificates and keys that only
root may read come with the orders.

Source: bulk_messages.py for what is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import mmap
import os
import socket
import ssl
import sys
import traceback
from pathlib import Path
from typing import Final

from imgsvc.base import confinement, kernel
from imgsvc.base.concurrency import stop_tasks
from imgsvc.base.errors import ImgsvcError, Internal
from imgsvc.registry.http.bulk_messages import (
    COUNT,
    LOT,
    MAX_FILES,
    MAX_MESSAGE,
    MEMORY,
    SLOTS,
    Head,
    Order,
    pack_end,
    pack_head,
    unpack_order,
)
from imgsvc.registry.http.exchange import header_pairs, reach_behind
from imgsvc.registry.http.redact import shown_url
from imgsvc.registry.http.tls import HandedFiles, names_in
from imgsvc.registry.http.transport import Transport

# Imported by others on first use, when their files may not be readable any more.
_LATE_MODULES: Final = ("anyio._backends._asyncio", "encodings.ascii", "encodings.idna", "httpcore._async.http2")
_WAIT_S: Final = 0.05  # that bytes lie in a lot which is not full yet


class Lots:
    """Fills the slots of a request's memory in turn, and says so when one is full or has waited for long enough."""

    def __init__(self, job: socket.socket, memory: mmap.mmap) -> None:
        self._job = job
        self._memory = memory
        self._free = asyncio.Semaphore(SLOTS)
        self._slot = 0
        self._used = 0  # bytes of it; with none, it may still be the daemon's
        self._timer: asyncio.TimerHandle | None = None

    def freed(self) -> None:
        """The daemon is done with a slot."""
        self._free.release()

    async def add(self, chunk: bytes) -> None:
        """Take a chunk; waits while the daemon has all slots."""
        view = memoryview(chunk)
        while view:
            if not self._used:
                await self._free.acquire()
            start = self._slot * LOT + self._used
            count = min(len(view), LOT - self._used)
            self._memory[start : start + count] = view[:count]
            self._used += count
            view = view[count:]
            if self._used == LOT:
                self.hand_over()
            elif self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_WAIT_S, self.hand_over)

    def hand_over(self) -> None:
        """Give the daemon what is in the slot, if anything is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._used:
            _tell(self._job, self._used.to_bytes(COUNT, "big"))
            self._slot = (self._slot + 1) % SLOTS
            self._used = 0


async def _fetch(transport: Transport, order: Order, job: socket.socket, lots: Lots) -> None:
    """Answer one order to the end."""
    failure: ImgsvcError | None = None
    try:
        async with contextlib.aclosing(await transport.handle_async_request(order.request())) as response:
            head = pack_head(Head(response.status_code, header_pairs(response), reach_behind(response)))
            if len(head) > MAX_MESSAGE:
                raise Internal(f"the answer's headers have {len(head)} bytes, more than {MAX_MESSAGE}", where=shown_url(order.url))
            _tell(job, head)
            async for chunk in response.aiter_raw():
                await lots.add(chunk)
    except ImgsvcError as error:
        failure = error
    except Exception:  # noqa: BLE001  # the edge of the process
        traceback.print_exc()
        failure = Internal("internal error in the download process; see the log")
    lots.hand_over()
    _tell(job, pack_end(failure))


def _tell(job: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):  # the daemon has left; the reader of its messages notices
        job.send(message)


async def _serve_one(transport: Transport, order: Order, job: socket.socket, memory_fd: int) -> None:
    """One order, until it is answered and the daemon has closed its end, or it has closed that before."""
    job.setblocking(False)
    with job, contextlib.closing(mmap.mmap(memory_fd, MEMORY)) as memory:
        os.close(memory_fd)
        lots = Lots(job, memory)
        fetching = asyncio.ensure_future(_fetch(transport, order, job, lots))
        try:
            with contextlib.suppress(OSError):
                while await asyncio.get_running_loop().sock_recv(job, 1):
                    lots.freed()
        finally:
            await stop_tasks(fetching)


async def serve(control: socket.socket) -> None:
    """Take orders until the daemon closes its end."""
    control.setblocking(False)
    loop = asyncio.get_running_loop()
    files = HandedFiles()
    transport = Transport(files)
    jobs: set[asyncio.Task[None]] = set()
    gone = loop.create_future()

    def take() -> None:
        message, fds = b"", list[int]()
        with contextlib.suppress(ConnectionError):
            message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 2 + MAX_FILES, socket.MSG_CMSG_CLOEXEC)
        if not message:
            loop.remove_reader(control)
            gone.set_result(None)
            return
        order = unpack_order(message)
        files.take(names_in(order.route.tls), fds[2:])
        job = loop.create_task(_serve_one(transport, order, socket.socket(fileno=fds[0]), fds[1]))
        jobs.add(job)
        job.add_done_callback(jobs.discard)

    loop.add_reader(control, take)
    await gone


async def _main() -> None:
    await serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # at once, also when a thread still resolves a name


def main() -> None:
    """The process, from its start to its end."""
    kernel.stand_back()
    _keep_system_trust()
    for module in _LATE_MODULES:
        importlib.import_module(module)
    confinement.become_stranger()
    confinement.only_below(None, reads=False)
    confinement.allow_only(confinement.Calls.DOWNLOAD)
    kernel.keep_freed_memory()
    asyncio.run(_main())


def _keep_system_trust() -> None:
    """Have OpenSSL find the system's CAs also if they are in a file that only root reads, as $SSL_CERT_FILE may be."""
    trust = ssl.get_default_verify_paths()
    with contextlib.suppress(OSError):
        if trust.cafile and not os.stat(trust.cafile).st_mode & 0o004:
            copy = os.memfd_create("imgsvc-trust")
            os.write(copy, Path(trust.cafile).read_bytes())
            os.environ[trust.openssl_cafile_env] = f"/proc/self/fd/{copy}"


if __name__ == "__main__":
    main()
