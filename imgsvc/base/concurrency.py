"""Small asyncio tools: one lock per key, one flight per key, places for a few, the hop to a thread, a cancel token for work in threads, undoing.

A cancelled await does not stop its thread: long work in a thread checks a CancelToken per chunk.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar, cast

from imgsvc.base.errors import Cancelled, ImgsvcError

T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")

log = logging.getLogger(__name__)

_SHARED_THREADS: Final = 32  # most of which wait, for mounts and small files: far more than there are processors


class CancelToken:
    """Set on one thread, checked on another."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop. Idempotent."""
        self._event.set()

    def check(self) -> None:
        """Raises: Cancelled once cancel() was called."""
        if self._event.is_set():
            raise Cancelled("cancelled")


class _TimeLimit:
    """asyncio.timeout as Python 3.11.4 has it. Before, one that ran out in a task that is being cancelled, and cleans up, went
    on as that cancellation: what was to come after it was left out.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        if self._seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expired(self) -> bool:
        """Whether the time has run out."""
        return self._expired

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()


def time_limit(seconds: float | None) -> asyncio.Timeout | _TimeLimit:
    """For an `async with` block that raises TimeoutError after so long; None: never. Use it instead of asyncio.timeout."""
    return asyncio.timeout(seconds) if sys.version_info >= (3, 11, 4) else _TimeLimit(seconds)  # noqa: TID251  # here it is told apart


class KeyedLock:
    """Mutual exclusion per key; keys that are neither held nor awaited cost nothing."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the key's lock for an `async with` block."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)

    def busy(self, key: str) -> bool:
        """Whether the key is held or awaited."""
        return key in self._locks


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    users: int = 0


