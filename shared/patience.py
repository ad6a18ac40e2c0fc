"""How much longer one request may wait for a store that it can do without."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")
_GLANCES: Final = 5
_abandoned: set[asyncio.Future[Any]] = set()  # cancelled, not yet over; a task that nobody names may vanish before


class Patience:
    """What all commands of one request may wait for the store, one after another. Nothing else is counted."""

    def __init__(self, limit_s: float = 0.25, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self.left_s = limit_s

    async def bound(self, command: Callable[[], Awaitable[T]]) -> T:
        """Return what the command returns; raise `TimeoutError` when the patience is at its end, and what it raises.

        The command is a task of its own, because redis-py can lose a cancellation: one that comes just when its own
        time limit does, or just when it has written (before Python 3.12). The caller's own cancellation is never lost.
        """
        if self.left_s <= 0:
            raise TimeoutError
        task = asyncio.ensure_future(command())
        try:
            await self._wait_for(task)
        finally:
            if not task.done():
                _abandon(task)
        if not task.done() or task.cancelled():
            raise TimeoutError
        return task.result()

    async def _wait_for(self, task: asyncio.Future[Any]) -> None:
        """Wait glance by glance, each of which counts for no more than it was meant to take.

        A process that is kept from running looks late, and finds answers that were there in time. It must not take its
        own delay for the store's: that would send every request past the caches just when there is least to spare.
        """
        while not task.done() and self.left_s > 0:
            glance_s, began = min(self.left_s, self._limit_s / _GLANCES), self._clock()
            await asyncio.wait({task}, timeout=glance_s)
            self.left_s = max(0.0, self.left_s - min(self._clock() - began, glance_s))


def _abandon(task: asyncio.Future[Any]) -> None:
    task.cancel()
    _abandoned.add(task)
    task.add_done_callback(_bury)


def _bury(task: asyncio.Future[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # looked at, so that nothing warns of it
