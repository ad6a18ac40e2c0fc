"""Who is served next, and how much of a prompt at a time."""

import asyncio
import time
from dataclasses import replace

import pytest

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.pace import Pace, StepLimits
from llm_service.engine.prefix import PrefixKeys, always_plain
from llm_service.engine.scheduler import Scheduler
from llm_service.engine.sequence import Priority, Sequence
from shared.errors import DeadlineExceeded, QueueFull
from tests.llm_service.fakes_llm import FakeRunner, continuation, request, running
from tests.llm_service.test_prefix_cache import said

SECONDS_PER_TOKEN = 0.01
LIMITS = StepLimits(100, busy_s=0.2, idle_s=0.5)


class Scheduling:
    """A scheduler, and the steps that it asks for."""

    def __init__(self, limits: StepLimits = LIMITS, num_blocks: int = 100, max_sequences: int = 8) -> None:
        self.pace = Pace(limits)
        self.pace.note(100, 100 * SECONDS_PER_TOKEN)
        self.blocks = BlockManager(num_blocks, 4)
        keys = PrefixKeys(4, always_plain)
        self.scheduler = Scheduler(
            self.blocks, keys, self.pace, max_sequences, lambda source, target: None, lambda seq, places: None
        )

    def add(self, first: int, num_tokens: int, arrival: float, priority: Priority = Priority.INTERACTIVE) -> Sequence:
        """Queue a prompt that begins with `first`."""
        asked = replace(request([first, *range(num_tokens - 1)]), priority=priority)
        seq = Sequence(asked, lambda output: None, arrival)
        self.scheduler.add(seq)
        return seq

    def step(self) -> dict[int, int]:
        """Compute a step; return how many tokens of each sequence it had, by the sequence's first token, in order."""
        batch = self.scheduler.next_batch()
        for tokens in batch:
            done = tokens.completes
            self.scheduler.computed(tokens.seq, tokens.count)
            if done:
                tokens.seq.token_ids.append(0)
                tokens.seq.first_token_time = 0.0
        return {tokens.seq.token_ids[0]: tokens.count for tokens in batch}


def test_chunks_are_as_long_as_the_time_of_a_step_allows() -> None:
    made = Scheduling(StepLimits(1000, busy_s=0.4, idle_s=0.8))
    made.add(1, 200, 0.0)
    assert made.step() == {1: 80}
    assert made.step() == {1: 80}
    assert made.step() == {1: 40}
    made.add(2, 100, 1.0)
    assert made.step() == {1: 1, 2: 39}, "a stream runs: the chunk is shorter"


def test_chunks_grow_with_the_machine() -> None:
    pace = Pace(StepLimits(1000, busy_s=0.2, idle_s=0.5))
    assert pace.room(0) == 1000, "nothing is known yet"
    pace.note(100, 1.0)
    assert pace.room(0) == 50
    for _ in range(50):
        pace.note(100, 0.1)
    assert pace.room(0) == pytest.approx(500, abs=2)
    assert pace.room(8) == pytest.approx(192, abs=2)


def test_what_a_step_takes_at_least_is_left_out_of_the_room_for_prompts() -> None:
    pace = Pace(StepLimits(1000, busy_s=0.3, idle_s=0.6))
    pace.note(4, 0.1)
    pace.note(100, 0.3)
    assert pace.seconds_per_token == 0.003
    assert pace.room(10) == pytest.approx(90, abs=1)  # 0.2 s at 2 ms a token, less the streams' own
    assert pace.room(0) == pytest.approx(250, abs=1)


def test_a_slow_step_of_a_few_tokens_does_not_make_prompts_free() -> None:
    pace = Pace(StepLimits(10_000, busy_s=2.0))
    pace.note(4, 0.5)
    pace.note(100, 0.4)
    assert pace.room(1) == pytest.approx(1499, abs=1)  # 1.5 s at a quarter of 4 ms


