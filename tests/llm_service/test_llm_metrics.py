"""What the LLM service measures of answers, and what is read off its engine."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from llm_service.candidate import Delta
from llm_service.engine.engine import EngineLimits, EngineStats
from llm_service.engine.pace import StepLimits
from llm_service.metrics import LlmMetrics
from shared.prometheus import PrometheusRegistry
from tests.golden_cases import turns
from tests.golden_models import golden_model
from tests.llm_service.fakes_llm import FakeRunner, request, running
from tests.llm_service.golden_answering import CHECKPOINT, asking, loaded, plain
from tests.llm_service.test_engine import ids_of

PICTURE_CASE = next(case for case in turns(CHECKPOINT) if case.groups)
TIMES = ("queue", "prefill", "time_to_first_token", "time_per_output_token")


@pytest.fixture(scope="module", autouse=True)
def drop_models() -> Iterator[None]:
    yield
    loaded.cache_clear()
    golden_model.cache_clear()


def measured(registry: PrometheusRegistry) -> dict[str, float | None]:
    """How many answers each of the times was measured of."""
    return {time: registry.value(f"internvl_llm_{time}_seconds_count") for time in TIMES}


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
async def test_every_token_of_a_prompt_is_read_once_and_every_token_of_an_answer_counted_once(length: int) -> None:
    async with running(FakeRunner()) as engine:
        answers = await asyncio.gather(*(ids_of(engine, request([index] * length, 5)) for index in range(3)))
        stats = engine.stats()
    assert stats.num_prefilled_tokens == 3 * length
    assert stats.num_decoded_tokens == sum(map(len, answers)) == 15
    assert stats.num_preemptions == 0


async def test_candidates_share_the_reading_of_their_prompt() -> None:
    async with running(FakeRunner()) as engine:
        assert len(await ids_of(engine, request([1, 2, 3], 4, num_candidates=3))) == 12
        stats = engine.stats()
    assert (stats.num_prefilled_tokens, stats.num_decoded_tokens) == (3, 12)


async def test_what_is_read_again_after_a_preemption_counts_again() -> None:
    limits = EngineLimits(max_sequences=4, step=StepLimits(64), max_tokens=64)
    async with running(FakeRunner(), num_blocks=16, limits=limits) as engine:
        answers = await asyncio.gather(*(ids_of(engine, request([index] * 10, 30)) for index in range(1, 5)))
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefilled_tokens > 40
    assert stats.num_decoded_tokens == sum(map(len, answers)) == 120, "what was said is said once"


def test_the_engine_is_read_when_somebody_asks() -> None:
    registry = PrometheusRegistry()
    metrics = LlmMetrics.declared(registry)
    assert registry.value("internvl_llm_kv_blocks") is None, "no model, no cache"
    metrics.engine.connect(lambda: EngineStats(3, 2, 10, 64, 5, 700, 80, 600, 7))
    values = {
        "running_sequences": 3,
        "waiting_sequences": 2,
        "kv_used_blocks": 54,
        "kv_kept_blocks": 7,
        "kv_blocks": 64,
        "preemptions_total": 5,
        "prefilled_tokens_total": 700,
        "cached_tokens_total": 600,
        "decoded_tokens_total": 80,
    }
    assert {name: registry.value(f"internvl_llm_{name}") for name in values} == values


async def test_every_time_of_an_answer_is_measured_once() -> None:
    registry = PrometheusRegistry()
    async with asking(metrics=LlmMetrics.declared(registry)) as system:
        await system.ask(plain("Hi"), system.options(4))
        assert measured(registry) == dict.fromkeys(TIMES, 1)
        await system.ask(plain("Hi"), system.options(1))
    assert measured(registry) == dict.fromkeys(TIMES, 2) | {"time_per_output_token": 1}, "one token has no next"
    first, parts = (
        registry.value(f"internvl_llm_{name}_seconds_sum") or 0 for name in ("time_to_first_token", "prefill")
    )
    assert first >= parts > 0


async def test_an_answer_that_is_abandoned_has_the_times_that_it_came_to() -> None:
    registry = PrometheusRegistry()
    async with (
        asking(metrics=LlmMetrics.declared(registry)) as system,
        aclosing(system.answerer.answer(plain("Hi"), system.options(500))) as events,
    ):
        while not isinstance(await anext(events), Delta):
            pass
    assert measured(registry) == dict.fromkeys(TIMES, 1) | {"time_per_output_token": 0}


async def test_a_search_over_beams_is_no_measure_of_single_tokens() -> None:
    registry = PrometheusRegistry()
    async with asking(metrics=LlmMetrics.declared(registry)) as system:
        await system.ask(plain("Hi"), system.options(4, num_beams=2))
    assert measured(registry) == dict.fromkeys(TIMES, 0)


async def test_embeddings_are_counted_by_where_they_came_from() -> None:
    registry = PrometheusRegistry()
    async with asking(metrics=LlmMetrics.declared(registry)) as system:
        dialogue = system.media.dialogue(PICTURE_CASE)
        refs = set(dialogue.embeddings)
        for _ in range(2):
            await system.ask(dialogue, system.options(1))
            system.engine.forget()
    for tier, count in (("vision", len(refs)), ("local", len(refs)), ("store", 0)):
        assert registry.value("internvl_llm_embedding_fetch_seconds_count", tier=tier) == count
    size_bytes = sum(ref.token_count * ref.hidden_size * 4 for ref in refs)
    assert registry.value("internvl_llm_embedding_fetched_bytes_total", tier="vision") == size_bytes
