"""Lets turns in: within their tenant's budgets, as many as run at once, the others in a short queue or not at all."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from gateway.budgets import Budgets, Charge
from gateway.caller import current_caller
from gateway.content import Medium
from gateway.events import ChatRequest, Encoded, TokenUsage
from gateway.metrics import UNOBSERVED_ADMISSION, AdmissionMetrics
from gateway.queueing import FairQueue, Pace
from gateway.weight import Scales, Weight, encoded_tiles
from shared.errors import InvalidRequest, NotFound, QueueFull, RateLimited
from shared.rpc.deadline import remaining_s

Refusal: TypeAlias = Literal["full", "hopeless", "displaced", "waited"]
_SHORTEST_PAUSE_S: Final = 0.05  # of a turn in the background whose tenant has used up a budget
_CERTAIN: Final = 2.0
_BACKGROUND_EVERY: Final = 10  # places that become free while a turn in the background waits: the last is for it
_WORDS: Final[Mapping[Refusal, str]] = {
    "full": "Too many turns wait already; try again later.",
    "hopeless": "So many turns wait already that this one would not begin in time; try again later.",
    "displaced": "Too many turns wait, and most of them are this tenant's; try again later.",
    "waited": "This turn has waited as long as it may; try again later.",
}


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Turns that run at once in this gateway, turns that wait for that, how long, and with how many bytes of media.

    `background` of those that run may be in the background, and never more than half.
    """

    running: int = 256
    waiting: int = 1024
    wait_s: float = 30.0
    waiting_bytes: int = 256 << 20
    background: int = 8


class Place:
    """A turn's place among those that run."""

    def __init__(self, charge: Charge, scales: Scales, waited_s: float) -> None:
        self.waited_s = waited_s
        self._charge = charge
        self._scales = scales

    def settle(self, usage: TokenUsage, encoded: Mapping[Medium, Encoded]) -> None:
        """Say what the turn has used. Of one that never says, the guess stays charged."""
        self._charge.settle(tokens=usage.prompt_tokens + usage.output_tokens, tiles=encoded_tiles(encoded))
        self._scales.note(encoded)


@dataclass(eq=False, slots=True)
class _Waiting:
    """A turn that waits until a time of the event loop; `turn` is done when it may run or is refused."""

    turn: asyncio.Future[None]
    media_bytes: int
    until: float

    def refuse(self, error: QueueFull) -> None:
        """Send the turn away, unless it leaves by itself."""
        if not self.turn.done():
            self.turn.set_exception(error)


