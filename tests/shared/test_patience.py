"""A request waits for a store as long as its patience lasts, and its cancellation is never lost."""

import asyncio

import pytest

from shared.patience import Patience


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_only_waiting_counts() -> None:
    patience = Patience(60)
    answered = asyncio.Event()
    waiting = asyncio.create_task(patience.bound(answered.wait))
    await asyncio.sleep(0.02)
    answered.set()
    await waiting
    left_s = patience.left_s
    await asyncio.sleep(0.02)
    assert 0 < left_s == patience.left_s < 60


async def test_time_in_which_the_process_could_not_run_is_not_the_stores() -> None:
    clock = Clock()
    patience, answered = Patience(0.05, clock), asyncio.Event()
    waiting = asyncio.create_task(patience.bound(answered.wait))
    await asyncio.sleep(0)
    clock.now += 3600  # as if this process had been frozen: when it looks again, the answer is there
    answered.set()
    assert await waiting
    assert patience.left_s >= 0.04 - 1e-9


async def test_what_answers_in_time_is_returned_and_what_fails_raises() -> None:
    async def answer() -> int:
        return 7

    async def fail() -> int:
        raise OSError

    assert await Patience(60).bound(answer) == 7
    with pytest.raises(OSError):  # noqa: PT011  # itself
        await Patience(60).bound(fail)


async def test_what_does_not_answer_is_cancelled_and_nothing_is_begun_once_patience_is_at_its_end() -> None:
    ended = asyncio.Event()
    begun = 0

    async def hang() -> None:
        nonlocal begun
        begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    patience = Patience(0.01)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await patience.bound(hang)
    await ended.wait()
    assert begun == 1


async def test_a_command_that_swallows_its_cancellation_does_not_swallow_the_callers() -> None:
    async def deaf() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "an answer after all"
        return "never"

    asking = asyncio.create_task(Patience(60).bound(deaf))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    assert asking.cancelled()
