"""Bounded hand-over inside a session: what the network reader puts in, the target takes out at its own pace."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final

from imgsvc.base.concurrency import stop_tasks
from imgsvc.runtime.streaming.interfaces import TerminalSize

WINDOW: Final = 64 * 1024  # [bytes] kept per stream before its sender has to wait; a chunk may go over it


class Inbox:
    """A Source that the network reader fills. While it is full put() waits, and with it the reading of the socket."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._discarding = False
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()

    async def put(self, data: bytes) -> None:
        """Add a chunk; dropped after eof() or discard()."""
        if self._ended or self._discarding or not data:
            return
        self._chunks.append(data)
        self._size += len(data)
        self._filled.set()
        if self._size >= WINDOW:
            self._drained.clear()
            await self._drained.wait()

    def eof(self) -> None:
        """Nothing more follows. Idempotent."""
        self._ended = True
        self._filled.set()

    def discard(self) -> None:
        """The reader has gone: drop what is there and what will come. Idempotent."""
        self._discarding = True
        self._chunks.clear()
        self._size = 0
        self._drained.set()
        self.eof()

    async def read(self) -> bytes:
        """The next chunk; b"" at the end."""
        while not self._chunks:
            if self._ended:
                return b""
            self._filled.clear()
            await self._filled.wait()
        data = self._chunks.popleft()
        self._size -= len(data)
        if self._size < WINDOW:
            self._drained.set()
        return data


class SizeBox:
    """The newest terminal size."""

    def __init__(self) -> None:
        self._size: TerminalSize | None = None
        self._ended = False
        self._changed = asyncio.Event()

    def put(self, size: TerminalSize) -> None:
        """Replace what was not fetched yet."""
        self._size = size
        self._changed.set()

    def eof(self) -> None:
        """No more sizes follow."""
        self._ended = True
        self._changed.set()

    async def next(self) -> TerminalSize | None:
        """As Sizes.next."""
        while self._size is None:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        size, self._size = self._size, None
        return size


async def until_first(*work: Coroutine[Any, Any, None]) -> None:
    """Run side by side until one is done, then stop the others and wait for them. Raises: what the first one raised."""
    tasks = [asyncio.create_task(w) for w in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        await stop_tasks(*tasks)
