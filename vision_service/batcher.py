"""Gathers what waits for the vision tower into batches, for one replica of it or several, and keeps faults apart."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import structlog
import torch

from shared.errors import DeadlineExceeded, QueueFull
from vision_service.metrics import UNOBSERVED, VisionMetrics
from vision_service.preprocess.image import Tiles
from vision_service.runner import TowerIdentity

log = structlog.get_logger()


class Runner(Protocol):
    """Runs one replica of the vision tower, one batch at a time."""

    @property
    def identity(self) -> TowerIdentity:
        """What the tower's embeddings are named after."""

    async def encode(self, pictures: Sequence[Tiles]) -> list[torch.Tensor]:
        """Return the visual tokens [tokens, hidden] of every picture or piece of one; may raise anything."""


class Deadline:
    """When the last caller that waits for a medium gives up. Callers that join later move it back.

    `urgent`: whether any of them needs it now; what nobody does is encoded when nothing else is to be.
    """

    def __init__(
        self, remaining_s: float | None, clock: Callable[[], float] = time.monotonic, *, urgent: bool = True
    ) -> None:
        self._clock = clock
        self._expires_at = -math.inf
        self.urgent = False
        self.extend(remaining_s, urgent=urgent)

    def extend(self, remaining_s: float | None, *, urgent: bool = True) -> None:
        """Count in one more caller; None is one without a deadline."""
        self.urgent = self.urgent or urgent
        expires_at = math.inf if remaining_s is None else self._clock() + remaining_s
        self._expires_at = max(self._expires_at, expires_at)

    @property
    def passed(self) -> bool:
        """Whether nobody waits any more."""
        return self._clock() >= self._expires_at

    @property
    def remaining_s(self) -> float | None:
        """Seconds until then; None where somebody waits without an end."""
        return None if self._expires_at == math.inf else self._expires_at - self._clock()


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTiles:
    """Visual tokens of one medium, its time in the queue, and that from its first pass to its last.

    `pieces` [tokens, hidden] are in order. Joining those of a video copies hundreds of MiB: not on the event loop.
    """

    pieces: Sequence[torch.Tensor]
    queue_s: float
    encode_s: float


@dataclass(slots=True, eq=False)
class _Medium:
    """A picture or video on its way through the tower, in one piece or several."""

    deadline: Deadline
    queued_at: float
    num_pieces: int
    started_at: float = math.inf
    done: dict[int, torch.Tensor] = field(default_factory=dict)
    encoded: asyncio.Future[EncodedTiles] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def add(self, piece: int, visual_tokens: torch.Tensor, started_at: float, ended_at: float) -> None:
        self.done[piece] = visual_tokens
        self.started_at = min(self.started_at, started_at)
        if len(self.done) == self.num_pieces and not self.encoded.done():
            pieces = [self.done[index] for index in range(self.num_pieces)]
            times = self.started_at - self.queued_at, ended_at - self.started_at
            self.encoded.set_result(EncodedTiles(pieces, *times))

    def fail(self, error: BaseException) -> None:
        if not self.encoded.done():
            self.encoded.set_exception(error)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    medium: _Medium
    index: int
    tiles: Tiles
    rest: Tiles  # the medium's tiles that come after


