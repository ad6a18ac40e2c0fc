"""What a turn cost, as its log line has it: facts of every stage, and nothing of what was said or shown."""

from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from gateway.content import Medium
from gateway.events import CacheTier, CandidateResult, Finished, FinishReason, Generated, TokenUsage, Transfer
from shared.digest import digest_of
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    Script,
    answer_of,
    ask,
    embedding_digest,
    gateway_without_redis,
    inline,
    user,
)

GENERATED = Generated(
    FinishReason.STOP,
    TokenUsage(prompt_tokens=300, visual_tokens=256, cached_tokens=16, output_tokens=11),
    queue_s=0.001,
    prefill_s=0.02,
    decode_s=2.0,
    replica="10.0.0.1:50",
)


def script_of(generated: Generated) -> Script:
    return [*answer_of("A cat.")[:-1], generated]


async def test_a_turn_s_log_line_holds_what_every_stage_took() -> None:
    gateway = gateway_without_redis(script_of(GENERATED))
    with capture_logs() as lines:
        await gateway.answer(ask(user(inline(CAT), "canary")))
    (line,) = [line for line in lines if line["event"] == "turn_finished"]
    assert (line["prompt_tokens"], line["visual_tokens"], line["cached_tokens"], line["output_tokens"]) == (
        300,
        256,
        16,
        11,
    )
    assert (line["queue_ms"], line["prefill_ms"], line["tokens_per_s"]) == (1.0, 20.0, 5.0)
    assert (line["tiles"], line["cache_tiers"], line["coalesced"]) == ([1], ["NONE"], 0)
    assert line["llm_replica"] == "10.0.0.1:50"
    assert "canary" not in str(lines)


@pytest.mark.parametrize(
    ("output_tokens", "candidates", "decode_s", "expected"),
    [(11, 1, 2.0, 5.0), (12, 2, 2.0, 5.0), (1, 1, 0.0, 0.0), (1, 1, 2.0, 0.0), (0, 1, 2.0, 0.0)],
)
def test_the_first_token_of_each_candidate_is_no_part_of_the_rate(
    output_tokens: int, candidates: int, decode_s: float, expected: float
) -> None:
    results = (CandidateResult(FinishReason.STOP),) * candidates
    usage = TokenUsage(output_tokens=output_tokens)
    generated = replace(GENERATED, usage=usage, decode_s=decode_s, candidates=results)
    assert generated.output_tokens_per_s == expected


async def test_a_receipt_and_the_log_line_say_how_many_bytes_were_moved() -> None:
    digests = [embedding_digest(Medium(digest_of(content))) for content in (CAT, DOG)]
    tiers = ((CacheTier.STORE, 1000), (CacheTier.PREFIX, 0))
    transfers = tuple(Transfer(digest, tier, 0.01, size) for digest, (tier, size) in zip(digests, tiers, strict=True))
    gateway = gateway_without_redis(script_of(replace(GENERATED, transfers=transfers)))
    with capture_logs() as lines:
        *_, finished = await gateway.answer(ask(user(inline(CAT), inline(DOG))))
    assert isinstance(finished, Finished)
    assert [receipt.transfer for receipt in finished.receipts] == list(transfers)
    (line,) = [line for line in lines if line["event"] == "turn_finished"]
    assert (line["transfer_tiers"], line["transfer_bytes"]) == (["STORE", "PREFIX"], 1000)
