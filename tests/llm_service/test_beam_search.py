"""Beam search beside the reference's golden case: limits, stops and failures."""

import asyncio
import math
from collections.abc import AsyncGenerator

import pytest

from llm_service.engine.beam_search import beam_search
from llm_service.engine.engine import EngineStats
from llm_service.engine.sequence import EngineRequest, FinishReason, TokenOutput
from shared.errors import InternalError, ServiceError
from tests.llm_service.fakes_llm import request


class ScriptedEngine:
    """An engine whose next-token probabilities are given per token before; `error` is raised instead of an answer."""

    def __init__(self, table: dict[int, dict[int, float]], max_tokens: int = 100) -> None:
        self.table, self.max_tokens = table, max_tokens
        self.error: ServiceError | None = None
        self.open = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def generate(self, asked: EngineRequest) -> AsyncGenerator[tuple[TokenOutput, ...], None]:
        known = [*asked.prompt.ids, *asked.generated]
        assert len(known) < self.max_tokens
        self.open += 1
        try:
            await self.gate.wait()
            if self.error:
                raise self.error
            chances = sorted(self.table[known[-1]].items(), key=lambda entry: -entry[1])[: asked.params.top_logprobs]
            logprobs = tuple((token, math.log(chance)) for token, chance in chances)
            yield (TokenOutput(logprobs[0][0], FinishReason.LENGTH, logprobs),)
        finally:
            self.open -= 1

    def stats(self) -> EngineStats:
        return EngineStats(self.open, 0, 0, 0)


# After 0, token 1 looks best, but 2 leads to something certain.
TRAP = {0: {1: 0.6, 2: 0.4}, 1: {3: 0.3, 4: 0.3, 5: 0.4}, 2: {9: 1.0}, 3: {9: 1.0}, 4: {9: 1.0}, 5: {9: 1.0}}


async def test_two_beams_find_what_greedy_misses() -> None:
    asked = request([0], 2, stop_token_ids=frozenset({9}))
    assert await beam_search(ScriptedEngine(TRAP), asked, 1) == (1, 5)
    assert await beam_search(ScriptedEngine(TRAP), asked, 2) == (2, 9)


async def test_a_search_that_reaches_the_context_ends_there() -> None:
    loop = {0: {0: 0.7, 1: 0.3}, 1: {0: 0.5, 1: 0.5}}
    found = await beam_search(ScriptedEngine(loop, max_tokens=6), request([0, 0], 50), 2)
    assert len(found) == 4


async def test_several_stop_tokens_that_are_all_likeliest_leave_room_for_the_beams() -> None:
    stops = {100: 0.3, 101: 0.25, 102: 0.2}
    table = {0: {**stops, 1: 0.15, 2: 0.1}, 1: {**stops, 1: 0.25}, 2: {**stops, 1: 0.25}}
    asked = request([0], 3, stop_token_ids=frozenset(stops))
    found = await beam_search(ScriptedEngine(table), asked, 2)
    assert found[-1] in stops


async def test_a_vocabulary_of_stops_only_ends_the_search() -> None:
    asked = request([0], 5, stop_token_ids=frozenset({1, 2}))
    assert await beam_search(ScriptedEngine({0: {1: 0.6, 2: 0.4}}), asked, 3) == (1,)


async def test_an_engines_error_comes_out_as_it_is() -> None:
    engine = ScriptedEngine(TRAP)
    engine.error = InternalError("failed")
    with pytest.raises(InternalError):
        await beam_search(engine, request([0], 3), 2)
    await asyncio.sleep(0)
    assert engine.open == 0


async def test_leaving_a_search_leaves_no_sequence_behind() -> None:
    engine = ScriptedEngine(TRAP)
    engine.gate.clear()
    task = asyncio.create_task(beam_search(engine, request([0], 3), 2))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert engine.open == 0
