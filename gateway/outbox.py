"""Between an answer and its reader: lets the answer flow on while the reader lags, in bounded memory."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import chain
from typing import Final

from gateway.events import Delta, GenerateEvent
from shared.tasks import cancelled

LAG_S: Final = 0.25
MAX_BYTES: Final = 256 << 10
_LOGPROB_BYTES: Final = 48  # about what a token with its probability takes


async def outbox(
    events: AsyncGenerator[GenerateEvent, None], lag_s: float = LAG_S, max_bytes: int = MAX_BYTES
) -> AsyncGenerator[GenerateEvent, None]:
    """Stream `events` and close them at the end. What waits for a slow reader is merged, and hardly above `max_bytes`.

    A reader that keeps up costs nothing: it takes the events itself, without a task between. Only while it has been
    away for `lag_s` does a task take them for it, so `events` may be resumed by several tasks, one after the other.
    Merging keeps the order of every candidate's text, token ids and log-probabilities.
    """
    async with aclosing(events):
        lag = _Lag(events, lag_s, max_bytes)
        now = asyncio.get_running_loop().time
        try:
            while True:
                async for event in events:
                    lag.reader_left_at = now()
                    yield event
                    lag.reader_left_at = None
                    if lag.taking:
                        break
                else:
                    return
                while taken := await lag.next():
                    yield taken
        finally:
            await lag.close()


class _Lag:
    """Watches how long the reader stays away, and has a task take events for one that stays too long.

    `reader_left_at` is since when the reader deals with an event; None: it waits for the next. `taking` is the task.
    """

    def __init__(self, events: AsyncGenerator[GenerateEvent, None], lag_s: float, max_bytes: int) -> None:
        self.reader_left_at: float | None = None
        self.taking: asyncio.Task[None] | None = None
        self._events = events
        self._lag_s = lag_s
        self._max_bytes = max_bytes
        self._merged = MergedEvents()
        self._reader_waits = False
        self._room = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # One timer a stream, not one an event. What it starts runs in the context of the stream.
        self._timer = self._loop.call_later(lag_s, self._check)

    async def next(self) -> GenerateEvent | None:
        """Return the next event of those that were taken for the reader; None: no more are. Raises their error."""
        assert self.taking is not None
        if not self._merged:
            self._reader_waits = True
            self._room.set()
            await asyncio.wait([self.taking])
            self._reader_waits = False
        if self._merged:
            self._room.set()
            return self._merged.take()
        taking, self.taking = self.taking, None
        taking.result()
        return None

    async def close(self) -> None:
        """Stop watching and taking."""
        self._timer.cancel()
        if self.taking:
            await cancelled(self.taking)

    def _check(self) -> None:
        left_at = self.reader_left_at
        if self.taking is None and left_at is not None and self._loop.time() - left_at >= self._lag_s:
            self.taking = self._loop.create_task(self._take())
        self._timer = self._loop.call_later(self._lag_s, self._check)

    async def _take(self) -> None:
        """Take events until there are no more, or the reader waits for one."""
        async for event in self._events:
            self._merged.put(event)
            while self._merged.size_bytes >= self._max_bytes and not self._reader_waits:
                self._room.clear()
                await self._room.wait()
            if self._reader_waits:
                return


class MergedEvents:
    """Events in order. Deltas of a candidate become one where only other candidates' deltas lie between them."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._waiting: deque[GenerateEvent | list[Delta]] = deque()
        self._open: dict[int, list[Delta]] = {}  # what the next delta of a candidate belongs to

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, event: GenerateEvent) -> None:
        """Add an event at the end."""
        if not isinstance(event, Delta):
            self._open.clear()
            self._waiting.append(event)
            return
        self.size_bytes += _size_of(event)
        run = self._open.get(event.candidate_index)
        if run is None:
            run = self._open[event.candidate_index] = []
            self._waiting.append(run)
        run.append(event)

    def take(self) -> GenerateEvent:
        """Remove the first event and return it."""
        first = self._waiting.popleft()
        if not isinstance(first, list):
            return first
        index = first[0].candidate_index
        if self._open.get(index) is first:
            del self._open[index]
        self.size_bytes -= sum(map(_size_of, first))
        return _merged(first)


def _merged(deltas: Sequence[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[0],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
    )


def _size_of(delta: Delta) -> int:
    """Return about how many bytes a delta takes on the wire."""
    logprobs = sum(1 + len(logprob.top) for logprob in delta.logprobs)
    return len(delta.text) + 4 * len(delta.token_ids) + _LOGPROB_BYTES * logprobs
