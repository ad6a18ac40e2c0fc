"""Past the trained length, rope is scaled by the sequence's own length, however its tokens are batched."""

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from llm_service.app import LoadedModel
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import EngineRequest, SamplingParams, Sequence
from llm_service.prompt.splice import PromptTokens
from llm_service.settings import LlmSettings
from tests.golden_cases import GOLDEN

# A checkpoint of each rope that changes with length, and the setting after which it does.
LIMITS = {"internvl3-8b-tiny": "max_positions", "internvl2-4b-tiny": "original_max_positions"}


@pytest.fixture(params=LIMITS)
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits_after(checkpoint: str, token_ids: list[int], num_prompt: int, chunks: Iterable[int]) -> torch.Tensor:
    """Compute a sequence, the first `num_prompt` tokens of which are its prompt, in the given chunks."""
    settings = LlmSettings(model=GOLDEN / "checkpoints" / checkpoint, kv_cache_bytes=16 << 20)
    model = LoadedModel(settings)
    rope = dataclasses.replace(model.decoder.config.rope, **{LIMITS[checkpoint]: 64})
    model.decoder.config = dataclasses.replace(model.decoder.config, rope=rope)
    runner, blocks = model.runner()
    prompt = PromptTokens(tuple(token_ids[:num_prompt]))
    asked = EngineRequest(prompt, (), SamplingParams(1), tuple(token_ids[num_prompt:]))
    seq = Sequence(asked, lambda output: None, 0.0)
    assert blocks.grow(seq, len(token_ids))
    for count in chunks:
        logits = runner.prompt_logits([ScheduledTokens(seq, count)])[-1]
        seq.num_computed += count
    return logits


def test_chunks_do_not_change_a_long_prompt(checkpoint: str) -> None:
    token_ids = [(7 * index) % 400 for index in range(200)]
    whole = logits_after(checkpoint, token_ids, 200, [200])
    for chunks in ([100, 100], [64, 64, 64, 8], [1] * 5 + [195]):
        torch.testing.assert_close(logits_after(checkpoint, token_ids, 200, chunks), whole, atol=1e-4, rtol=1e-4)


def test_a_recomputed_answer_is_what_it_was_token_by_token(checkpoint: str) -> None:
    token_ids = [(7 * index) % 400 for index in range(120)]
    step_by_step = logits_after(checkpoint, token_ids, 50, [50, *[1] * 70])
    torch.testing.assert_close(logits_after(checkpoint, token_ids, 50, [120]), step_by_step, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        logits_after(checkpoint, token_ids, 50, [30, 60, 30]), step_by_step, atol=1e-4, rtol=1e-4
    )
