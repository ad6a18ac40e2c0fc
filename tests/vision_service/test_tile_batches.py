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


def numbered(count: int, start: int = 0) -> Tiles:
    """Return tiles of which each has a value of its own."""
    return np.arange(start, start + count, dtype=np.uint8)[:, np.newaxis, np.newaxis, np.newaxis].repeat(3, axis=3)


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
        return [torch.from_numpy(picture[:, 0, 0, :1].astype(np.float32)) for picture in pictures]


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


def values_of(encoded: EncodedTiles) -> list[int]:
    return [int(value) for piece in encoded.pieces for value in piece[:, 0]]


async def test_what_waits_goes_together_in_order_up_to_the_budget() -> None:
    runner = ScriptedRunner()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    tasks = await queued(batcher, *(tiles_of(count, count) for count in (5, 2, 3, 4, 13, 1)))
    async with running(batcher):
        encoded = await asyncio.gather(*tasks)
    assert runner.batches == [[5, 2], [3, 4], [8], [1, 5]]
    assert [values_of(item)[0] for item in encoded] == [5, 2, 3, 4, 13, 1]
    assert batcher.queued_tiles == 0


async def test_a_picture_that_comes_while_the_tower_is_busy_joins_the_next_batch() -> None:
    runner = ScriptedRunner()
    runner.open.clear()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    async with running(batcher):
        first = await queued(batcher, tiles_of(1))
        later = await queued(batcher, tiles_of(2), tiles_of(3))
        runner.open.set()
        await asyncio.gather(*first, *later)
    assert runner.batches == [[1], [2, 3]]


async def test_a_long_video_goes_in_pieces_and_lets_pictures_pass() -> None:
    runner = ScriptedRunner()
    runner.open.clear()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    async with running(batcher):
        (video,) = await queued(batcher, numbered(27))
        pictures = await queued(batcher, tiles_of(1), tiles_of(2))
        assert batcher.queued_tiles == 27 - 8 + 3
        runner.open.set()
        encoded = await video
        await asyncio.gather(*pictures)
    assert runner.batches == [[8], [8], [1, 2], [8], [3]]
    assert values_of(encoded) == list(range(27))
    assert batcher.queued_tiles == 0


async def test_what_nobody_waits_for_goes_last_and_apart() -> None:
    runner = ScriptedRunner()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    early = await queued(batcher, tiles_of(2), tiles_of(3), deadline=Deadline(None, urgent=False))
    urgent = await queued(batcher, tiles_of(1), tiles_of(4))
    async with running(batcher):
        await asyncio.gather(*early, *urgent)
    assert runner.batches == [[1, 4], [2, 3]]


async def test_what_somebody_begins_to_wait_for_overtakes_what_nobody_does() -> None:
    runner = ScriptedRunner()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    deadline = Deadline(None, urgent=False)
    early = await queued(batcher, tiles_of(2), deadline=Deadline(None, urgent=False))
    wanted = await queued(batcher, tiles_of(3), deadline=deadline)
    deadline.extend(None)
    async with running(batcher):
        await asyncio.gather(*early, *wanted)
    assert runner.batches == [[3], [2]]


async def test_two_long_videos_take_turns() -> None:
    runner = ScriptedRunner()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    tasks = await queued(batcher, numbered(24), numbered(17, start=30))
    async with running(batcher):
        first, second = await asyncio.gather(*tasks)
    assert runner.batches == [[8]] * 5 + [[1]]
    assert values_of(first) == list(range(24))
    assert values_of(second) == list(range(30, 47))


async def test_a_bad_frame_fails_its_video_alone_and_the_rest_of_it_is_not_encoded() -> None:
    runner = ScriptedRunner()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    tasks = await queued(batcher, np.concatenate((tiles_of(1, BAD), tiles_of(23))), numbered(10))
    async with running(batcher):
        bad, good = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(bad, RuntimeError)
    assert isinstance(good, EncodedTiles)
    assert values_of(good) == list(range(10))
    assert sum(map(sum, runner.batches)) <= 8 + 8 + 10
    assert batcher.queued_tiles == 0


async def test_the_next_batch_goes_to_the_replica_that_is_free() -> None:
    busy, free = ScriptedRunner(), ScriptedRunner()
    busy.open.clear()
    batcher = Batcher([busy, free], max_batch_tiles=8, max_queued_tiles=100)
    async with running(batcher):
        (held,) = await queued(batcher, tiles_of(1))
        others = [await batcher.encode(tiles_of(2, value), NEVER) for value in (4, 5)]
        busy.open.set()
        await held
    assert (busy.batches, free.batches) == ([[1]], [[2], [2]])
    assert [values_of(item) for item in others] == [[4, 4], [5, 5]]