def test_half_of_a_step_is_for_prompts_however_long_decoding_takes() -> None:
    pace = Pace(StepLimits(10_000, busy_s=2.0))
    pace.note(4, 10.0)
    pace.note(100, 10.4)
    assert pace.room(1) == pytest.approx(1.0 / 0.026 - 1, abs=1)


def test_however_slow_the_machine_prompts_are_read() -> None:
    pace = Pace(StepLimits(1000))
    pace.note(100, 1000.0)
    assert pace.room(0) == pace.room(1) == 32


def test_a_short_prompt_overtakes_a_long_one_that_came_little_earlier() -> None:
    made = Scheduling()
    made.add(1, 300, 0.0)
    assert made.step() == {1: 50}
    made.add(2, 10, 1.0)
    assert list(made.step()) == [2, 1]


def test_a_long_prompt_is_not_overtaken_for_ever() -> None:
    made = Scheduling()
    made.add(1, 300, 0.0)
    made.step()
    made.add(2, 10, 3.0)  # the long one alone would have been done by then
    assert list(made.step()) == [1]


def test_what_has_no_room_is_not_overtaken_by_what_has() -> None:
    made = Scheduling(num_blocks=20)
    made.add(1, 50, 0.0)
    made.step()
    made.add(2, 40, 0.0)
    made.add(3, 4, 1.0)
    for _ in range(3):
        assert made.step() == {1: 1}
    made.scheduler.remove(made.scheduler.running[0])
    assert set(made.step()) == {2, 3}


def test_a_prompt_that_runs_is_read_though_another_has_no_room() -> None:
    made = Scheduling(num_blocks=30)
    made.add(1, 110, 0.5)
    made.step()
    made.add(2, 30, 0.0)
    assert made.step() == {1: 50}


def test_nobody_waits_behind_the_background() -> None:
    made = Scheduling()
    made.add(1, 60, 0.0, Priority.BACKGROUND)
    made.step()
    made.add(2, 200, 5.0)
    assert list(made.step()) == [2]


def test_the_background_gives_its_room_first_and_the_latest_after_it() -> None:
    made = Scheduling(num_blocks=20)
    made.add(1, 20, 0.0, Priority.BACKGROUND)
    made.step()
    made.add(2, 20, 1.0)
    made.step()
    made.add(3, 20, 2.0)
    made.step()
    lost = []
    while made.scheduler.num_preemptions < 2:
        before = {seq.token_ids[0] for seq in made.scheduler.running}
        made.step()
        lost += sorted(before - {seq.token_ids[0] for seq in made.scheduler.running})
    assert lost == [1, 3]


def test_a_preempted_stream_goes_on_before_new_prompts_are_read() -> None:
    made = Scheduling(num_blocks=12)
    made.add(1, 20, 0.0)
    made.step()
    made.add(2, 16, 1.0)
    made.step()
    while not made.scheduler.num_preemptions:
        made.step()
    made.add(3, 4, 0.0)
    made.scheduler.remove(made.scheduler.running[0])
    assert next(iter(made.step())) == 2


async def test_a_prompt_that_cannot_be_read_before_its_deadline_is_refused_at_once() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        engine._pace.note(100, 100.0)
        asked = replace(request(list(range(1, 31))), deadline=time.monotonic() + 5)
        with pytest.raises(DeadlineExceeded):
            await said(engine, asked)
        assert runner.batches == []
        assert (await said(engine, replace(asked, deadline=time.monotonic() + 60)))[0] == continuation(range(1, 31), 8)


async def test_a_prompt_whose_turn_comes_after_its_deadline_is_refused_with_a_hint() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        engine._pace.note(100, 100.0)
        ahead = asyncio.create_task(said(engine, request(list(range(1, 100)))))
        await asyncio.sleep(0)
        asked = replace(request([7] * 30), deadline=time.monotonic() + 25, priority=Priority.BACKGROUND)
        behind = asyncio.create_task(said(engine, asked))
        await asyncio.sleep(0)
        runner.gate.set()
        with pytest.raises(QueueFull) as refused:
            await behind
        assert refused.value.retry_after_s
        assert (await ahead)[0] == continuation(range(1, 100), 8)
