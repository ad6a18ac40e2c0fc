"""Every family's model says what the reference says: from the golden ids, its logits and its answers, in float32."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import torch
from safetensors.torch import load_file

from llm_service.engine.beam_search import beam_search
from llm_service.engine.engine import PagedEngine
from llm_service.engine.sequence import EngineRequest
from tests.engine_outputs import each
from tests.golden_cases import ALL_CHECKPOINTS, GOLDEN, GoldenTurn, turns
from tests.golden_models import BLOCK_SIZE, GoldenModel, golden_model

LOGIT_TOLERANCE = 2e-4
LONG_ROPE = ["internvl2-4b-tiny", "internvl2-8b-tiny"]


@pytest.fixture(scope="module", autouse=True)
def drop_models() -> Iterator[None]:
    yield
    golden_model.cache_clear()


@asynccontextmanager
async def running(model: GoldenModel, **size: int) -> AsyncIterator[PagedEngine]:
    engine = model.engine(**size)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def answer(engine: PagedEngine, case: GoldenTurn, request: EngineRequest) -> list[int]:
    beams = case.config.get("num_beams", 1)
    if beams > 1:
        return list(await beam_search(engine, request, beams))
    return [output.token_id async for output in each(engine.generate(request))]


def test_every_golden_checkpoint_is_here() -> None:
    assert len(ALL_CHECKPOINTS) == 11
    assert {golden_model(name).config.llm["architectures"][0] for name in ALL_CHECKPOINTS} == {
        "Qwen2ForCausalLM",
        "LlamaForCausalLM",
        "InternLM2ForCausalLM",
        "InternLM3ForCausalLM",
        "Phi3ForCausalLM",
    }


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_first_logits_of_every_case_are_within_tolerance(checkpoint: str) -> None:
    model = golden_model(checkpoint)
    cases = [case for case in turns(checkpoint) if case.first_logits is not None]
    assert len(cases) > 25
    for case in cases:
        logits = model.logits(model.request(case))[-1]
        assert (logits - torch.from_numpy(case.first_logits)).abs().max() < LOGIT_TOLERANCE, case.name


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_logits_all_along_a_prompt_with_a_picture_are_within_tolerance(checkpoint: str) -> None:
    expected = load_file(GOLDEN / "expected" / checkpoint / "vision_and_logits.safetensors")
    (case,) = [case for case in turns(checkpoint) if case.name == "single_image"]
    model = golden_model(checkpoint)
    logits = model.logits(model.request(case))[expected["single_image.logit_positions"]]
    assert (logits - expected["single_image.logits_at_positions"]).abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
async def test_generated_ids_of_every_case_are_the_references(checkpoint: str) -> None:
    model = golden_model(checkpoint)
    wrong = []
    async with running(model) as engine:
        for case in turns(checkpoint):
            ids = await answer(engine, case, model.request(case))
            if ids != case.output_ids:
                wrong.append((case.name, ids, case.output_ids))
    assert not wrong


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
async def test_all_cases_at_once_say_what_they_say_alone(checkpoint: str) -> None:
    model, cases = golden_model(checkpoint), turns(checkpoint)
    async with running(model) as engine:
        answers = await asyncio.gather(*(answer(engine, case, model.request(case)) for case in cases))
    assert dict(zip([case.name for case in cases], answers, strict=True)) == {
        case.name: case.output_ids for case in cases
    }


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
async def test_chunks_preemption_and_what_is_kept_of_prompts_change_nothing(checkpoint: str) -> None:
    model, cases = golden_model(checkpoint), turns(checkpoint)
    longest = max(len(case.input_ids) + case.config["max_new_tokens"] for case in cases)
    async with running(model, num_blocks=longest // BLOCK_SIZE + 2, max_sequences=8, step_tokens=24) as engine:
        asked = [case for case in cases for _ in range(2)]
        answers = await asyncio.gather(*(answer(engine, case, model.request(case)) for case in asked))
        stats = engine.stats()
    wrong = [(case.name, ids) for case, ids in zip(asked, answers, strict=True) if ids != case.output_ids]
    assert not wrong
    assert stats.num_preemptions > 0
    assert stats.num_cached_tokens > 0


@pytest.mark.parametrize("checkpoint", LONG_ROPE)
async def test_sequences_past_the_trained_length_are_the_references(checkpoint: str) -> None:
    golden = json.loads((GOLDEN / "expected" / checkpoint / "long_rope.json").read_text())
    (case,) = [case for case in turns(checkpoint) if case.name == "text_only"]
    assert len(golden["runs"]) == 5
    for run in golden["runs"]:
        limits = {key: value for key, value in run.items() if key.endswith("max_position_embeddings")}
        model = GoldenModel(checkpoint, **limits)
        request = model.request(case)
        logits = model.logits(request)[-1]
        assert (logits - torch.tensor(run["first_logits"])).abs().max() < LOGIT_TOLERANCE, limits
        async with running(model) as engine:
            ids = await answer(engine, case, request)
        assert ids == run["output_ids"], limits
