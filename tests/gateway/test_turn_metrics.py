"""What the gateway counts of a turn, whichever way it ends."""

import asyncio
from contextlib import aclosing

import pytest

from gateway.events import Finished, FinishReason, Generated, Started, TokenUsage
from gateway.metrics import GatewayMetrics
from shared.errors import EmptyMessage, LlmUnavailable
from shared.prometheus import PrometheusRegistry
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    STARTED,
    Script,
    answer_of,
    ask,
    by_digest,
    gateway_without_redis,
    inline,
    user,
)

REASONS = ("stop", "length", "tool_calls", "failed", "abandoned")


def turns(registry: PrometheusRegistry) -> dict[str, float]:
    """How many turns have ended, by why; only those that there were."""
    counts = {reason: registry.value("internvl_gateway_turns_total", reason=reason) or 0 for reason in REASONS}
    return {reason: count for reason, count in counts.items() if count}


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS])
async def test_an_answered_turn_is_counted_by_its_finish_reason(reason: FinishReason) -> None:
    registry = PrometheusRegistry()
    gateway = gateway_without_redis(
        [*answer_of("Hi")[:-1], Generated(reason)], metrics=GatewayMetrics.declared(registry)
    )
    await gateway.finished(ask(user("Hello")))
    assert turns(registry) == {reason.value.lower(): 1}
    assert registry.value("internvl_gateway_turn_duration_seconds_count") == 1
    assert registry.value("internvl_gateway_time_to_first_token_seconds_count") == 1
    assert registry.value("internvl_gateway_media_duration_seconds_count") == 0, "it had none"


async def test_tokens_are_counted_as_they_were_read_and_written() -> None:
    registry = PrometheusRegistry()
    usage = TokenUsage(prompt_tokens=300, visual_tokens=256, cached_tokens=64, output_tokens=5)
    script: Script = [*answer_of("Hi")[:-1], Generated(FinishReason.STOP, usage)]
    gateway = gateway_without_redis(script, script, metrics=GatewayMetrics.declared(registry))
    for _ in range(2):
        await gateway.finished(ask(user("Hello")))
    assert registry.value("internvl_gateway_prompt_tokens_total", kind="visual") == 512
    assert registry.value("internvl_gateway_prompt_tokens_total", kind="text") == 88
    assert registry.value("internvl_gateway_cached_tokens_total") == 128
    assert registry.value("internvl_gateway_output_tokens_total") == 10


async def test_media_are_counted_by_the_cache_that_held_them() -> None:
    registry = PrometheusRegistry()
    gateway = gateway_without_redis(cached=[CAT], metrics=GatewayMetrics.declared(registry))
    await gateway.finished(ask(user(by_digest(CAT), inline(DOG), "What?")))
    tiers = {tier: registry.value("internvl_gateway_media_total", tier=tier) for tier in ("local", "store", "none")}
    assert tiers == {"local": 0, "store": 1, "none": 1}
    assert registry.value("internvl_gateway_media_duration_seconds_count") == 1


async def test_a_turn_that_fails_is_counted_once_before_and_after_its_first_word() -> None:
    registry = PrometheusRegistry()
    broken: Script = [*answer_of("Hi")[:-1], LlmUnavailable("Lost.")]
    gateway = gateway_without_redis(broken, metrics=GatewayMetrics.declared(registry))
    with pytest.raises(LlmUnavailable):
        await gateway.answer(ask(user("Hello")))
    with pytest.raises(EmptyMessage):
        await gateway.answer(ask(user()))
    assert turns(registry) == {"failed": 2}
    assert registry.value("internvl_gateway_turn_duration_seconds_count") == 0


async def test_a_turn_whose_client_leaves_is_abandoned() -> None:
    registry = PrometheusRegistry()
    hanging: Script = [STARTED, asyncio.Event()]
    gateway = gateway_without_redis(hanging, hanging, metrics=GatewayMetrics.declared(registry))
    async with aclosing(gateway.chat.answer(ask(user("Hello")))) as events:
        assert isinstance(await anext(events), Started)
        assert registry.value("internvl_gateway_turns_in_progress") == 1
    cancelled = asyncio.create_task(gateway.answer(ask(user("Hello"))))
    await gateway.llm.waiting.wait()
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert turns(registry) == {"abandoned": 2}
    assert registry.value("internvl_gateway_turns_in_progress") == 0


async def test_a_client_that_leaves_at_the_last_event_has_had_its_answer() -> None:
    registry = PrometheusRegistry()
    gateway = gateway_without_redis(metrics=GatewayMetrics.declared(registry))
    async with aclosing(gateway.chat.answer(ask(user("Hello")))) as events:
        while not isinstance(await anext(events), Finished):
            assert turns(registry) == {}
    assert turns(registry) == {"stop": 1}