class SingleFlight(Generic[T]):
    """Callers with one key share one run. A caller that leaves does not disturb the rest; the last to leave cancels it."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    async def run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """Join the flight for `key`, starting it with `work` when there is none. Runs for one key never overlap."""
        while (flight := self._flights.get(key)) and not flight.users and not flight.task.done():
            # All callers left. The task is releasing what it holds (a lock, an ingest), which the next one needs.
            await asyncio.wait([flight.task])
        if flight is None or flight.task.done():
            flight = self._flights[key] = _Flight(asyncio.ensure_future(_call(work)))
        flight.users += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.users -= 1
            if not flight.users:
                await self._last_left(key, flight)

    async def _last_left(self, key: str, flight: _Flight[T]) -> None:
        if flight.task.done():
            self._forget(key, flight)
            await ended(flight.task)  # at once; it may have failed in the moment its last caller was cancelled
        else:
            flight.task.add_done_callback(lambda _: self._forget(key, flight))
            flight.task.cancel()
            # The work gives back what it holds before the last caller's call ends.
            await ended(flight.task)

    def _forget(self, key: str, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class Slots:
    """A number of places. The waiter with the lowest order comes next; among equals, the first to arrive."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._serial = itertools.count()

    async def acquire(self, order: float) -> None:
        """Take a place, for `release`."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._serial), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # its turn came in the moment it was cancelled
            raise

    @property
    def is_wanted(self) -> bool:
        """Whether a caller waits for a place."""
        return any(not turn.done() for _, _, turn in self._waiting)

    def release(self) -> None:
        """Give a place back."""
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Threads:
    """A bounded pool for blocking calls; the one way from the event loop to a thread."""

    def __init__(self, size: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call` on a thread. When the caller is cancelled the call still ends before this returns, so that
        nothing the caller gives back afterwards (a descriptor, a lock) is still in use.
        """
        future = asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(call, *args, **kwargs))  # the one hop
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await ended(future)
            raise

    async def run_cancellable(self, cancel: CancelToken, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As run, for long work that checks `cancel`: a caller that is cancelled asks the work to stop before it waits for it."""
        work = asyncio.ensure_future(self.run(call, *args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancel.cancel()
            await ended(work)
            raise

    @asynccontextmanager
    async def holding(self, take: Callable[[], T], give_back: Callable[[T], object]) -> AsyncIterator[T]:
        """What `take` opens on a thread, for an `async with` block; given back on a thread in every case, also when the
        caller is cancelled while it is being opened. A plain `run` would lose it then.
        """
        opening = asyncio.ensure_future(self.run(take))
        try:
            held = await asyncio.shield(opening)
        except asyncio.CancelledError:
            await ended(opening)
            if not opening.cancelled() and opening.exception() is None:
                await to_the_end(self.run(give_back, opening.result()))
            raise
        try:
            yield held
        finally:
            await to_the_end(self.run(give_back, held))

    def close(self, *, wait: bool = True) -> None:
        """Stop. wait: for calls that are running."""
        self._pool.shutdown(wait=wait, cancel_futures=True)


_shared = Threads(_SHARED_THREADS, "shared")  # makes its threads as they are needed


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Threads.run on a pool of the whole process: for short calls that must not queue behind long ones, such as mounting or reading a file.

    What may take long (gigabytes, a program that hangs) has a pool of its own. A call never waits for another one of this pool.
    """
    return await _shared.run(call, *args, **kwargs)


class Undo:
    """What takes back the steps that succeeded, for an `async with` block: when the block fails or is cancelled, in reverse order.
    When it ends well, what was done stays.

    Each step runs to its end, however often the caller is cancelled meanwhile. A step that fails does not stop the others and does
    not replace the error that the block ended with: it is logged, and noted on that error.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], Coroutine[Any, Any, object]]]] = []
        self.failed = False  # whether a step that ran has failed: what it was to undo may still be there

    def push(self, what: str, step: Callable[P, Coroutine[Any, Any, object]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Owe a step from now on. what: for the log, e.g. "detaching pod 1234 from its network"."""
        self._steps.append((what, functools.partial(step, *args, **kwargs)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            await to_the_end(self._run(error))

    async def _run(self, cause: BaseException) -> None:
        for what, step in reversed(self._steps):
            try:
                await step()
            except Exception as error:  # whatever it is, the others are run, and the first error stays
                log.error("%s failed, after a failure: %s", what, error, exc_info=not isinstance(error, ImgsvcError))
                cause.add_note(f"{what} failed, too: {error}")
                self.failed = True


class Shared(Generic[T]):
    """Objects that exist while they are in use, one per key."""

    def __init__(self, make: Callable[[], T], drop: Callable[[T], None] = lambda _: None) -> None:
        self._make = make
        self._drop = drop
        self._used: dict[str, tuple[T, int]] = {}

    @contextmanager
    def use(self, key: str) -> Iterator[T]:
        """The key's object for a `with` block; the last user's end drops it."""
        value, users = self._used[key] if key in self._used else (self._make(), 0)
        self._used[key] = (value, users + 1)
        try:
            yield value
        finally:
            value, users = self._used[key]
            if users == 1:
                del self._used[key]
                self._drop(value)
            else:
                self._used[key] = (value, users - 1)


class Coalesced:
    """One costly call that serves every caller who asked before it began (a sync of a whole file system)."""

    def __init__(self, call: Callable[[], Awaitable[None]]) -> None:
        self._call = call
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Wait for a call that begins after now."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._run_after(self._running))
        await asyncio.shield(self._next)

    async def _run_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._next = self._next, None
        await self._call()


async def all_of(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Run all; the first failure cancels the rest, waits for them, and is raised as it is. Results in order."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await ended(asyncio.gather(*tasks, return_exceptions=True))  # also when cancelled again: nothing is left running
        raise


async def both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """As all_of, for two results of different types."""
    left, right = await all_of(cast("Coroutine[Any, Any, Any]", first), cast("Coroutine[Any, Any, Any]", second))
    return left, right


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run cleaning up to its end, however often the caller is cancelled meanwhile; the cancellation is raised then."""
    task = asyncio.ensure_future(work)
    await ended(task)
    return task.result()


async def ended(future: asyncio.Future[Any]) -> None:
    """Wait for something, however often the caller is cancelled meanwhile; the cancellation is raised then.

    Marks the outcome as retrieved; otherwise asyncio logs a failure that has no reader left as "never retrieved".
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if not future.cancelled():
        future.exception()
    if cancelled is not None:
        raise cancelled


async def stop_tasks(*tasks: asyncio.Future[Any]) -> list[Exception]:
    """Cancel tasks and wait until all have ended, however often the caller is cancelled meanwhile.

    Returns what those failed with that did not end by being cancelled.
    """
    for task in tasks:
        task.cancel()
    results = asyncio.gather(*tasks, return_exceptions=True)
    await ended(results)
    return [result for result in results.result() if isinstance(result, Exception)]


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


TRICKLE: Final = 64 * 1024  # [bytes/s] below which a transfer should not hold what others wait for
TRICKLE_WINDOW_S: Final = 5.0


async def trickles(received: Callable[[], int], is_wanted: Callable[[], bool]) -> None:
    """Return when a transfer has been slower than TRICKLE for TRICKLE_WINDOW_S and others want its place.

    received: bytes so far.
    """
    before = received()
    while True:
        await asyncio.sleep(TRICKLE_WINDOW_S)
        now = received()
        is_slow = now - before < TRICKLE * TRICKLE_WINDOW_S
        before = now
        if is_slow and is_wanted():
            return