async def test_a_long_video_has_every_free_replica_at_work() -> None:
    runners = [ScriptedRunner(), ScriptedRunner()]
    for runner in runners:
        runner.open.clear()
    batcher = Batcher(runners, max_batch_tiles=8, max_queued_tiles=100)
    async with running(batcher):
        (video,) = await queued(batcher, numbered(14))
        assert [runner.batches for runner in runners] == [[[8]], [[6]]]
        for runner in reversed(runners):  # the second piece is done first
            runner.open.set()
            await settle()
        assert values_of(await video) == list(range(14))


async def test_a_pass_that_fails_on_one_replica_fails_alone() -> None:
    runners = [ScriptedRunner(), ScriptedRunner()]
    batcher = Batcher(runners, max_batch_tiles=2, max_queued_tiles=100)
    tasks = await queued(batcher, *(tiles_of(1, BAD if index == 3 else index) for index in range(10)))
    async with running(batcher):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
    assert failed == [3]
    assert all(runner.batches for runner in runners)


async def test_one_bad_picture_fails_alone() -> None:
    batcher = Batcher([ScriptedRunner()], max_batch_tiles=16, max_queued_tiles=100)
    tasks = await queued(batcher, tiles_of(2), tiles_of(2, BAD), tiles_of(2, 3))
    async with running(batcher):
        good, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(good, EncodedTiles)
    assert isinstance(bad, RuntimeError)
    assert isinstance(other, EncodedTiles)


async def test_the_queue_refuses_more_tiles_than_it_may_hold_and_says_when_to_come_back() -> None:
    batcher = Batcher([ScriptedRunner()], max_batch_tiles=8, max_queued_tiles=6)
    tasks = await queued(batcher, tiles_of(4))
    with pytest.raises(QueueFull) as caught:
        await batcher.encode(tiles_of(3), NEVER)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    async with running(batcher):
        await asyncio.gather(*tasks)
        await batcher.encode(tiles_of(6), NEVER)


async def test_a_picture_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    batcher = Batcher([ScriptedRunner()], max_batch_tiles=8, max_queued_tiles=6)
    async with running(batcher):
        encoded = await batcher.encode(tiles_of(13), NEVER)
    assert len(values_of(encoded)) == 13


async def test_a_picture_nobody_waits_for_any_more_is_not_encoded() -> None:
    now = 0.0
    clock: Callable[[], float] = lambda: now  # noqa: E731
    runner = ScriptedRunner()
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
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
    batcher = Batcher([runner], max_batch_tiles=8, max_queued_tiles=100)
    left, stayed = await queued(batcher, tiles_of(1), tiles_of(2))
    left.cancel()
    async with running(batcher):
        await stayed
    assert runner.batches == [[2]]


def load_tiny() -> LoadedTower:
    return load_tower(Checkpoint(TINY), TowerConfig.of(read_config(TINY)), torch.device("cpu"), torch.float32)


async def test_the_tower_gives_a_picture_the_same_tokens_alone_and_in_company() -> None:
    runner = ModelRunner(load_tiny)
    await runner.load()
    noise = np.random.default_rng(1).integers(0, 256, (7, 56, 56, 3), np.uint8)
    together = await runner.encode([noise[:5], noise[5:6], noise[6:]])
    (alone,) = await runner.encode([noise[5:6]])
    runner.close()
    assert [tuple(part.shape) for part in together] == [(20, 64), (4, 64), (4, 64)]
    torch.testing.assert_close(together[1], alone, atol=1e-5, rtol=0.0)
    assert runner.identity == TowerIdentity(runner.loaded.fingerprint, "float32")


async def test_two_replicas_give_the_same_tokens_and_outlive_a_picture_that_fails() -> None:
    runners = [ModelRunner(load_tiny), ModelRunner(load_tiny)]
    await asyncio.gather(*(runner.load() for runner in runners))
    assert runners[0].identity == runners[1].identity
    noise = np.random.default_rng(2).integers(0, 256, (8, 56, 56, 3), np.uint8)
    batcher = Batcher(runners, max_batch_tiles=1, max_queued_tiles=100)
    async with running(batcher):
        encoded = await asyncio.gather(*(batcher.encode(noise[index : index + 1], NEVER) for index in range(8)))
        with pytest.raises(RuntimeError):
            await batcher.encode(np.zeros((1, 4, 4, 3), np.uint8), NEVER)  # smaller than a patch
        again = await batcher.encode(noise, NEVER)
    for item, piece in zip(encoded, again.pieces, strict=True):
        torch.testing.assert_close(item.pieces[0], piece)
    for runner in runners:
        runner.close()
