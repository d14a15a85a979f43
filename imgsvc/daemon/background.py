"""Tasks that run beside the services until the daemon stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from imgsvc.base.concurrency import stop_tasks

log = logging.getLogger(__name__)


def background(stack: AsyncExitStack, work: Coroutine[Any, Any, object]) -> None:
    """Run until the stack is closed. What it fails with is logged then: it is no reason to stop serving."""
    stack.push_async_callback(_end, asyncio.ensure_future(work))


async def _end(task: asyncio.Future[object]) -> None:
    for error in await stop_tasks(task):
        log.warning("a background task failed: %s", error)
