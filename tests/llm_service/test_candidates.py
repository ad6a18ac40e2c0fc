"""Several answers of one reading of the prompt: they share its blocks, and each says what it says alone."""

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.pace import StepLimits
from llm_service.engine.sequence import EngineRequest, FinishReason, Probe, SamplingParams, candidates_of
from llm_service.prompt.splice import PromptTokens
from shared.errors import InternalError
from tests.engine_outputs import each
from tests.llm_service.fakes_llm import FakeRunner, continuation, next_token, request, running


async def answers(engine: PagedEngine, asked: EngineRequest) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in range(asked.num_candidates)]
    async with aclosing(each(engine.generate(asked))) as outputs:
        async for output in outputs:
            ids[output.candidate].append(output.token_id)
    return ids


def expected(prompt: list[int], count: int, num_candidates: int) -> list[list[int]]:
    return [continuation(prompt, count, candidate) for candidate in range(num_candidates)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 50])
async def test_candidates_are_what_each_is_alone_after_one_reading_of_the_prompt(length: int) -> None:
    runner, prompt = FakeRunner(), list(range(1, length + 1))
    async with running(runner) as engine:
        assert await answers(engine, request(prompt, 6, num_candidates=4)) == expected(prompt, 6, 4)
    assert sum(map(sum, runner.batches)) == length + 4 * 5, "the prompt once, and every token but the last"
    assert len(runner.copies) == (3 if length % runner.block_size else 0), "only a block in part full is copied"


def test_full_blocks_of_the_prompt_are_shared_and_freed_with_their_last_reader() -> None:
    blocks = BlockManager(num_blocks=16, block_size=4)
    first, second, third = candidates_of(request(list(range(10)), num_candidates=3), lambda output: None, 0.0)
    assert blocks.grow(first, 11)
    copies: list[tuple[int, int]] = []
    assert blocks.fork(second, first, lambda *pair: copies.append(pair))
    assert blocks.fork(third, first, lambda *pair: copies.append(pair))
    assert first.block_table[:2] == second.block_table[:2] == third.block_table[:2]
    assert copies == [(first.block_table[2], second.block_table[2]), (first.block_table[2], third.block_table[2])]
    assert blocks.num_free == 16 - 5
    blocks.release(first)
    assert blocks.num_free == 16 - 4
    blocks.release(second)
    blocks.release(third)
    assert blocks.num_free == 16


def test_a_fork_without_room_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    first, second = candidates_of(request(list(range(10)), num_candidates=2), lambda output: None, 0.0)
    assert blocks.grow(first, 11)
    assert not blocks.fork(second, first, lambda source, target: None)
    assert second.block_table == []
    blocks.release(first)
    assert blocks.num_free == 3


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.lists(st.integers(0, 999), min_size=1, max_size=30), st.integers(1, 6)), min_size=1, max_size=6
    ),
    outputs=st.integers(1, 20),
    num_blocks=st.integers(16, 40),
    max_sequences=st.integers(1, 8),
)
async def test_whatever_is_batched_and_preempted_each_candidate_says_what_it_says_alone(
    asked: list[tuple[list[int], int]], outputs: int, num_blocks: int, max_sequences: int
) -> None:
    limits = EngineLimits(max_sequences=max_sequences, step=StepLimits(8), max_tokens=64)
    async with running(FakeRunner(), num_blocks, limits) as engine:
        said = await asyncio.gather(
            *(answers(engine, request(prompt, outputs, num_candidates=count)) for prompt, count in asked)
        )
    assert said == [expected(prompt, outputs, count) for prompt, count in asked]


async def test_preempted_candidates_come_back_by_what_a_running_one_still_has() -> None:
    runner, prompt = FakeRunner(), list(range(40))
    limits = EngineLimits(max_sequences=8, step=StepLimits(64), max_tokens=64)
    async with running(runner, 20, limits) as engine:
        assert await answers(engine, request(prompt, 20, num_candidates=5)) == expected(prompt, 20, 5)
    counts = [count for batch in runner.batches for count in batch]
    assert any(1 < count < 40 for count in counts), "a preempted candidate computed its own tokens again"
    assert counts.count(40) == 1, "and nobody the prompt"


async def test_a_candidate_that_ends_with_its_first_token_leaves_the_others_going() -> None:
    prompt = [3, 1, 4, 1, 5]
    stop = continuation(prompt, 1)[0]
    async with running(FakeRunner()) as engine:
        asked = request(prompt, 8, num_candidates=3, stop_token_ids=frozenset({stop}))
        said = await answers(engine, asked)
    assert said[0] == [stop]
    assert said[1:] == expected(prompt, 8, 3)[1:]


