"""The engine with a fake model: batching, chunks, preemption, aborts and failures never change what a sequence says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.pace import StepLimits
from llm_service.engine.sequence import EngineRequest, FinishReason, TokenOutput
from shared.busy_sign import BusySign, Side
from shared.errors import InternalError, PromptTooLong
from tests.engine_outputs import each
from tests.llm_service.fakes_llm import LIMITS, FakeRunner, continuation, request, running


async def collect(engine: PagedEngine, asked: EngineRequest) -> list[TokenOutput]:
    async with aclosing(each(engine.generate(asked))) as outputs:
        return [output async for output in outputs]


async def ids_of(engine: PagedEngine, asked: EngineRequest) -> list[int]:
    return [output.token_id for output in await collect(engine, asked)]


async def test_an_answer_ends_at_max_output_tokens_with_length() -> None:
    async with running(FakeRunner()) as engine:
        outputs = await collect(engine, request([1, 2, 3], 5))
    assert [output.token_id for output in outputs] == continuation([1, 2, 3], 5)
    assert [output.finish_reason for output in outputs] == [None] * 4 + [FinishReason.LENGTH]


async def test_an_answer_ends_at_a_stop_token_which_is_part_of_the_ids() -> None:
    expected = continuation([1, 2, 3], 4)
    async with running(FakeRunner()) as engine:
        outputs = await collect(engine, request([1, 2, 3], 50, stop_token_ids=frozenset({expected[3]})))
    assert [output.token_id for output in outputs] == expected
    assert outputs[-1].finish_reason is FinishReason.STOP


async def test_only_the_first_token_carries_queue_and_prefill_times() -> None:
    async with running(FakeRunner()) as engine:
        first, second = await collect(engine, request([1], 2))
    assert first.queue_s is not None
    assert first.prefill_s is not None
    assert second.queue_s is None


async def test_a_long_prompt_is_read_in_chunks_and_a_running_stream_gets_a_token_in_each_step() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        stream = asyncio.create_task(ids_of(engine, request([9], 20)))
        await asyncio.sleep(0)
        long = asyncio.create_task(ids_of(engine, request(list(range(100)), 3)))
        await asyncio.sleep(0.05)
        runner.gate.set()
        assert await stream == continuation([9], 20)
        assert await long == continuation(range(100), 3)
    assert max(sum(batch) for batch in runner.batches) <= LIMITS.step.max_tokens
    chunked = [batch for batch in runner.batches if max(batch) > 1 and len(batch) > 1]
    assert chunked
    assert all(batch[0] == 1 for batch in chunked[1:]), "the decoding sequence comes first"


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=40), min_size=1, max_size=12),
    outputs=st.integers(1, 20),
    num_blocks=st.integers(16, 40),
)
async def test_whatever_is_batched_chunked_and_preempted_each_sequence_says_what_it_says_alone(
    prompts: list[list[int]], outputs: int, num_blocks: int
) -> None:
    limits = EngineLimits(max_sequences=4, step=StepLimits(8), max_tokens=64)
    async with running(FakeRunner(), num_blocks=num_blocks, limits=limits) as engine:
        answers = await asyncio.gather(*(ids_of(engine, request(prompt, outputs)) for prompt in prompts))
    assert answers == [continuation(prompt, outputs) for prompt in prompts]


async def test_preemption_happens_and_changes_nothing() -> None:
    runner = FakeRunner()
    limits = EngineLimits(max_sequences=4, step=StepLimits(64), max_tokens=64)
    prompts = [[index] * 10 for index in range(1, 5)]
    async with running(runner, num_blocks=16, limits=limits) as engine:
        answers = await asyncio.gather(*(ids_of(engine, request(prompt, 30)) for prompt in prompts))
    assert answers == [continuation(prompt, 30) for prompt in prompts]
    assert any(count > 10 for batch in runner.batches for count in batch), "a preempted sequence was computed again"


async def test_output_is_cut_to_what_the_context_leaves() -> None:
    limits = EngineLimits(max_sequences=4, step=StepLimits(64), max_tokens=20)
    async with running(FakeRunner(), limits=limits) as engine:
        outputs = await collect(engine, request([1] * 15, 1000))
    assert len(outputs) == 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    async with running(FakeRunner()) as engine:
        with pytest.raises(PromptTooLong):
            await collect(engine, request([1] * LIMITS.max_tokens))


async def test_one_bad_sequence_fails_alone() -> None:
    runner = FakeRunner(poison=666)
    runner.gate.clear()
    async with running(runner) as engine:
        good = [asyncio.create_task(ids_of(engine, request([index], 6))) for index in range(4)]
        bad = asyncio.create_task(ids_of(engine, request([666], 6)))
        await asyncio.sleep(0.05)
        runner.gate.set()
        assert await asyncio.gather(*good) == [continuation([index], 6) for index in range(4)]
        with pytest.raises(InternalError):
            await bad


async def test_logits_that_are_no_numbers_fail_only_their_sequence() -> None:
    async with running(FakeRunner(nan=5)) as engine:
        good = asyncio.create_task(ids_of(engine, request([1], 6)))
        with pytest.raises(InternalError):
            await collect(engine, request([5], 6))
        assert await good == continuation([1], 6)


@pytest.mark.parametrize("tokens_before", [0, 1, 3])
async def test_leaving_a_stream_frees_its_blocks_whenever_it_happens(tokens_before: int) -> None:
    async with running(FakeRunner()) as engine:
        outputs = each(engine.generate(request([1] * 30, 100)))
        task = asyncio.create_task(read(outputs, tokens_before))
        await asyncio.wait_for(task, 5) if tokens_before else await asyncio.sleep(0)
        await outputs.aclose()
        await until_idle(engine)
        assert await ids_of(engine, request([2], 3)) == continuation([2], 3)


async def test_cancelling_a_waiting_task_frees_its_sequence() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        task = asyncio.create_task(ids_of(engine, request([1] * 30, 100)))
        await asyncio.sleep(0.02)
        task.cancel()
        runner.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(engine)


async def test_generation_goes_on_behind_known_tokens() -> None:
    asked = request([1, 2], 4)
    known = continuation([1, 2], 3)
    resumed = EngineRequest(asked.prompt, (), asked.params, tuple(known))
    async with running(FakeRunner()) as engine:
        assert await ids_of(engine, resumed) == continuation([1, 2], 7)[3:]


async def test_while_the_neighbour_is_at_work_answers_wait_after_each_token_and_questions_do_not(
    tmp_path: Path,
) -> None:
    tower, sign = (BusySign(tmp_path / "neighbour", side) for side in Side)
    runner = FakeRunner()
    patient = replace(LIMITS, step=replace(LIMITS.step, busy_s=600.0))  # longer than any test
    async with running(runner, limits=patient, neighbour=sign) as engine:
        with tower.raised():
            first = asyncio.create_task(ids_of(engine, request([1], 50)))
            # The prompt is read at once; then nothing happens until somebody comes.
            while len(runner.batches) < 1:
                await asyncio.sleep(0.01)
            second = asyncio.create_task(ids_of(engine, request([2], 1)))
            assert await asyncio.wait_for(second, 20) == continuation([2], 1)
            assert not first.done()
        third = asyncio.create_task(ids_of(engine, request([3], 4)))
        assert await asyncio.wait_for(asyncio.gather(first, third), 20) == [continuation([1], 50), continuation([3], 4)]


async def test_the_neighbour_is_told_of_each_step_while_it_is_computed(tmp_path: Path) -> None:
    tower, sign = (BusySign(tmp_path / "neighbour", side) for side in Side)
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner, neighbour=sign) as engine:
        assert not tower.neighbour_is_busy()
        task = asyncio.create_task(ids_of(engine, request([1], 2)))
        while not tower.neighbour_is_busy():
            await asyncio.sleep(0.001)
        runner.gate.set()
        await asyncio.wait_for(task, 20)
        assert not tower.neighbour_is_busy()


async def test_a_fault_of_the_scheduler_fails_every_request_and_refuses_new_ones() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    engine = PagedEngine(runner, BlockManager(64, 4), LIMITS)
    broken = asyncio.Event()
    engine.start(broken.set)
    task = asyncio.create_task(ids_of(engine, request([1], 4)))
    await asyncio.sleep(0.02)
    engine._scheduler.next_batch = lambda: 1 / 0  # type: ignore[assignment, method-assign]
    runner.gate.set()
    with pytest.raises(InternalError):
        await task
    with pytest.raises(InternalError):
        await collect(engine, request([2], 4))
    assert broken.is_set(), "whoever runs the engine has been told"
    engine.stop()


async def read(outputs: AsyncIterator[TokenOutput], count: int) -> None:
    for _ in range(count):
        await anext(outputs)


async def until_idle(engine: PagedEngine) -> None:
    for _ in range(500):
        stats = engine.stats()
        if stats.num_free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(engine.stats())
