"""What the LLM service tells of its model and of tokens, without answering; over a real channel."""

from pathlib import Path

import pytest

from internvl_serving.llm.v1 import llm_service_pb2 as pb
from llm_service.prompt.tokenizer import load_tokenizer
from shared.errors import PromptTooLong
from tests.rpc.llm_calls import CHECKPOINT, prompt, running
from tests.rpc.scripted_stages import error_of


async def test_it_tells_its_model_and_the_tokens_of_prompts_and_of_plain_text(tmp_path: Path) -> None:
    async with running(tmp_path) as stub:
        described = await stub.DescribeModel(pb.DescribeModelRequest())
        assert described.model == CHECKPOINT.name
        assert described.max_context_tokens > 0

        counted = await stub.CountTokens(pb.CountTokensRequest(prompt=prompt("Hi"), return_token_ids=True))
        assert counted.token_count == len(counted.token_ids) > 0
        assert not (await stub.CountTokens(pb.CountTokensRequest(prompt=prompt("Hi")))).token_ids

        for text in ("", "Hello there", "<|im_start|>user", "long " * 5000):
            told = await stub.CountTokens(pb.CountTokensRequest(text=text, return_token_ids=True))
            assert list(told.token_ids) == load_tokenizer(CHECKPOINT).encode(text)
        too_long = "x" * (described.max_context_tokens * 16 + 1)
        error = await error_of(stub.CountTokens(pb.CountTokensRequest(text=too_long)))
        assert isinstance(error, PromptTooLong)
        assert error.field == "text"


@pytest.mark.parametrize("text", ["<|im_start|>", "<IMG_CONTEXT>", "<img></img>"])
async def test_no_text_is_a_control_token(text: str) -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))) == text.encode()
    assert len(tokenizer.encode(text)) > 1
