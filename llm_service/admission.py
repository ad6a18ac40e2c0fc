"""How much the service takes on at a time: answers, and bytes of embeddings held for them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from shared.errors import QueueFull


class Admission:
    """Counts answers in and out. One event loop only.

    An answer too many is refused at once. Bytes are waited for, first come, first served; an answer that needs more
    than the whole budget gets it when it is alone.
    """

    def __init__(self, max_answers: int, max_bytes: int) -> None:
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._num_answers = 0
        self._held_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextmanager
    def answer(self, count: int = 1) -> Iterator[None]:
        """Count `count` answers while the context lasts; raise `QueueFull` when there are too many.

        Answers that come together and are more than the whole budget are admitted when they are alone.
        """
        if self._num_answers and self._num_answers + count > self._max_answers:
            raise QueueFull("Too many requests are waiting for the language model.", retry_after_s=1.0)
        self._num_answers += count
        try:
            yield
        finally:
            self._num_answers -= count

    @asynccontextmanager
    async def embeddings(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold so many bytes of embeddings while the context lasts; wait until there is room for them."""
        size_bytes = min(size_bytes, self._max_bytes)
        if size_bytes:
            await self._acquire(size_bytes)
        try:
            yield
        finally:
            self._held_bytes -= size_bytes
            self._wake()

    async def _acquire(self, size_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came in the moment of leaving
                self._held_bytes -= size_bytes
            self._waiting = deque(entry for entry in self._waiting if entry[1] is not turn)
            self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self._held_bytes + self._waiting[0][0] <= self._max_bytes:
            size_bytes, turn = self._waiting.popleft()
            if not turn.done():
                self._held_bytes += size_bytes
                turn.set_result(None)
