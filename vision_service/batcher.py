"""Gathers the pictures that wait for the vision tower into batches, and keeps them from harming one another."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol

import structlog

from shared.errors import DeadlineExceeded, QueueFull
from vision_service.preprocess.image import Tiles
from vision_service.runner import TowerIdentity

if TYPE_CHECKING:
    import torch

log = structlog.get_logger()


class Runner(Protocol):
    """Runs the vision tower, one batch at a time."""

    @property
    def identity(self) -> TowerIdentity:
        """What the tower's embeddings are named after."""

    async def encode(self, pictures: Sequence[Tiles]) -> "list[torch.Tensor]":
        """Return the visual tokens [tokens, hidden] of every picture; may raise anything."""


class Deadline:
    """When the last caller that waits for a picture gives up. Callers that join later move it back."""

    def __init__(self, remaining_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._expires_at = -math.inf
        self.extend(remaining_s)

    def extend(self, remaining_s: float | None) -> None:
        """Count in one more caller; None is one without a deadline."""
        expires_at = math.inf if remaining_s is None else self._clock() + remaining_s
        self._expires_at = max(self._expires_at, expires_at)

    @property
    def passed(self) -> bool:
        """Whether nobody waits any more."""
        return self._clock() >= self._expires_at


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTiles:
    """Visual tokens [tokens, hidden] of one picture, and how long it waited and was worked on."""

    visual_tokens: "torch.Tensor"
    queue_s: float
    encode_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    tiles: Tiles
    deadline: Deadline
    queued_at: float
    encoded: asyncio.Future[EncodedTiles] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """A queue in front of the vision tower. One event loop only; `run` has to be running.

    A batch is whatever waits when the tower becomes free, in order of arrival, up to `max_batch_tiles`: nothing waits
    for company. A picture with more tiles than that goes alone.
    """

    def __init__(
        self,
        runner: Runner,
        max_batch_tiles: int,
        max_queued_tiles: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._max_batch_tiles = max_batch_tiles
        self._max_queued_tiles = max_queued_tiles
        self._clock = clock
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._tile_s = 0.0
        self.queued_tiles = 0

    @property
    def identity(self) -> TowerIdentity:
        """What the tower's embeddings are named after."""
        return self._runner.identity

    async def encode(self, tiles: Tiles, deadline: Deadline) -> EncodedTiles:
        """Return the visual tokens of one picture.

        Raises `QueueFull` at once, `DeadlineExceeded` when the deadline passes before the picture's turn, and whatever
        the tower raised for this picture alone.
        """
        if self._queue and self.queued_tiles + len(tiles) > self._max_queued_tiles:
            wait_s = max(0.1, self.queued_tiles * self._tile_s)
            raise QueueFull("Too many pictures wait for the vision tower; try again later.", retry_after_s=wait_s)
        waiting = _Waiting(tiles, deadline, self._clock())
        self._queue.append(waiting)
        self.queued_tiles += len(tiles)
        self._arrived.set()
        return await waiting.encoded

    async def run(self) -> NoReturn:
        """Encode what arrives until cancelled."""
        while True:
            await self._arrived.wait()
            while batch := self._next_batch():
                await self._encode_batch(batch)
            self._arrived.clear()

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        num_tiles = 0
        while self._queue and (not batch or num_tiles + len(self._queue[0].tiles) <= self._max_batch_tiles):
            waiting = self._queue.popleft()
            self.queued_tiles -= len(waiting.tiles)
            if _still_wanted(waiting):
                batch.append(waiting)
                num_tiles += len(waiting.tiles)
        return batch

    async def _encode_batch(self, batch: list[_Waiting]) -> None:
        # Gathered, so that an error of any kind is a value: it belongs to the pictures, not to this loop.
        (error,) = await asyncio.gather(self._attempt(batch), return_exceptions=True)
        if error is None:
            return
        if len(batch) == 1:
            _fail(batch[0], error)
            return
        log.warning("batch_failed", pictures=len(batch), error=type(error).__name__)
        for waiting in batch:
            await self._encode_batch([waiting])

    async def _attempt(self, batch: list[_Waiting]) -> None:
        started = self._clock()
        encoded = await self._runner.encode([waiting.tiles for waiting in batch])
        encode_s = self._clock() - started
        self._tile_s = encode_s / sum(len(waiting.tiles) for waiting in batch)
        for waiting, visual_tokens in zip(batch, encoded, strict=True):
            if not waiting.encoded.done():
                waiting.encoded.set_result(EncodedTiles(visual_tokens, started - waiting.queued_at, encode_s))


def _still_wanted(waiting: _Waiting) -> bool:
    if waiting.deadline.passed:
        _fail(waiting, DeadlineExceeded("The deadline passed while the picture waited for the vision tower."))
    return not waiting.encoded.done()


def _fail(waiting: _Waiting, error: BaseException) -> None:
    if not waiting.encoded.done():
        waiting.encoded.set_exception(error)