class Admission:
    """Lets turns in, fairly between tenants. One event loop only.

    Whoever waits does so before any work is done for it. Nobody is left to wait in vain: a turn is refused at once
    where the queue has no room, or moves too slowly for the turn's deadline. A full queue sends its last away where the
    newcomer's tenant has asked for less. Turns in the background wait instead of being refused, and hold half of the
    places at most. They go after all others, but for a small share that is theirs however many others wait.
    """

    def __init__(
        self,
        limits: AdmissionLimits | None = None,
        budgets: Budgets | None = None,
        metrics: AdmissionMetrics | None = None,
        pace: Pace | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._limits = limits or AdmissionLimits()
        self._budgets = budgets or Budgets()
        self._metrics = metrics or UNOBSERVED_ADMISSION
        self._pace = pace or Pace(self._limits.running)
        self._sleep = sleep
        self._scales = Scales()
        self._queue, self._background = FairQueue[_Waiting](), FairQueue[_Waiting]()
        self._most_background = max(1, min(self._limits.background, self._limits.running // 2))
        self._num_running = self._num_background = self._waiting_bytes = 0
        self._num_passed = 0  # interactive turns let in, one after the other, past a turn in the background

    @asynccontextmanager
    async def turn(self, request: ChatRequest) -> AsyncIterator[Place]:
        """Hold a place for a turn of the current caller while the context lasts.

        Raises `RateLimited` and `QueueFull`, and neither for a turn in the background.
        """
        loop = asyncio.get_running_loop()
        weight, in_background = self._scales.guess(request), request.in_background
        charge = await self._charged(weight, in_background=in_background)
        arrived, is_in = loop.time(), False
        try:
            await self._enter(request, weight)
            is_in, waited_s = True, loop.time() - arrived
            self._metrics.wait.observe(waited_s, kind=_kind(in_background))
            with self._pace.turn():
                yield Place(charge, self._scales, waited_s)
        except (InvalidRequest, NotFound):
            charge.settle(tokens=0)  # refused before a word; of its media, some may have been encoded
            raise
        finally:
            charge.end()
            if is_in:
                self._leave(in_background=in_background)
            else:
                charge.undo()

    @contextmanager
    def media(self, medium: Medium) -> Iterator[Callable[[Encoded], None]]:
        """Charge the current caller for a medium that is encoded without a question; raise `RateLimited`.

        Yields what is to be told what came of it; until then the guess stays charged.
        """
        try:
            charge = self._budgets.media(current_caller().tenant, self._scales.guess_media([medium]).tiles)
        except RateLimited as error:
            raise self._limited(error) from None

        def settle(encoded: Encoded) -> None:
            charge.settle(tiles=encoded_tiles({medium: encoded}))
            self._scales.note({medium: encoded})

        try:
            yield settle
        except NotFound:
            charge.undo()  # there were no bytes to encode
            raise

    async def _charged(self, weight: Weight, *, in_background: bool) -> Charge:
        while True:
            try:
                return self._budgets.turn(current_caller().tenant, weight, self._pace.turn_s)
            except RateLimited as error:
                if not in_background:
                    raise self._limited(error) from None
                await self._sleep(max(_SHORTEST_PAUSE_S, error.retry_after_s or 0.0))

    def _limited(self, error: RateLimited) -> RateLimited:
        self._metrics.refused.inc(reason=error.quota or "")
        return error

    async def _enter(self, request: ChatRequest, weight: Weight) -> None:
        """Wait for a place and hold it."""
        in_background = request.in_background
        if self._has_place(in_background=in_background):
            self._hold(in_background=in_background)
            return
        tenant, media_bytes = current_caller().tenant, _media_bytes(request)
        loop, left_s = asyncio.get_running_loop(), remaining_s()
        patience_s = self._limits.wait_s if left_s is None else min(self._limits.wait_s, left_s)
        if not in_background:
            self._make_room(tenant, media_bytes, patience_s)
        waiting = _Waiting(loop.create_future(), media_bytes, loop.time() + patience_s)
        await self._wait(waiting, tenant, weight, in_background)

    def _has_place(self, *, in_background: bool) -> bool:
        # A place that is free while somebody waits is the background's, and not for more of it.
        has_room = self._num_running < self._limits.running
        return has_room and (not in_background or self._num_background < self._most_background)

    def _make_room(self, tenant: str, media_bytes: int, patience_s: float) -> None:
        """Have room in the queue for one more turn; raise `QueueFull` where there is none, or waiting is no use."""
        ahead = self._queue.ahead_of(tenant)
        if self._pace.wait_s(ahead) > patience_s:
            raise self._full("hopeless")
        if self._waiting_bytes and self._waiting_bytes + media_bytes > self._limits.waiting_bytes:
            raise self._full("full")
        if len(self._queue) >= self._limits.waiting:
            if ahead >= len(self._queue):
                raise self._full("full")
            self._queue.drop_last().refuse(self._full("displaced"))

    async def _wait(self, waiting: _Waiting, tenant: str, weight: Weight, in_background: bool) -> None:
        queue = self._background if in_background else self._queue
        ticket = queue.push(tenant, weight.cost, waiting)
        self._waiting_bytes += waiting.media_bytes
        self._metrics.waiting.add(1, kind=_kind(in_background))
        is_in = False
        try:
            async with asyncio.timeout(None if in_background else self._limits.wait_s):
                await waiting.turn
            is_in = True
        except TimeoutError:
            raise self._full("waited") from None
        finally:
            self._waiting_bytes -= waiting.media_bytes
            self._metrics.waiting.add(-1, kind=_kind(in_background))
            if not is_in:
                queue.remove(ticket)
                if _was_let_in(waiting.turn):  # in the moment of leaving
                    self._leave(in_background=in_background)

    def _hold(self, *, in_background: bool) -> None:
        self._num_running += 1
        self._num_background += in_background

    def _leave(self, *, in_background: bool) -> None:
        """Give a place back, to whoever is next."""
        self._num_running -= 1
        self._num_background -= in_background
        while (background_is_next := self._background_is_next()) is not None:
            self._let_in(background_is_next)
        self._shed()

    def _background_is_next(self) -> bool | None:
        """Return whether the next place is for a turn in the background; None: nobody who waits may have one."""
        is_interactive_in = bool(self._queue) and self._has_place(in_background=False)
        is_background_in = bool(self._background) and self._has_place(in_background=True)
        if is_interactive_in and is_background_in:
            return self._num_passed >= _BACKGROUND_EVERY - 1
        return is_background_in if is_interactive_in or is_background_in else None

    def _let_in(self, in_background: bool) -> None:
        """Give a place to the first of a queue, unless it has just left."""
        turn = (self._background if in_background else self._queue).pop().turn
        if not turn.done():
            self._hold(in_background=in_background)
            self._num_passed = 0 if in_background or not self._background else self._num_passed + 1
            turn.set_result(None)

    def _shed(self) -> None:
        """Send turns at the queue's end away who have waited in vain: it turns out to move far too slowly for them.

        Only where that is certain: a guess may be off by half, and who has waited would rather wait for nothing.
        """
        now = asyncio.get_running_loop().time()
        while self._queue and self._pace.wait_s(len(self._queue) - 1) > _CERTAIN * (self._queue.last.until - now):
            self._queue.drop_last().refuse(self._full("hopeless"))

    def _full(self, refusal: Refusal) -> QueueFull:
        self._metrics.refused.inc(reason=refusal)
        return QueueFull(_WORDS[refusal], retry_after_s=self._pace.promise(len(self._queue)))


def _was_let_in(turn: asyncio.Future[None]) -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None


def _kind(in_background: bool) -> str:
    return "background" if in_background else "interactive"


def _media_bytes(request: ChatRequest) -> int:
    media = (medium for message in request.messages for medium in message.media)
    return sum(len(medium.content) for medium in media if medium.content is not None)
