"""The LLM service, over real channels, asked to leave turns out that its context does not hold."""

from pathlib import Path
from typing import Any

from internvl_serving.common.v1 import generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from shared.errors import PromptTooLong
from tests.rpc.llm_calls import error_of, prompt, request, running

LIMIT = 512
WORDS = "word " * 6


def shortened(asked: pb.Prompt, **config: Any) -> pb.GenerateRequest:
    made = request(asked, **config)
    made.context_overflow = generation_pb2.CONTEXT_OVERFLOW_DROP_OLDEST_TURNS
    return made


async def started(call: Any) -> pb.GenerateStarted:
    events = [event async for event in call]
    return events[0].started


async def test_an_answer_goes_on_without_the_oldest_turns_where_that_is_allowed(tmp_path: Path) -> None:
    texts = [f"{WORDS}{index}" for index in range(41)]
    async with running(tmp_path, max_context_tokens=LIMIT) as stub:
        assert isinstance(await error_of(stub.Generate(request(prompt(*texts)))), PromptTooLong)
        begun = await started(stub.Generate(shortened(prompt(*texts), max_output_tokens=8)))
        assert 0 < begun.dropped_turn_count < 20
        assert begun.prompt_token_count <= LIMIT - 8
        left = texts[2 * begun.dropped_turn_count :]
        whole = await started(stub.Generate(shortened(prompt(*left))))
        assert (whole.prompt_token_ids, whole.dropped_turn_count) == (begun.prompt_token_ids, 0)
        one_more = await stub.CountTokens(pb.CountTokensRequest(prompt=prompt(*texts[len(texts) - len(left) - 2 :])))
        assert one_more.token_count > LIMIT - 8


async def test_no_more_than_half_of_the_context_is_kept_free_for_the_answer(tmp_path: Path) -> None:
    texts = [f"{WORDS}{index}" for index in range(41)]
    async with running(tmp_path, max_context_tokens=LIMIT) as stub:
        begun = await started(stub.Generate(shortened(prompt(*texts), max_output_tokens=LIMIT)))
        assert LIMIT // 4 < begun.prompt_token_count <= LIMIT // 2


async def test_a_last_turn_that_does_not_fit_is_refused_all_the_same(tmp_path: Path) -> None:
    async with running(tmp_path, max_context_tokens=LIMIT) as stub:
        asked = prompt("Hi", "Hello.", "word " * 1000)
        assert isinstance(await error_of(stub.Generate(shortened(asked))), PromptTooLong)