class Batcher:
    """A queue in front of the replicas of the vision tower. One event loop only; `run` has to be running.

    A batch is whatever waits when a replica becomes free, in order of arrival, up to `max_batch_tiles`: nothing waits
    for company. A medium with more tiles goes in pieces, each at the end of the queue after the one before it:
    a long video holds up nobody, and has as many replicas at work for it as are free. What nobody needs now comes last,
    in batches of its own.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        max_batch_tiles: int,
        max_queued_tiles: int,
        clock: Callable[[], float] = time.monotonic,
        metrics: VisionMetrics = UNOBSERVED,
    ) -> None:
        self._runners = runners
        self._max_batch_tiles = max_batch_tiles
        self._max_queued_tiles = max_queued_tiles
        self._clock = clock
        self._metrics = metrics
        self._queue: deque[_Piece] = deque()
        self._arrived = asyncio.Event()
        self._tile_s = 0.0
        self.queued_tiles = 0

    @property
    def identity(self) -> TowerIdentity:
        """What the tower's embeddings are named after."""
        return self._runners[0].identity

    async def encode(self, tiles: Tiles, deadline: Deadline) -> EncodedTiles:
        """Return the visual tokens of one picture or video.

        Raises `QueueFull` at once, `DeadlineExceeded` when the deadline passes before the medium's turn, and whatever
        the tower raised for this medium alone.
        """
        if self._queue and self.queued_tiles + len(tiles) > self._max_queued_tiles:
            wait_s = max(0.1, self.queued_tiles * self._tile_s / len(self._runners))
            raise QueueFull("Too many pictures wait for the vision tower; try again later.", retry_after_s=wait_s)
        medium = _Medium(deadline, self._clock(), -(-len(tiles) // self._max_batch_tiles))
        self.queued_tiles += len(tiles)
        self._enqueue(medium, 0, tiles)
        return await medium.encoded

    async def run(self) -> NoReturn:
        """Encode what arrives, on every replica, until cancelled."""
        await asyncio.gather(*(self._run(runner) for runner in self._runners))
        raise AssertionError("runs until cancelled")

    async def _run(self, runner: Runner) -> NoReturn:
        while True:
            while batch := self._next_batch():
                await self._encode_batch(runner, batch)
            self._arrived.clear()
            await self._arrived.wait()

    def _enqueue(self, medium: _Medium, index: int, tiles: Tiles) -> None:
        piece, rest = tiles[: self._max_batch_tiles], tiles[self._max_batch_tiles :]
        self._queue.append(_Piece(medium, index, piece, rest))
        self._arrived.set()

    def _next_batch(self) -> list[_Piece]:
        batch: list[_Piece] = []
        num_tiles = 0
        while (piece := self._first()) and (not batch or _goes_with(piece, batch, self._max_batch_tiles - num_tiles)):
            self._queue.remove(piece)
            self.queued_tiles -= len(piece.tiles)
            if not _still_wanted(piece.medium):
                self.queued_tiles -= len(piece.rest)
                continue
            batch.append(piece)
            num_tiles += len(piece.tiles)
            if len(piece.rest):
                self._enqueue(piece.medium, piece.index + 1, piece.rest)
        return batch

    def _first(self) -> _Piece | None:
        """Return the piece whose turn it is: the first that somebody waits for, else the first of all."""
        return next((piece for piece in self._queue if piece.medium.deadline.urgent), next(iter(self._queue), None))

    async def _encode_batch(self, runner: Runner, batch: list[_Piece]) -> None:
        # Gathered, so that an error of any kind is a value: it belongs to the pictures, not to this loop.
        (error,) = await asyncio.gather(self._attempt(runner, batch), return_exceptions=True)
        if error is None:
            return
        if len(batch) == 1:
            batch[0].medium.fail(error)
            return
        log.warning("batch_failed", pictures=len(batch), error=type(error).__name__)
        for piece in batch:
            await self._encode_batch(runner, [piece])

    async def _attempt(self, runner: Runner, batch: list[_Piece]) -> None:
        started = self._clock()
        encoded = await runner.encode([piece.tiles for piece in batch])
        ended = self._clock()
        num_tiles = sum(len(piece.tiles) for piece in batch)
        self._tile_s = (ended - started) / num_tiles
        self._metrics.batch_tiles.observe(num_tiles)
        for piece, visual_tokens in zip(batch, encoded, strict=True):
            piece.medium.add(piece.index, visual_tokens, started, ended)


def _goes_with(piece: _Piece, batch: Sequence[_Piece], room: int) -> bool:
    """Return whether a piece fits into a batch; what nobody needs now must not make others wait."""
    return len(piece.tiles) <= room and piece.medium.deadline.urgent == batch[0].medium.deadline.urgent


def _still_wanted(medium: _Medium) -> bool:
    if medium.deadline.passed:
        medium.fail(DeadlineExceeded("The deadline passed while the picture waited for the vision tower."))
    return not medium.encoded.done()
