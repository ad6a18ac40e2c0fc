"""What the engine says of its progress: a stuck step shows, an idle engine and one that waits for pictures do not."""

import asyncio
from collections.abc import Mapping

import torch

from llm_service.engine.engine import PagedEngine
from llm_service.engine.sequence import EngineRequest, SamplingParams
from llm_service.prompt.splice import PlaceholderRange, PromptTokens
from tests.engine_outputs import each
from tests.llm_service.fakes_llm import FakeRunner, ref, request, running


async def answer(engine: PagedEngine, asked: EngineRequest) -> None:
    async for _ in each(engine.generate(asked)):
        pass


async def until_idle(engine: PagedEngine) -> None:
    while engine.progress().has_work:
        await asyncio.sleep(0.001)


async def test_an_engine_without_work_says_so_before_and_after_an_answer() -> None:
    async with running(FakeRunner()) as engine:
        assert not engine.progress().has_work
        await answer(engine, request([1, 2, 3], 4))
        await until_idle(engine)
        assert engine.progress().num_steps == 4


async def test_a_step_that_does_not_end_is_work_without_progress() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        asked = asyncio.create_task(answer(engine, request([1, 2, 3], 4)))
        while not engine.progress().has_work:
            await asyncio.sleep(0.001)
        stuck = engine.progress()
        engine.forget()  # what is asked of it meanwhile is no progress either
        assert engine.progress() == stuck
        runner.gate.set()
        await asked
        assert engine.progress().num_steps == stuck.num_steps + 4


async def test_to_wait_for_the_embedding_of_a_picture_is_no_work() -> None:
    encoded = asyncio.Event()

    async def fetch(indices: tuple[int, ...]) -> Mapping[int, torch.Tensor]:
        await encoded.wait()
        return {0: torch.tensor([[5.0], [6.0]])}

    picture = PlaceholderRange(1, 2, ref(tiles=1, tokens_per_tile=2), 0)
    asked = EngineRequest(PromptTokens((1, 999, 999, 2), (picture,)), (), SamplingParams(3), fetch=fetch)
    async with running(FakeRunner()) as engine:
        waiting = asyncio.create_task(answer(engine, asked))
        while not engine.stats().num_waiting:
            await asyncio.sleep(0.001)
        await until_idle(engine)
        assert engine.progress().num_steps == 0
        encoded.set()
        await waiting
        assert engine.progress().num_steps > 0