async def test_each_candidate_ends_with_a_reason_of_its_own() -> None:
    prompt = [3, 1, 4]
    stop = continuation(prompt, 4, candidate=1)[3]
    reasons = {}
    async with running(FakeRunner()) as engine:
        async for output in each(
            engine.generate(request(prompt, 8, num_candidates=2, stop_token_ids=frozenset({stop})))
        ):
            if output.finish_reason:
                reasons[output.candidate] = output.finish_reason
    assert reasons == {0: FinishReason.LENGTH, 1: FinishReason.STOP}


async def test_a_candidate_that_is_ended_stops_and_the_others_go_on() -> None:
    prompt = [3, 1, 4]
    ended: set[int] = set()
    said: list[list[int]] = [[], [], []]
    async with running(FakeRunner()) as engine:
        async for output in each(engine.generate(request(prompt, 30, num_candidates=3), ended)):
            if output.candidate not in ended:
                said[output.candidate].append(output.token_id)
            if len(said[1]) == 4:
                ended.add(1)
    whole = expected(prompt, 30, 3)
    assert said == [whole[0], whole[1][:4], whole[2]]


async def test_a_candidate_that_fails_after_it_was_ended_harms_nobody() -> None:
    prompt = [3, 1, 4]
    ended: set[int] = set()
    said: list[list[int]] = [[], [], []]
    async with running(FakeRunner(nan_candidate=(1, 4))) as engine:
        async for output in each(engine.generate(request(prompt, 30, num_candidates=3), ended)):
            if output.candidate not in ended:
                said[output.candidate].append(output.token_id)
            if len(said[1]) == 4 and 1 not in ended:
                while engine.stats().num_running == 3:  # until the engine has given it up
                    await asyncio.sleep(0.001)
                ended.add(1)
    whole = expected(prompt, 30, 3)
    assert said == [whole[0], whole[1][:4], whole[2]]


async def test_a_candidate_that_fails_before_its_end_fails_the_answer() -> None:
    async with running(FakeRunner(nan_candidate=(1, 4))) as engine:
        with pytest.raises(InternalError):
            await answers(engine, request([3, 1, 4], 30, num_candidates=3))


@pytest.mark.parametrize("tokens_before", [0, 1, 5])
async def test_leaving_frees_every_candidate(tokens_before: int) -> None:
    async with running(FakeRunner()) as engine:
        outputs = each(engine.generate(request([1] * 30, 100, num_candidates=4)))
        for _ in range(tokens_before):
            await anext(outputs)
        await outputs.aclose()
        assert await answers(engine, request([2], 3)) == [continuation([2], 3)]


async def test_a_failing_request_fails_with_all_its_candidates_and_alone() -> None:
    async with running(FakeRunner(poison=666)) as engine:
        good = asyncio.create_task(answers(engine, request([1, 2], 10, num_candidates=3)))
        with pytest.raises(InternalError):
            await answers(engine, request([666], 10, num_candidates=3))
        assert await good == expected([1, 2], 10, 3)


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 999), min_size=2, max_size=40), min_size=1, max_size=5),
    num_blocks=st.integers(16, 40),
)
async def test_probes_read_every_position_once_beside_answers(prompts: list[list[int]], num_blocks: int) -> None:
    limits = EngineLimits(max_sequences=3, step=StepLimits(8), max_tokens=64)

    async def probed(engine: PagedEngine, prompt: list[int]) -> tuple[tuple[float, ...], ...]:
        probe = Probe(tuple(range(len(prompt))), (1, 2))
        asked = EngineRequest(PromptTokens(tuple(prompt)), (), SamplingParams(1), probe=probe)
        return (await engine.probe(asked)).probabilities

    async with running(FakeRunner(), num_blocks, limits) as engine:
        answer = asyncio.create_task(answers(engine, request([9], 40, num_candidates=2)))
        found = await asyncio.gather(*(probed(engine, prompt) for prompt in prompts))
        assert await answer == expected([9], 40, 2)
    assert found == [tuple((float(next_token(prompt[: end + 1])),) for end in range(len(prompt))) for prompt in prompts]


async def test_a_probe_that_finds_no_numbers_fails_alone() -> None:
    async with running(FakeRunner(nan=5)) as engine:
        good = asyncio.create_task(answers(engine, request([1], 6)))
        bad = EngineRequest(PromptTokens((5, 1)), (), SamplingParams(1), probe=Probe((0, 1), (1, 2)))
        with pytest.raises(InternalError):
            await engine.probe(bad)
        assert await good == [continuation([1], 6)]
