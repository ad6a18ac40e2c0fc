"""Pictures that wait for the vision tower go together where they fit, and fail alone."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.checkpoint import Checkpoint, read_config
from shared.errors import DeadlineExceeded, QueueFull
from vision_service.batcher import Batcher, Deadline, EncodedTiles
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig
from vision_service.preprocess.image import Tiles
from vision_service.runner import ModelRunner, TowerIdentity

TINY = Path(__file__).parents[1] / "golden/checkpoints/internvl2-1b-tiny"
NEVER = Deadline(None)
BAD = 66


def tiles_of(count: int, value: int = 1) -> Tiles:
    return np.full((count, 2, 2, 3), value, np.uint8)


class ScriptedRunner:
    """Answers every tile with one row of its value; a batch with a tile of the value `BAD` fails as a whole."""

    identity = TowerIdentity("f" * 64, "float32")

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def encode(self, pictures: Sequence[Tiles]) -> list[torch.Tensor]:
        self.batches.append([len(picture) for picture in pictures])
        await self.open.wait()
        if any((picture == BAD).any() for picture in pictures):
            raise RuntimeError("the tower does not like this")
        return [torch.full((len(picture), 1), float(picture[0, 0, 0, 0])) for picture in pictures]


@asynccontextmanager
async def running(batcher: Batcher) -> AsyncIterator[None]:
    task = asyncio.create_task(batcher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def queued(batcher: Batcher, *pictures: Tiles, deadline: Deadline = NEVER) -> list[asyncio.Task[EncodedTiles]]:
    tasks = [asyncio.create_task(batcher.encode(picture, deadline)) for picture in pictures]
    await settle()
    return tasks


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_waits_goes_together_in_order_up_to_the_budget() -> None:
    runner = ScriptedRunner()
    batcher = Batcher(runner, max_batch_tiles=8, max_queued_tiles=100)
    tasks = await queued(batcher, *(tiles_of(count, count) for count in (5, 2, 3, 4, 13, 1)))
    async with running(batcher):
        encoded = await asyncio.gather(*tasks)
    assert runner.batches == [[5, 2], [3, 4], [13], [1]]
    assert [item.visual_tokens[0, 0].item() for item in encoded] == [5, 2, 3, 4, 13, 1]
    assert batcher.queued_tiles == 0


async def test_a_picture_that_comes_while_the_tower_is_busy_joins_the_next_batch() -> None:
    runner = ScriptedRunner()
    runner.open.clear()
    batcher = Batcher(runner, max_batch_tiles=8, max_queued_tiles=100)
    async with running(batcher):
        first = await queued(batcher, tiles_of(1))
        later = await queued(batcher, tiles_of(2), tiles_of(3))
        runner.open.set()
        await asyncio.gather(*first, *later)
    assert runner.batches == [[1], [2, 3]]


async def test_one_bad_picture_fails_alone() -> None:
    batcher = Batcher(ScriptedRunner(), max_batch_tiles=16, max_queued_tiles=100)
    tasks = await queued(batcher, tiles_of(2), tiles_of(2, BAD), tiles_of(2, 3))
    async with running(batcher):
        good, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(good, EncodedTiles)
    assert isinstance(bad, RuntimeError)
    assert isinstance(other, EncodedTiles)


async def test_the_queue_refuses_more_tiles_than_it_may_hold_and_says_when_to_come_back() -> None:
    batcher = Batcher(ScriptedRunner(), max_batch_tiles=8, max_queued_tiles=6)
    tasks = await queued(batcher, tiles_of(4))
    with pytest.raises(QueueFull) as caught:
        await batcher.encode(tiles_of(3), NEVER)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    async with running(batcher):
        await asyncio.gather(*tasks)
        await batcher.encode(tiles_of(6), NEVER)


async def test_a_picture_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    batcher = Batcher(ScriptedRunner(), max_batch_tiles=8, max_queued_tiles=6)
    async with running(batcher):
        encoded = await batcher.encode(tiles_of(13), NEVER)
    assert len(encoded.visual_tokens) == 13


async def test_a_picture_nobody_waits_for_any_more_is_not_encoded() -> None:
    now = 0.0
    clock: Callable[[], float] = lambda: now  # noqa: E731
    runner = ScriptedRunner()
    batcher = Batcher(runner, max_batch_tiles=8, max_queued_tiles=100)
    late, extended = Deadline(1.0, clock), Deadline(1.0, clock)
    (dropped,) = await queued(batcher, tiles_of(1), deadline=late)
    (kept,) = await queued(batcher, tiles_of(2), deadline=extended)
    extended.extend(5.0)
    now = 2.0
    async with running(batcher):
        outcomes = await asyncio.gather(dropped, kept, return_exceptions=True)
    assert isinstance(outcomes[0], DeadlineExceeded)
    assert isinstance(outcomes[1], EncodedTiles)
    assert runner.batches == [[2]]


async def test_a_picture_whose_caller_was_cancelled_is_not_encoded() -> None:
    runner = ScriptedRunner()
    batcher = Batcher(runner, max_batch_tiles=8, max_queued_tiles=100)
    left, stayed = await queued(batcher, tiles_of(1), tiles_of(2))
    left.cancel()
    async with running(batcher):
        await stayed
    assert runner.batches == [[2]]


def load_tiny() -> LoadedTower:
    return load_tower(Checkpoint(TINY), TowerConfig.of(read_config(TINY)), torch.device("cpu"), torch.float32)


async def test_the_tower_gives_a_picture_the_same_tokens_alone_and_in_company() -> None:
    runner = ModelRunner(load_tiny, max_batch_tiles=3)
    await runner.load()
    noise = np.random.default_rng(1).integers(0, 256, (7, 56, 56, 3), np.uint8)
    together = await runner.encode([noise[:5], noise[5:6], noise[6:]])
    (alone,) = await runner.encode([noise[5:6]])
    runner.close()
    assert [tuple(part.shape) for part in together] == [(20, 64), (4, 64), (4, 64)]
    torch.testing.assert_close(together[1], alone, atol=1e-5, rtol=0.0)
    assert runner.identity == TowerIdentity(runner.loaded.fingerprint, "float32")
